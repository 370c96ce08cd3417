"""The command line: flags that come back from a run's command; programs that end by themselves."""

import os
import re
import shlex
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pytest

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark import agents
from plumbing import flags
from plumbing.flags import check_flags, command_line, parse_args, preset

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (smac, pearl, meta_bc, macaw, borel, focal)
TINY = "--env-id PointDirection --device cpu --policy-hidden 8 --rl-batch 4 --eval-every 2"
TINY_PEARL = f"{TINY} --initial-steps 9 --prior-steps 9 --posterior-steps 9 --context-batch 4"
TINY_PEARL += " --encoder-hidden 8 --q-hidden 8 --updates-per-iteration 2 --tasks-per-iteration 1"


def presets_of(script):
    return typing.get_args(typing.get_type_hints(script.Args)["preset"])


def parsed(script, args):
    """The flags that the command of a run gives."""
    words = shlex.split(command_line(args, script.__file__, script.PRESETS))
    assert words[:2] == ["python", Path(script.__file__).name]
    return parse_args(script.Args, script.PRESETS, words[2:])


def other(value, kind):
    """Another value of a flag."""
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if typing.get_origin(kind) is tuple:
        return (7, *value[1:])
    if kind is bool:
        return not value
    if kind is int:
        return value + 1
    if kind is float:
        return value / 2 or 0.5
    return '-a b\'s "c".npz'


@pytest.mark.parametrize(
    "script, named", [(script, name) for script in SCRIPTS for name in presets_of(script)]
)
def test_the_command_of_a_run_gives_its_flags(script, named, tmp_path, monkeypatch):
    """Of a preset: as it is, with every flag changed, with every flag put back to its default."""
    monkeypatch.chdir(tmp_path)  # where --save-dataset can be written
    args = preset(script.Args, script.PRESETS, "PointDirection", named)
    assert parsed(script, args) == args
    changed, defaults = {}, {}
    for name, kind in typing.get_type_hints(script.Args).items():
        if name in ("env_id", "preset", "resume"):  # the other presets have their turn
            continue
        changed[name] = other(getattr(args, name), kind)
        defaults[name] = getattr(script.Args(), name)
    if "oracle_frozen" in changed:
        changed["oracle_rewards"] = changed["oracle_frozen"] = True  # one needs the other
    assert len(changed) > 15
    for values in (changed, defaults):
        new = type(args)(**vars(args) | values)
        assert parsed(script, new) == new


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_of_every_environment_gives_its_flags(script):
    for env_id in envs.SHIPPED:
        for variant in presets_of(script):
            args = preset(script.Args, script.PRESETS, env_id, variant)
            assert args.preset == variant and parsed(script, args) == args


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_odd_types_give_one_sentence(script):
    """None of these may start a run."""
    odd = (None, 1.5, "x", [3], (3,), ("a",), {}, np.int64(3), b"x", True, object())
    for name, kind in typing.get_type_hints(script.Args).items():
        values = [value for value in odd if not flags.is_a(value, kind)]
        values += [()] if typing.get_origin(kind) is tuple else []
        values += [10**5000] if kind in (int, float) else []
        for value in values:
            with pytest.raises(buffers.InputError) as error:
                buffers.train(script, **{name: value})
            assert "\n" not in str(error.value)


def test_text_that_is_no_path():
    args = preset(pearl.Args, pearl.PRESETS, "PointDirection")
    args.save_dataset = "a\0b"
    with pytest.raises(buffers.InputError, match="is no path"):
        check_flags(args)


# ----- Programs that end by themselves

FAMILY = """
import dataclasses, os, sys, envs
{first}
class Ends(envs.PointDirection):
    def step(self, action):
        {act}
        return super().step(action)
row = envs.SPECS["PointDirection"]
row = dataclasses.replace(row, env_class=Ends, num_train_tasks=3, num_test_tasks=2)
envs.register("Ends", row)
"""
ENDS = f"{TINY_PEARL} --env-id mine:Ends --online-iterations 1"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A function that writes a module mine, of a family of one's own, into an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(envs, "SPECS", dict(envs.SPECS))
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def write(first="", act="pass"):
        (tmp_path / "mine.py").write_text(FAMILY.format(first=first, act=act))

    yield write
    sys.modules.pop("mine", None)


def refused(script, words, monkeypatch, capsys):
    """The sentence with which a launch ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *words.split()])
    with pytest.raises(SystemExit) as end:
        buffers.launch(script.main, script.Args, script.PRESETS)
    sentence = capsys.readouterr().err
    assert end.value.code == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


def test_an_environment_that_calls_sys_exit(mine, monkeypatch, capsys, tmp_path):
    mine(act="sys.exit(0)")
    words = r"mine.py, line 6, called sys.exit\(0\), so that the run did not end"
    assert re.search(words, refused(pearl, ENDS, monkeypatch, capsys))
    with pytest.raises(buffers.InputError, match=words):
        args = parse_args(pearl.Args, pearl.PRESETS, ENDS.split())
        buffers.train(pearl, **vars(args) | {"run_dir": "other"})
    assert not list(tmp_path.rglob("summary.png"))


@pytest.mark.parametrize("first", ["sys.exit(0)", "sys.exit()", "exit(3)", "raise SystemExit(0)"])
def test_a_module_that_calls_sys_exit(first, mine, monkeypatch, capsys):
    mine(first=first)
    words = "called sys.exit.*, so that the run did not end"
    assert re.search(words, refused(meta_bc, "--env-id mine:Ends", monkeypatch, capsys))


@pytest.mark.parametrize("place", ["first", "act"])
def test_a_module_or_an_environment_that_calls_os_exit(place, mine, tmp_path):
    mine(**{place: "os._exit(0)"})
    script = str(ROOT / "pearl_online_oracle.py")
    command = [sys.executable, script, *ENDS.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    words = r"error: .*mine.py, line \d, called os._exit\(0\), so that the run did not end\n"
    assert result.returncode == 2 and re.fullmatch(words, result.stderr)


def test_os_exit_is_as_it_was_after_a_launch(monkeypatch):
    before = os._exit
    with flags.no_silent_exit():
        assert os._exit is not before
        pid = os.fork()
        if not pid:
            os._exit(0)  # of another process
        assert os.waitpid(pid, 0)[1] == 0
    assert os._exit is before


@pytest.mark.parametrize("words", [
    "--tyro-write-completion nosuchshell x", "--tyro-write-completion bash nowhere/x",
    "--tyro-print-completion nosuchshell",
])  # fmt: skip
def test_completion_that_cannot_be_written(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(meta_bc, words, monkeypatch, capsys)
    with pytest.raises(SystemExit) as end:
        flags.launch_tool(agents.main, agents.Args)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")


# ----- The dataset of a PEARL run


def contents(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_the_command_goes_on_after_the_iteration_of_the_dataset(short, tmp_path, capsys):
    more = f"--run-dir {tmp_path} --online-iterations 2 --dataset-iteration 1"
    saved = tmp_path / "d.npz"
    words = [*TINY_PEARL.split(), *more.split(), "--save-dataset", str(saved)]
    pearl.main(parse_args(pearl.Args, pearl.PRESETS, words))
    run = tmp_path / "PointDirection__pearl_online_oracle__1"
    before = contents(tmp_path)

    # The iteration is over, and the dataset there: it stays, and the run goes on.
    again = ["--resume", str(run), "--save-dataset", str(saved), "--online-iterations", "3"]
    args = parse_args(pearl.Args, pearl.PRESETS, again)
    assert args.save_dataset is None and contents(tmp_path) == before
    assert "iteration 1 of this run is over" in capsys.readouterr().err
    pearl.main(args)
    assert saved.read_bytes() == before[saved]

    # It is over, and there is no dataset: refused, and nothing changes.
    before = contents(tmp_path)
    again[3] = str(tmp_path / "e.npz")
    with pytest.raises(buffers.InputError, match="is over, and there is no file .*e.npz"):
        parse_args(pearl.Args, pearl.PRESETS, again)
    flags_of = dict(resume=str(run), save_dataset=again[3], env_id="PointDirection")
    with pytest.raises(buffers.InputError, match="is over, and there is no file .*e.npz"):
        buffers.train(pearl, **flags_of)
    assert contents(tmp_path) == before


def test_a_run_that_ends_with_the_iteration_of_the_dataset_has_written_it(short, tmp_path):
    """Its step is the iteration's last: a resumed run does not come there again."""
    saved = tmp_path / "d.npz"
    more = f"--run-dir {tmp_path} --online-iterations 1 --dataset-iteration 1"
    words = [*TINY_PEARL.split(), *more.split(), "--save-dataset", str(saved)]
    pearl.main(parse_args(pearl.Args, pearl.PRESETS, words))
    run = tmp_path / "PointDirection__pearl_online_oracle__1"
    again = ["--resume", str(run), "--save-dataset", str(saved), "--online-iterations", "2"]
    assert parse_args(pearl.Args, pearl.PRESETS, again).save_dataset is None
    saved.unlink()
    with pytest.raises(buffers.InputError, match="is over, and there is no file"):
        parse_args(pearl.Args, pearl.PRESETS, again)


def test_ctrl_c_in_a_tool_is_no_traceback(tmp_path):
    code = "import time; from plumbing.flags import launch_tool; import dataclasses, sys\n"
    code += "@dataclasses.dataclass\nclass Args:\n    x: int = 1\n"
    code += "def main(args):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    code += "launch_tool(main, Args)"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    tool.stdout.readline()
    time.sleep(0.1)
    tool.send_signal(2)
    _, errors = tool.communicate(timeout=30)
    assert tool.returncode == 130 and "stopped" in errors and "Traceback" not in errors
