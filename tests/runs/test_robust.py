"""A run is never lost, and no input does harm: stopped runs, full disks, closed terminals, hostile files."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.metadata
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from tqdm import tqdm

import borel
import buffers
import envs
import macaw
import meta_bc
import pearl_online_oracle as pearl
import plumbing.flags
import smac_offline_online as smac
from benchmark import kill
from benchmark.hostile import archive, header_tricks, write, zip_tricks
from buffers import InputError
from plumbing.files import CSV_COLUMNS, MAX_UNPACKED, flatten
from plumbing.flags import check_flags, parse_args, preset, read_flags

ROOT = Path(smac.__file__).parent
SPEC = envs.SPECS["PointDirection"]
SHORT = dict(env_id="PointDirection", policy_hidden=(16,), rl_batch=16, meta_batch=4, eval_every=5, device="cpu")
ENCODER = dict(encoder_hidden=(16,), context_batch=8, latent_dim=3)
ONLINE = dict(q_hidden=(16,), tasks_per_iteration=1, prior_steps=50, posterior_steps=50)
RUNS = {  # short runs of 13 to 16 gradient steps
    smac: SHORT | ENCODER | ONLINE | dict(offline_steps=8, online_iterations=2, updates_per_iteration=4),
    pearl: SHORT | ENCODER | ONLINE | dict(online_iterations=3, updates_per_iteration=5, initial_steps=50),
    meta_bc: SHORT | ENCODER | dict(offline_steps=13),
    macaw: SHORT | dict(value_hidden=(16,), context_batch=8, weight_transform=False, offline_steps=13),
    borel: SHORT | dict(q_hidden=(16,), latent_dim=3, vae_steps=6, vae_tasks=2, elbo_terms=8, offline_steps=8),
}  # fmt: skip
SCRIPTS = pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
FUZZ = 100  # cases of a kind


def make_dataset(file, scale=1.0):
    """Random numbers: 4 training tasks with two trajectories each, 2 test tasks."""
    rng, entries = np.random.default_rng(0), []
    for task in np.repeat(range(4), 2):
        path = {"obs": rng.normal(size=(9, 4)), "actions": rng.uniform(-1, 1, (8, 2))}
        path |= {"rewards": scale * rng.normal(size=8), "terminals": np.zeros(8)}
        entries.append((task, path))
    tasks = envs.sample_tasks("PointDirection", 6)
    buffers.save_dataset(file, "PointDirection", tasks[:4], tasks[4:], entries, entries[::2], "python test")
    return file


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "small.npz")


@pytest.fixture(autouse=True)
def small(quick, monkeypatch):
    monkeypatch.setattr(envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=2, repeats=1))
    monkeypatch.setitem(envs.SPECS, "PointDirection", dataclasses.replace(SPEC, num_train_tasks=4, num_test_tasks=2))


def start(script, dataset, folder, **flags):
    """A short run in `folder`: its directory."""
    data = {} if script is pearl else {"dataset": str(dataset)}
    buffers.train(script, **RUNS[script] | data | {"run_dir": str(folder)} | flags)
    return directory(script, folder)


def directory(script, folder):
    return Path(folder) / f"PointDirection__{script.__name__}__1"


def resume(script, dataset, run, *flags):
    data = [] if script is pearl else ["--dataset", str(dataset)]
    return script.main(parse_args(script.Args, script.PRESETS, ["--resume", str(run), *data, *flags]))


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A function that gives a run of a script that nothing stopped; each is made once."""
    made = {}

    def make(script):
        if script not in made:
            made[script] = start(script, dataset, tmp_path_factory.mktemp("whole"))
        return made[script]

    return make


def read(run, name="step"):
    with np.load(run / "checkpoint.npz") as file:
        return file[name]


def assert_equal_runs(one, other):
    """Checkpoint, points of the curves and eval.csv, bit for bit."""
    a, b = kill.content(one), kill.content(other)
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []


def snapshot(folder):
    """Names, contents and times of all files."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(folder).iterdir()}


def refusal(function, *args):
    """The sentence with which something is refused; None if it is taken."""
    try:
        function(*args)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) <= 1000
        return str(error)


def sentence(monkeypatch, capsys, script, *words):
    """What a script prints, started with these words, before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        buffers.launch(script.main, script.Args, script.PRESETS)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err.strip()


def forked(function):
    """What a function raised in a process of its own, which then ends, and its memory in MB; nothing is printed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            function()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode(errors="replace"))
        os._exit(0)
    os.close(write_end)
    usage = os.wait4(pid, 0)[2]
    with os.fdopen(read_end) as file:
        return file.read(), usage.ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)


def call_at(monkeypatch, name, step, function):
    """Call a function when `Run.name` is called at this step (steps made so far), before it."""
    method = getattr(buffers.Run, name)

    def call(run, *args, **kwargs):
        if run.step == step:
            function()
        return method(run, *args, **kwargs)

    monkeypatch.setattr(buffers.Run, name, call)


def stopped(script, dataset, folder, monkeypatch, **flags):
    """A run that was stopped after step 7."""
    with monkeypatch.context() as patch:
        call_at(patch, "log", 6, functools.partial(send, signal.SIGTERM))
        with pytest.raises(SystemExit, match="stopped after step 7; continue with: python"):
            start(script, dataset, folder, **flags)
    return directory(script, folder)


def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)


def pasted(message):
    """The script and the words behind it in the command of a sentence."""
    python, script, *words = shlex.split(message.split("continue with: ")[1])
    assert python == "python" and Path(script).is_absolute()
    return Path(script), words


# ----- Stopped at any moment


@pytest.mark.parametrize("script, number, method", [(smac, signal.SIGINT, "log"), (borel, signal.SIGTERM, "write")])
def test_a_stopped_run_goes_on_by_the_pasted_command(script, whole, dataset, tmp_path, monkeypatch, number, method):
    """In a step, or in an evaluation; the command holds for another working directory, and the curves stay the same."""
    (tmp_path / "one place").mkdir()
    (tmp_path / "another").mkdir()
    monkeypatch.chdir(tmp_path / "one place")
    shutil.copy(dataset, "d.npz")
    with monkeypatch.context() as patch:
        call_at(patch, method, 11 if method == "log" else 9, functools.partial(send, number))
        with pytest.raises(SystemExit, match=f"stopped after step {12 if method == 'log' else 10}; ") as stopped:
            start(script, "d.npz", "my runs")
    run = directory(script, tmp_path / "one place" / "my runs")
    assert read(run) == (12 if method == "log" else 10)
    monkeypatch.chdir(tmp_path / "another")
    file, words = pasted(str(stopped.value))
    assert file == Path(script.__file__)
    script.main(parse_args(script.Args, script.PRESETS, words))
    assert os.listdir() == []
    assert_equal_runs(whole(script), run)


def test_the_command_of_a_family_of_ones_own_goes_where_its_module_is(tmp_path, monkeypatch):
    """Without starting a run, of which no more is needed."""
    run = object.__new__(buffers.Run)
    run.args, run.script = smac.Args(env_id="mine:Mine", dataset="d's.npz"), Path("/a folder/smac.py")
    run.folder = Path("runs")
    monkeypatch.chdir(tmp_path)
    command = f"cd {tmp_path} && python '/a folder/smac.py' --resume {tmp_path}/runs --env-id mine:Mine --dataset "
    assert run.command() == command + shlex.quote(f"{tmp_path}/d's.npz")


def test_a_stop_before_the_first_step(dataset, tmp_path, monkeypatch):
    """PEARL collects data then."""
    collect = pearl.collect
    monkeypatch.setattr(pearl, "collect", lambda *args, **flags: send(signal.SIGTERM) or collect(*args, **flags))
    with pytest.raises(SystemExit, match="stopped before the first gradient step; there is no checkpoint yet"):
        start(pearl, dataset, tmp_path)


def test_the_hangup_of_a_terminal_stops_a_run_unless_it_is_ignored(dataset, tmp_path, monkeypatch):
    call_at(monkeypatch, "log", 2, functools.partial(send, signal.SIGHUP))
    with pytest.raises(SystemExit, match="stopped after step 3"):
        start(meta_bc, dataset, tmp_path / "a")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert read(start(meta_bc, dataset, tmp_path / "b")) == 13
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_runs_end_like_runs_that_were_never_killed(tmp_path, monkeypatch):
    """SIGKILL at seeded random moments, some within the write of a checkpoint."""
    flags = kill.FLAGS["smac_offline_online"].replace("--offline-steps 60", "--offline-steps 20")
    monkeypatch.setitem(kill.FLAGS, "smac_offline_online", flags.replace("-per-iteration 40", "-per-iteration 20"))
    kill.main(kill.Args(kills=(3, 0, 0, 0, 0), seed=3, out=str(tmp_path / "kill.md")))  # which exits if a run differs
    rows = [line for line in (tmp_path / "kill.md").read_text().splitlines() if line.startswith("|") and ".py" in line]
    assert sum(int(row.split("|")[-2]) for row in rows) == 3


def test_curves_are_compared_in_the_order_of_writing(whole, dataset, tmp_path, monkeypatch):
    """The names of TensorBoard's files tell it to a second only: short runs are resumed within one."""
    run = stopped(meta_bc, dataset, tmp_path, monkeypatch)
    (first,) = run.glob("events.*")
    first.rename(run / "events.out.tfevents.9999999999.later")
    resume(meta_bc, dataset, run)
    assert_equal_runs(whole(meta_bc), run)


def test_eval_csv_comes_back_whole(whole, dataset, tmp_path):
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    file, text = run / "eval.csv", (run / "eval.csv").read_bytes()
    for damaged in (text[:-20], text.replace(b"0", b"1"), None):
        file.write_bytes(damaged) if damaged is not None else file.unlink()
        resume(meta_bc, dataset, run)
        assert file.read_bytes() == text


def test_a_link_in_the_place_of_a_file_of_a_run_is_not_followed(dataset, tmp_path, monkeypatch):
    run, target = stopped(meta_bc, dataset, tmp_path, monkeypatch), tmp_path / "target"
    target.write_bytes(b"precious")
    names = ["eval.csv", "summary.png", "agent_13.npz", "figures_13.npz"]
    for name in names:  # in the place of a file: refused, the checkpoint stays
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name} is a link, and only a regular file is replaced"):
            resume(meta_bc, dataset, run)
        (run / name).unlink()
    for name in ("eval.csv.tmp", "checkpoint.npz.tmp"):  # in the place of what is renamed: removed
        (run / name).symlink_to(target)
    resume(meta_bc, dataset, run)
    assert read(run) == 13 and not any(file.is_symlink() for file in run.iterdir())
    (run / "args.json").unlink()
    (run / "args.json").symlink_to(target)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        resume(meta_bc, dataset, run)
    assert target.read_bytes() == b"precious"


def test_args_json_is_whole_after_a_resume_with_shorter_flags(whole, dataset, tmp_path):
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    (run / "args.json").write_text("x" * 10_000)
    resume(meta_bc, dataset, run)
    flags = json.loads((run / "args.json").read_text())
    assert flags["resume"] == str(run) and flags["offline_steps"] == 13 and "cpu" in flags["versions"]


# ----- Which data, which folder


@SCRIPTS
def test_another_dataset_is_refused_and_the_same_one_elsewhere_is_taken(script, dataset, tmp_path, monkeypatch):
    if script is pearl:
        return  # it has none
    with np.load(dataset) as file:
        arrays = dict(file)
    write(tmp_path / "same.npz", arrays)  # other bytes, the same content
    others = {
        "test_tasks": arrays["test_tasks"][::-1], "train_tasks": arrays["train_tasks"][[1, 0, 2, 3]],
        "rl_tasks": (arrays["rl_tasks"] + 1) % 4, "encoder_rewards": arrays["encoder_rewards"] + 1,
        "rl_obs": arrays["rl_obs"] + np.float32(1e-3),
    }  # fmt: skip
    fewer = {name: arrays[name] % 3 for name in ("rl_tasks", "encoder_tasks")}  # of which no size fits
    others = [{name: array} for name, array in others.items()] + [fewer | {"train_tasks": arrays["train_tasks"][:3]}]
    run = stopped(script, dataset, tmp_path, monkeypatch)
    before = snapshot(run)
    for other in others:
        write(tmp_path / "other.npz", arrays | other)
        words = refusal(resume, script, tmp_path / "other.npz", run)
        assert words == f"the data of {run} are others than in this dataset: name theirs with --dataset", list(other)
    with pytest.raises(InputError, match="there is no dataset at"):
        resume(script, tmp_path / "nothing.npz", run)
    with pytest.raises(InputError, match="--seed is 1 in the run to resume and cannot become 2"):
        resume(script, dataset, run, "--seed", "2")
    assert snapshot(run) == before
    resume(script, tmp_path / "same.npz", run)
    assert read(run) >= 13


def test_files_to_write_and_to_read_are_named_by_the_command_line_alone(dataset, tmp_path, monkeypatch):
    target = tmp_path / "precious.npz"
    target.write_bytes(b"precious")
    run = stopped(pearl, dataset, tmp_path, monkeypatch, dataset_iteration=2)
    with np.load(run / "checkpoint.npz") as file:
        arrays = dict(file)
    flags = json.loads(arrays["flags"].item())
    assert not {"save_dataset", "dataset", "run_dir", "resume"} & flags.keys()
    arrays["flags"] = np.array(json.dumps(flags | dict(save_dataset=str(target), run_dir=str(tmp_path / "elsewhere"))))
    write(run / "checkpoint.npz", arrays)
    resume(pearl, dataset, run)
    assert read(run) == 15 and target.read_bytes() == b"precious" and not (tmp_path / "elsewhere").exists()


def test_a_dataset_that_the_command_line_names_is_written_after_a_resume(dataset, tmp_path, monkeypatch):
    call_at(monkeypatch, "log", 6, functools.partial(send, signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        start(pearl, dataset, tmp_path, dataset_iteration=2, save_dataset=str(tmp_path / "d.npz"))
    monkeypatch.undo()
    _, words = pasted(str(ended.value))
    assert words[2:] == ["--save-dataset", str(tmp_path / "d.npz")]


@pytest.mark.parametrize("place", ["", "nowhere/d.npz"])
def test_a_dataset_that_can_not_be_saved_is_found_out_at_once(tmp_path, place):
    args = preset(pearl.Args, pearl.PRESETS, "PointDirection")
    words = refusal(check_flags, dataclasses.replace(args, save_dataset=str(tmp_path / place)))
    assert words == f"--save-dataset {tmp_path / place} is no file in a folder that can be written to"
    check_flags(dataclasses.replace(args, save_dataset=str(tmp_path / "d.npz")))


def test_only_one_process_at_a_time_writes_to_a_run(whole, dataset, tmp_path):
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    before, again = snapshot(run), functools.partial(resume, meta_bc, dataset, run)
    with open(run / "args.json", "r+") as file:  # until this process closes the file, in any way
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert forked(again)[0] == f"InputError: another process writes to {run}, or another run of this one"
    assert snapshot(run) == before
    assert forked(again)[0] == "nothing"
    assert forked(again)[0] == "nothing"  # the last one ended without a close


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(dataset, tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = start(meta_bc, dataset, tmp_path)
    assert read(run) == 13
    warning = f"warning: {run} can not be locked: start no second process with it\n"
    assert capsys.readouterr().err.startswith(warning)


def test_a_run_closes_its_files_and_threads(dataset, tmp_path):
    counts = []
    for i in range(3):
        start(meta_bc, dataset, tmp_path / str(i))
        counts.append((len(os.listdir("/dev/fd")), threading.active_count()))
    assert counts[1] == counts[2]


# ----- What a run leaves behind in the process that called it


def surroundings():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return handlers, threading.excepthook, tqdm.monitor_interval, torch.get_float32_matmul_precision()


class Unexpected(Exception):
    pass


@pytest.mark.parametrize("place, name, error", [
    (buffers, "flatten", Unexpected()), (buffers, "draw_summary", Unexpected()),
    (buffers.SummaryWriter, "close", OSError(errno.ENOSPC, "No space left on device")),
])  # fmt: skip
def test_signals_hooks_and_precision_are_as_they_were(dataset, tmp_path, monkeypatch, place, name, error):
    """Also after an error while a run is closed; tests/shared/test_own_tasks.py has other ends."""

    def fail(*_):
        raise error

    before = surroundings()
    monkeypatch.setattr(place, name, fail)
    with pytest.raises((Unexpected, InputError)) as raised:
        start(meta_bc, dataset, tmp_path)
    assert surroundings() == before
    if name == "close":  # TensorBoard's last words do not fit on the disk
        message = f"can not write to {directory(meta_bc, tmp_path)}: No space left on device; continue with: python"
        assert str(raised.value).startswith(message)


# ----- Closed terminals and pipes


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal

    def write(self, text):
        raise OSError(errno.EIO, "I/O error") if self.isatty() else BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self):
        self.write("")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_terminal_loses_nothing(whole, dataset, tmp_path, monkeypatch, terminal):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone(terminal))
    run = start(smac, dataset, tmp_path)
    assert_equal_runs(whole(smac), run)


def test_streams_that_are_not_there(whole, dataset, tmp_path, monkeypatch):
    """As with pythonw, or after >&-"""
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["script", "--resume", str(run), "--dataset", str(dataset)])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    buffers.launch(meta_bc.main, meta_bc.Args, meta_bc.PRESETS)
    sys.argv[2] = str(tmp_path)
    with pytest.raises(SystemExit) as ended:
        buffers.launch(meta_bc.main, meta_bc.Args, meta_bc.PRESETS)
    assert ended.value.code == 2


def test_streams_that_are_closed(tmp_path):
    """GLFW, which Gymnasium loads, needs an error stream; and no file may take the place of one."""
    lines = "import os, sys, envs", "kept = [os.fstat(n).st_rdev == os.stat(os.devnull).st_rdev for n in range(3)]"
    code = "; ".join([*lines, f"open({str(tmp_path / 'kept')!r}, 'w').write(str(kept))"])
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    assert (tmp_path / "kept").read_text() == "[True, True, True]"


def test_the_checkpoint_comes_before_the_words(dataset, tmp_path, monkeypatch):
    told, say, run = {}, plumbing.flags.print_safely, directory(smac, tmp_path)

    def look(text, *stream):
        if text.startswith("step"):
            told[int(re.match(r"step (\d+)", text)[1])] = int(read(run))
        say(text, *stream)

    monkeypatch.setattr(buffers, "print_safely", look)
    start(smac, dataset, tmp_path)
    assert told == {5: 5, 8: 8, 10: 10, 15: 15, 16: 16}


def test_output_that_is_not_a_terminal_stays_small(tmp_path, monkeypatch, capsys):
    """22,000 steps of a hundredth of a second: a line every half minute, and no bar."""
    clock, network = [0.0], torch.nn.Linear(1, 1)
    monkeypatch.setattr(buffers.time, "time", lambda: clock[0])
    args = meta_bc.Args(env_id="PointDirection", run_dir=str(tmp_path), device="cpu", eval_every=10**6)
    monkeypatch.setattr(buffers.Run, "save", lambda run: None)
    monkeypatch.setattr(buffers, "table", lambda file: "")
    with buffers.Run(args, "a.py", agent=network, optimizer=torch.optim.Adam(network.parameters())) as run:
        for step in run.steps(22_000, "training"):
            clock[0] = step / 100
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 7 and lines[0].startswith("training: step 30") and lines[0].endswith(" of 22000")
    assert len(err) < 300 and len(out) < 1000


def test_few_of_many_trajectories_are_drawn(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = {"obs": rng.normal(size=(2, 4)), "actions": np.zeros((1, 2)), "rewards": [0], "terminals": [0]}
    entries = [(number % 4, path | {"obs": rng.normal(size=(2, 4))}) for number in range(600)]
    tasks = envs.sample_tasks("PointDirection", 6)
    buffers.save_dataset(tmp_path / "d.npz", "PointDirection", tasks[:4], tasks[4:], entries, [], "python test")
    monkeypatch.setattr(envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=4))
    with np.load(start(meta_bc, tmp_path / "d.npz", tmp_path) / "figures_13.npz") as file:
        assert file["offline data"].shape == (500, 2, 2)


# ----- What can not be written, or is not worth it


@pytest.mark.parametrize("limit", [1, 8000])  # bytes a file: nothing can be written; all but the checkpoint
def test_a_full_disk_keeps_the_checkpoint(whole, dataset, tmp_path, monkeypatch, limit):
    run = directory(smac, tmp_path)
    with monkeypatch.context() as patch:
        fill = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        call_at(patch, "log", 11, fill)
        call_at(patch, "log", 12, functools.partial(send, signal.SIGTERM))
        message, _ = forked(lambda: start(smac, dataset, tmp_path))
    assert message.startswith("InputError: can not write to ") and message.count("\n") == 0
    assert re.match(r"InputError: can not write to [^']*: File too large; continue with: python", message)
    assert pasted(message)[1][:2] == ["--resume", str(run)]
    assert read(run) == 10 and not (run / "checkpoint.npz.tmp").exists()
    resume(smac, dataset, run)
    assert_equal_runs(whole(smac), run)


def test_folders_that_can_not_be_run_folders(dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--env-id", "PointDirection", "--device", "cpu", "--dataset", dataset, "--run-dir"]
    for folder, words in (
        (tmp_path / "file", "Not a directory"), ("a" * 5000, "File name too long"), ("a/" * 5000, "File name too long"),
        (tmp_path / "a\udcffb", "must be printable text in UTF-8"), (tmp_path / "a\x1b[31m", "must be printable text"),
    ):  # fmt: skip
        assert words in sentence(monkeypatch, capsys, meta_bc, *flags, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    for words in (["--resume", "~nobody_of_this_name/run"], ["--resume", "a/" * 3000], [*flags[:5], "~/nothing.npz"]):
        assert "there is no " in sentence(monkeypatch, capsys, meta_bc, *words)


def test_the_home_folder_may_be_a_tilde(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(dataset, tmp_path / "d.npz")
    start(meta_bc, "~/d.npz", "~/runs")
    resume(meta_bc, "~/d.npz", "~/runs/PointDirection__meta_bc__1")
    assert sorted(os.listdir(tmp_path)) == ["d.npz", "runs"]


NANS = [(smac, "observation"), (pearl, "reward"), (macaw, "observation"), (macaw, "observation alone")]


@pytest.mark.parametrize("script, what", NANS)
def test_nan_from_the_environment(script, dataset, tmp_path, monkeypatch, what):
    """The environment's numbers become NaN after the first checkpoint: the sentence names step and checkpoint."""
    step, save, broken = envs.PointDirection.step, buffers.Run.save, []

    def spoiled(env, action):
        obs, reward, *rest = step(env, action)
        if broken and what == "observation":
            return obs * np.float32("nan"), reward, *rest
        if broken and what == "observation alone":  # no return tells, and MACAW has no KL
            return obs * np.float32("nan"), 0.0, *rest
        return obs, float("nan") if broken else reward, *rest

    monkeypatch.setattr(envs.PointDirection, "step", spoiled)
    monkeypatch.setattr(buffers.Run, "save", lambda run: save(run) or broken.append(run.step))
    message, run = refusal(start, script, dataset, tmp_path), directory(script, tmp_path)
    at = r"(at the evaluation after|before) step \d+"  # PEARL meets it while it collects data
    assert re.search(rf"became NaN or infinite {at} of {run}; continue with: python", message), message
    assert pasted(message)[1][:2] == ["--resume", str(run)]
    assert read(run) == broken[0] == 5


@pytest.mark.parametrize("script, flags", [(smac, dict(lr=1e3)), (macaw, dict(policy_lr=1e15))])
def test_learning_that_diverges(script, flags, dataset, tmp_path):
    message = refusal(functools.partial(start, script, dataset, tmp_path, eval_every=1, **flags))
    assert re.search("(is|became) NaN or infinite", message) and re.search("continue with|no checkpoint yet", message)


def test_rewards_that_are_too_large(tmp_path):
    """Of 1e15 and 1e25: squares that are and are not float32."""
    for scale in (1e15, 1e25):
        data = make_dataset(tmp_path / "d.npz", scale)
        with pytest.raises(InputError, match="NaN or infinite"):
            start(meta_bc, data, tmp_path / str(scale), eval_every=1, lr=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_never_holds_nan(dataset, tmp_path, monkeypatch, value):
    """The losses of the step were finite, the parameters after it are not."""
    update, calls = smac.update, []

    def poison(agent, *args, **kwargs):
        info = update(agent, *args, **kwargs)
        calls.append(1)
        if len(calls) == 15:
            agent.decoder.net[0].bias.data[3] = value
        return info

    monkeypatch.setattr(smac, "update", poison)
    monkeypatch.setattr(buffers.Run, "write", lambda *_: None)  # an evaluation would find it
    message = refusal(start, smac, dataset, tmp_path)
    assert message.startswith("no checkpoint after step 15, agent/decoder.net.0.bias is NaN or infinite; continue with")
    assert read(directory(smac, tmp_path)) == 10


# ----- Flags


HUGE = 10**400
BAD_FLAGS = [
    (smac, dict(resume=""), "--resume is empty"),
    (smac, dict(dataset=""), "--dataset is empty"),
    (pearl, dict(save_dataset=""), "--save-dataset is empty"),
    (smac, dict(q_hidden=(9000, 9000)), "--q-hidden is (9000, 9000), it must be above 0 and at most 2048"),
    (smac, dict(q_hidden=(2048,) * 3), "--q-hidden is (2048, 2048, 2048), which makes more than 4194304 weights"),
    (macaw, dict(policy_hidden=(600, 600)), "--policy-hidden is (600, 600), which makes more than 262144 weights"),
    (smac, dict(q_hidden=(16,) * 11), "--q-hidden is (16, 16"),
    (smac, dict(q_hidden=()), "--q-hidden is (), it must be"),
    (smac, dict(rl_batch=10**9), "--rl-batch is 1000000000, it must be at least 2 and at most 10000"),
    (macaw, dict(rl_batch=1), "--rl-batch is 1, it must be at least 2"),
    (macaw, dict(context_batch=1), "--context-batch is 1, it must be at least 2"),
    (smac, dict(meta_batch=10_000, rl_batch=10_000), "meta_batch x rl_batch must be at most 32768"),
    (smac, dict(meta_batch=200, context_batch=200), "meta_batch x context_batch must be at most 32768"),
    (smac, dict(meta_batch=8, rl_batch=4000, latent_dim=600), "meta_batch x rl_batch x latent_dim must be at most"),
    (borel, dict(elbo_terms=30_000), "vae_tasks x vae_trajectories x elbo_terms x elbo_terms must be at most 1048576"),
    (borel, dict(vae_tasks=10**12), "vae_tasks x vae_trajectories must be at most 128"),
    (borel, dict(vae_tasks=HUGE), "--vae-tasks is 1000"),
    (smac, dict(lr=HUGE), "--lr is 10000"), (smac, dict(lr=float("inf")), "--lr is inf, it must be above 0"),
    (smac, dict(lr=float("nan")), "--lr is nan"), (smac, dict(lr=0.0), "--lr is 0.0, it must be above 0"),
    (smac, dict(seed=HUGE), "--seed is 10000"), (smac, dict(seed=-1), "--seed is -1, it must be at least 0"),
    (smac, dict(seed=-HUGE), "--seed is -10000"), (smac, dict(gamma=1.1), "--gamma is 1.1, it must be above 0 and at"),
    (smac, dict(eval_every=0), "--eval-every is 0, it must be above 0"), (smac, dict(lr="1"), "--lr is '1', which is"),
    (smac, dict(latent_dim=True), "--latent-dim is True, which is not of its type"),
    (smac, dict(num_critics=3), "--num-critics is 3, which is not of its type"),
    (smac, dict(q_hidden=[16]), "--q-hidden is [16], which is not of its type"),
    (smac, dict(device="tpu"), "--device is 'tpu', which is not of its type"),
    (smac, dict(tasks_per_iteration=33), "--tasks-per-iteration is 33, it must be above 0 and at most 32"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, words", BAD_FLAGS)
def test_flags_that_can_not_be(script, flags, words):
    args = preset(script.Args, script.PRESETS, "PointDirection")
    check_flags(args)
    message = refusal(check_flags, dataclasses.replace(args, **flags))
    assert words in message


@pytest.mark.parametrize("number", [10**12, 2**53])
def test_a_buffer_that_does_not_fit_into_memory(dataset, tmp_path, number):
    message = refusal(functools.partial(start, smac, dataset, tmp_path, online_iterations=number))
    assert "transitions does not fit into memory" in message and list(tmp_path.iterdir()) == []


def test_numbers_on_the_command_line_that_are_too_long(monkeypatch, capsys):
    for flag, words in (("--lr", "--lr is inf"), ("--seed", "--seed is 1000"), ("--online-iterations", "s is 1000")):
        assert words in sentence(monkeypatch, capsys, smac, "--env-id", "PointDirection", flag, str(HUGE))


def test_a_gpu_that_does_not_work(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    flags = ["--env-id", "PointDirection", "--device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    for device in ("auto", "cuda"):
        words = sentence(monkeypatch, capsys, smac, *flags, device)
        assert words.startswith(f"error: --device {device}: the GPU cannot be used (CUDA error: out of memory CUDA")
        assert words.endswith("; --device cpu works")


# ----- Without PyBullet


def test_without_pybullet_all_but_sawyer_works(dataset, tmp_path, monkeypatch, capsys):
    version = importlib.metadata.version

    def missing(name):
        if name == "pybullet":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "pybullet", None)  # importing it raises ImportError
    envs.check_family.cache_clear()
    run = start(meta_bc, dataset, tmp_path)
    assert "pybullet" not in json.loads((run / "args.json").read_text())["versions"]
    capsys.readouterr()
    for env_id in ("SawyerManipulation", "SawyerManipulation8"):
        words = sentence(monkeypatch, capsys, pearl, "--env-id", env_id)
        assert words.startswith("error: the Sawyer environments need pybullet; `pip install pybullet==")
    for env_id in envs.SPECS.keys() - {"SawyerManipulation", "SawyerManipulation8"}:
        envs.make(env_id).close()


def test_requirements_install_without_a_compiler():
    """PyBullet has a wheel for Python 3.11 on x86-64 Linux only."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {r.name: r for r in map(Requirement, lines)}
    assert [name for name, r in requirements.items() if r.marker] == ["pybullet"]
    assert all(str(r.specifier).startswith("==") for r in requirements.values())
    marker, where = requirements["pybullet"].marker, dict(sys_platform="linux", platform_machine="x86_64")
    assert marker.evaluate(where | {"python_version": "3.11"})
    for other in (dict(python_version="3.12"), dict(python_version="3.13"), dict(sys_platform="darwin"),
                  dict(sys_platform="win32"), dict(platform_machine="aarch64")):  # fmt: skip
        assert not marker.evaluate(where | {"python_version": "3.11"} | other)
    said = (ROOT / "sawyer.py").read_text()
    assert f"pip install pybullet{requirements['pybullet'].specifier}" in said


# ----- Checkpoints: fuzz


@pytest.fixture(scope="module")
def good(dataset, tmp_path_factory):
    """A stopped run of 12 of 16 steps: its folder, its content, and what takes a checkpoint as `main` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=2, repeats=1))
        call_at(patch, "log", 11, functools.partial(send, signal.SIGTERM))
        folder = tmp_path_factory.mktemp("good")
        with pytest.raises(SystemExit):
            start(smac, dataset, folder)
        run = directory(smac, folder)
    data = buffers.load_dataset("PointDirection", dataset)
    args = parse_args(smac.Args, smac.PRESETS, ["--resume", str(run)])
    agent = smac.Agent(SPEC.obs_dim, SPEC.action_dim, args)
    buffer = buffers.from_dataset(data, "PointDirection", more=1000)
    parts = {"agent": agent, "buffer": buffer, "act_rng": torch.Generator(), "rng": torch.Generator()}
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    parts["optimizer"] = torch.optim.Adam(trained, lr=args.lr, fused=True)
    sizes, used = {name: size.clone() for name, size in buffer.sizes.items()}, buffer.used

    def take(folder):
        buffer.used = used  # the dataset is there, and nothing else
        parts["optimizer"].state.clear()
        for name, size in buffer.sizes.items():
            size.copy_(sizes[name])
        flags = read_flags(smac.Args, smac.PRESETS, folder / "checkpoint.npz")
        flags = dataclasses.replace(flags, resume=str(folder))
        buffers.Run(flags, smac.__file__, data["sha256"], **parts).file.close()

    with np.load(run / "checkpoint.npz") as file:
        arrays = {name: file[name] for name in file.files}
    take(shutil.copytree(run, tmp_path_factory.mktemp("taken") / "run"))
    assert buffer.used == used + 100
    return (run / "checkpoint.npz").read_bytes(), arrays, take, parts


def damage(good, rng):
    """Flipped bits, overwritten bytes, zeros, a cut, a piece moved: what disks, networks and editors do."""
    bad, kind = bytearray(good), rng.integers(5)
    at = int(rng.integers(len(bad)))
    if rng.random() < 0.3:
        at = len(bad) - 1 - int(rng.integers(1200))  # the table of contents, at the end
    if kind == 0:
        for i in [at, *rng.integers(0, len(bad), rng.integers(3))]:
            bad[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        bad[at] = rng.integers(256)
    elif kind == 2:
        bad[at : at + 64] = bytes(len(bad[at : at + 64]))
    elif kind == 3:
        del bad[at:]
    else:
        bad[at:at] = bad[at // 2 : at // 2 + rng.integers(1, 100)]
    return bytes(bad)


def same_state(parts, arrays):
    """Whether networks, optimizer and buffer hold what a checkpoint says."""
    state = flatten({name: parts[name].state_dict() for name in ("agent", "optimizer", "buffer")})
    return len(state) > 50 and all(np.array_equal(state[name], arrays[name]) for name in state)


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_checkpoint_is_refused_or_as_good_as_before(good, tmp_path, seed):
    content, arrays, take, parts = good
    rng, refused = np.random.default_rng(seed), 0
    for case in range(FUZZ):
        (tmp_path / "checkpoint.npz").write_bytes(damage(content, rng))
        message = refusal(take, tmp_path)
        refused += message is not None
        if message:
            assert "checkpoint.npz" in message and os.listdir(tmp_path) == ["checkpoint.npz"]
        else:  # the damage hit a date in the archive's table, or the space between two parts
            assert same_state(parts, arrays), case
            (tmp_path / "args.json").unlink()
            (tmp_path / "eval.csv").unlink()
    assert refused > 0.7 * FUZZ


def spoil(array, rng):
    """Another array, whatever it was: of another type, shape or range."""
    others = [np.zeros(0, "f4"), np.zeros((2, 3, 4), "f4"), np.array("x"), np.array(1.5), np.zeros(3, complex)]
    others += [np.array([None]), np.zeros(1, "f4,f4"), array[None]]
    if array.dtype.kind != "U":
        others += [array.astype("f8" if array.dtype == "f4" else "f4")]
    if array.dtype == np.float32 and array.size:
        at = np.arange(array.size).reshape(array.shape) == rng.integers(array.size)
        others += 3 * [np.where(at, rng.choice([np.nan, np.inf, -np.inf]), array).astype("f4")]
    if array.dtype == np.int64:
        others += [array - 1000, array + 2**60]
    if array.ndim:
        others += [array[:-1], array.repeat(2, axis=0)]
    return others[rng.integers(len(others))]


def test_a_checkpoint_with_other_fields_is_refused(good, tmp_path):
    """Whole archives, as another program would write them: arrays that are gone, new or spoiled."""
    _, arrays, take, _ = good
    rng = np.random.default_rng(0)
    # Of these any number is as good as another; the flags have a test of their own.
    free = {"flags", "env_steps", "summed", "buffer/sizes/offline", *(name for name in arrays if name[:7] == "totals/")}
    names = [name for name in arrays if name not in free]
    for _ in range(FUZZ):
        name, spoiled = names[rng.integers(len(names))], dict(arrays)
        if rng.random() < 0.1:
            del spoiled[name]
        elif rng.random() < 0.1:
            spoiled[f"{name}/more"] = np.zeros(1)
        else:
            spoiled[name] = spoil(arrays[name], rng)
        write(tmp_path / "checkpoint.npz", spoiled)
        message = refusal(take, tmp_path)
        assert message and "checkpoint.npz" in message, name
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


@pytest.mark.parametrize("name, value", [
    ("q_hidden", [10**9]), ("q_hidden", [16, -16]), ("q_hidden", 16), ("q_hidden", ["16"]), ("q_hidden", [[16]]),
    ("seed", "1"), ("seed", -1), ("seed", HUGE), ("lr", float("nan")), ("lr", None), ("lr", HUGE), ("device", "tpu"),
    ("env_id", "Nowhere"), ("env_id", 3), ("env_id", ...), ("env_id", "os:path"), ("env_id", "HopperParam"),
    ("latent_dim", True), ("meta_batch", 10**9), ("gamma", 2.0), ("more", 1), ("offline_steps", 1e99),
    ("online_iterations", 10**15), ("tasks_per_iteration", 10**30), ("encoder_buffer", "none"), ("num_critics", 3),
    ("num_critics", True), ("meta_batch", 0), ("eval_every", 0), ("q_hidden", [2048] * 10),
])  # fmt: skip
def test_flags_in_a_checkpoint_are_checked_like_flags(good, dataset, tmp_path, name, value):
    flags = json.loads(good[1]["flags"].item()) | {name: value}
    if value is ...:
        del flags[name]
    write(tmp_path / "checkpoint.npz", good[1] | {"flags": np.array(json.dumps(flags))})
    assert refusal(resume, smac, dataset, tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_a_module_is_imported_if_the_command_line_names_it_and_not_for_a_file(good, tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("open('created', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    flags = json.loads(good[1]["flags"].item()) | {"env_id": "trap_module:PointDirection2"}
    write(tmp_path / "checkpoint.npz", good[1] | {"flags": np.array(json.dumps(flags))})
    words = ["--resume", str(tmp_path)]
    message = refusal(parse_args, smac.Args, smac.PRESETS, words)
    assert "give --env-id trap_module:PointDirection2 as well" in message and not Path("created").exists()
    words += ["--env-id", "trap_module:PointDirection2"]
    assert "there is no environment" in refusal(parse_args, smac.Args, smac.PRESETS, words)
    assert Path("created").exists()  # the trap works


@pytest.mark.parametrize("text", ["", "[]", "[" * 9000, "{", '{"a": 1}', "x" * 50_000, '{"env_id": ["Point"]}'])
def test_flags_in_a_checkpoint_that_are_none(good, dataset, tmp_path, text):
    for array in (np.array(text), np.arange(3)):
        write(tmp_path / "checkpoint.npz", good[1] | {"flags": array})
        assert "checkpoint.npz does not fit this script" in refusal(resume, smac, dataset, tmp_path)


def test_a_flag_that_a_checkpoint_lacks_takes_its_default(good, dataset, tmp_path):
    flags = json.loads(good[1]["flags"].item())
    del flags["gamma"]
    write(tmp_path / "checkpoint.npz", good[1] | {"flags": np.array(json.dumps(flags))})
    args = parse_args(smac.Args, smac.PRESETS, ["--resume", str(tmp_path), "--dataset", str(dataset)])
    assert args.gamma == 0.99 and args.offline_steps == 8


HEADER = ",".join(CSV_COLUMNS) + "\r\n"
TABLES = ["", "x", HEADER[:-2], HEADER + "1,2\r\n", HEADER + "1,2,test,online,3,4,much\r\n"]
TABLES += [HEADER + "1,2,\x1b[31mtest,online,3,4.0,5.0\r\n", HEADER + "1,2,test,online,3,nan,5.0\r\n"]
TABLES += [HEADER + "1,2,other,online,3,4.0,5.0\r\n", HEADER + "1,2,test,other,3,4.0,5.0\r\n"]  # a curve for each
TABLES += [HEADER + "1,2,test,online,3,4.0,5.0", HEADER + "9" * 5000 + ",2,test,online,3,4.0,5.0\r\n"]
CHANGES = [  # (what of a checkpoint is changed, what the message says)
    *((dict(eval_csv=np.array(text)), "its step, table of evaluations or precision is none") for text in TABLES),
    (dict(step=np.array(-1)), "its step, table"), (dict(step=np.array(2**63 - 1)), "its step, table"),
    (dict(precision=np.array("high")), "its step, table of evaluations or precision is none"),
    (dict(rng=np.zeros(16, "u1")), "is of the other kind of device, GPU or CPU"),
    (dict(rng=np.full(5056, 255, "u1")), "checkpoint.npz does not fit this run"),
    (dict(torch_rng=np.full(5056, 255, "u1")), "checkpoint.npz does not fit this run"),
    (dict(sha256=np.array("0" * 64)), "are others than in this dataset: name theirs with --dataset"),
    ({"totals/a/b": np.zeros(2, "f4")}, "totals/a/b is float32"), ({"agent/x": np.zeros(2)}, "agent/x is unknown"),
    ({"../x": np.zeros(2)}, "../x is unknown"), ({"optimizer/state/99/step": np.float32(1)}, "99/step is unknown"),
]  # fmt: skip


@pytest.mark.parametrize("change, words", CHANGES)
def test_what_no_run_of_this_dataset_writes(good, tmp_path, change, words):
    write(tmp_path / "checkpoint.npz", good[1] | change)
    assert re.search(words, refusal(good[2], tmp_path))


def test_a_buffer_of_another_dataset_is_refused(good, tmp_path):
    rewards = good[1]["buffer/fields/rewards"].copy()
    rewards[95] += 1  # the last of 64 + 32 transitions
    write(tmp_path / "checkpoint.npz", good[1] | {"buffer/fields/rewards": rewards})
    assert "begins with other rewards than the dataset" in refusal(good[2], tmp_path)


def test_an_optimizer_that_lacks_a_moment_is_refused(good, tmp_path):
    arrays = {name: array for name, array in good[1].items() if name != "optimizer/state/3/exp_avg"}
    write(tmp_path / "checkpoint.npz", arrays)
    assert "a state of the optimizer is not complete" in refusal(good[2], tmp_path)


def test_what_a_checkpoint_may_hold_beside_numbers_that_fit(good, tmp_path):
    """Sums of the loss curves of any name, columns in any order, any compression: they are taken, and do no harm."""
    _, arrays, take, parts = good
    more = {"totals/a": np.float32(1), "totals/a/b": np.float32(2)}
    columns = {name: np.asfortranarray(array) if array.ndim else array for name, array in arrays.items()}
    for content in (arrays | more, columns):
        write(tmp_path / "checkpoint.npz", content, np.savez_compressed)
        take(tmp_path)
        assert same_state(parts, arrays)
    for parameter in parts["optimizer"].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    parts["optimizer"].step()


def test_parameters_that_lie_by_columns_come_back(tmp_path):
    agent, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    for network in (agent, other):
        network.weight = torch.nn.Parameter(torch.randn(2, 3).T)
    args = meta_bc.Args(env_id="PointDirection", run_dir=str(tmp_path), device="cpu")
    with contextlib.suppress(Unexpected), buffers.Run(args, "a.py", agent=agent, optimizer=adam(agent)) as run:
        agent(torch.ones(1, 2)).sum().backward()
        run.parts["optimizer"].step()
        run.save()
        raise Unexpected
    args = dataclasses.replace(args, resume=str(run.folder))
    buffers.Run(args, "a.py", agent=other, optimizer=adam(other)).file.close()
    assert torch.equal(agent.weight, other.weight) and not agent.weight.is_contiguous()


def adam(network):
    return torch.optim.Adam(network.parameters())


# ----- Checkpoints and datasets made to do harm


def harmful(members, names, trap):
    yield from zip_tricks(members, names[0], MAX_UNPACKED)
    for name in names:
        for what, data in header_tricks(name, trap):
            yield f"{what} in {name}", archive({**members, name: data})


def check_harmful(function, as_before, file, content, names, trap):
    """Each is refused, or (the second table) as good as before: at once, in a sentence, no warning, no code ran."""
    with zipfile.ZipFile(io.BytesIO(content)) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    for what, data in harmful(members, names, trap):
        file.write_bytes(data)
        began = time.process_time()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            message = refusal(function, file)
        assert file.name in message if message else what == "a second table in the comment" and as_before(), what
        assert time.process_time() - began < 5 and warned == [] and not trap.exists(), what


def test_a_harmful_dataset_is_refused_at_once(dataset, tmp_path):
    file, trap = tmp_path / "d.npz", tmp_path / "created"
    load = functools.partial(buffers.load_dataset, "PointDirection")
    names = ["rl_obs.npy", "env_id.npy", "train_tasks.npy"]
    expected = pickle.dumps(load(dataset))
    text, peak = forked(
        lambda: check_harmful(
            load, lambda: pickle.dumps(load(file)) == expected, file, dataset.read_bytes(), names, trap
        )
    )
    assert text == "nothing" and peak < resident() + 500


def test_a_harmful_checkpoint_is_refused_at_once(good, tmp_path):
    file, trap, take = tmp_path / "checkpoint.npz", tmp_path / "created", lambda file: good[2](file.parent)
    names = ["agent/policy.net.0.weight.npy", "flags.npy", "eval_csv.npy"]
    text, peak = forked(lambda: check_harmful(take, lambda: same_state(good[3], good[1]), file, good[0], names, trap))
    assert text == "nothing" and peak < resident() + 500


def resident():
    """MB of memory that this process uses, at least."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
