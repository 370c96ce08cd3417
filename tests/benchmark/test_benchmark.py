"""What benchmark/run.py starts, and what it keeps of a run."""

import csv
import dataclasses
import functools
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import buffers
import meta_bc
import smac_offline_online as smac
from benchmark import run, tables, watch
from benchmark.speed import gpu
from plumbing.flags import parse_args
from plumbing.run import lock

SMALL = "--q-hidden 8 --policy-hidden 8 --encoder-hidden 8 --rl-batch 8 --context-batch 8"
SHORT = "--offline-steps 20 --online-iterations 1 --updates-per-iteration 10 --eval-every 10"
ARGS = run.Args("point", run_dir="runs")
COMMAND = f"smac_offline_online.py --env-id PointDirection {SMALL} {SHORT}"


def test_results_of_a_run_that_stopped_and_went_on(tmp_path, monkeypatch):
    def call(line, cwd, env, **options):
        """The command that run.py starts, in this process."""
        assert line[0] == sys.executable and line[1] == "smac_offline_online.py" and cwd == tmp_path
        assert env["OMP_NUM_THREADS"] == "1"
        smac.main(parse_args(smac.Args, smac.PRESETS, line[2:]))
        return SimpleNamespace(stdout=["a line\n"], wait=lambda: 0)

    whole = buffers.load_dataset("PointDirection")
    rl, tasks = (
        [entry for entry in whole["rl"] if entry[0] < 2],
        (whole["train_tasks"][:2], whole["test_tasks"][:2]),
    )
    buffers.save_dataset(tmp_path / "few.npz", "PointDirection", *tasks, rl, [], "by hand")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=call, PIPE=-1, STDOUT=-2))
    command = f"{COMMAND} --dataset few.npz"
    out, results = (
        tmp_path / "benchmark" / "results" / "point",
        tmp_path / "runs" / "point" / "smac",
    )
    assert "smac seed 1: " in run.run(
        "point", "smac", command, 1, dataclasses.replace(ARGS, agents=True)
    )
    first = (out / "smac__1.csv").read_text()
    with open(out / "smac__1.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    steps = sorted({(int(row["gradient_step"]), row["env_steps"] == "0") for row in rows})
    assert steps == [(10, True), (20, True), (30, False)]
    assert (
        json.loads((out / "smac__1.json").read_text())["run_dir"] == "runs/point/smac"
    )  # no path of this machine
    with open(out / "diagnostics" / "smac__1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gradient_step"] for row in rows] == ["10", "20", "30"]
    (kl,) = (name for name in rows[0] if name.startswith("eval/kl_test_"))
    assert all(float(row[kl]) > 0 and float(row["train/q_max"]) for row in rows)
    assert list(watch.load(out / "agents" / "smac__1.npz")[3]) == [20, 30]

    (out / "smac__1.csv").write_text("of a run that was stopped")
    run.run("point", "smac", command, 1, ARGS)  # from its checkpoint
    assert (out / "smac__1.csv").read_text() == first
    for file in results.glob("*/checkpoint.npz"):
        file.unlink()
    for text in (first, first[: first.index("\n30,") + 1]):
        (out / "smac__1.csv").write_text(text)
        line = run.run("point", "smac", command, 1, ARGS)
        assert (out / "smac__1.csv").read_text() == text
        assert ("unfinished" in line) == (text != first) and ("is there already" in line) == (
            text == first
        )
    assert (results / "1.log").read_text() == "a line\na line\n"


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_is_passed_to_the_runs(tmp_path, monkeypatch, compiled):
    lines = []

    def call(line, **options):
        lines.append(line)
        return SimpleNamespace(stdout=[], wait=lambda: 1, returncode=1)

    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=call, PIPE=-1, STDOUT=-2))
    args = dataclasses.replace(ARGS, compile=compiled)
    with pytest.raises(buffers.InputError, match="did not end"):
        run.run("point", "smac", COMMAND, 1, args)
    assert ("--compile" in lines[0]) == compiled


def test_a_run_of_a_family_of_ones_own_goes_on(tmp_path, monkeypatch):
    lines = []

    def call(line, **options):
        lines.append(line)
        return SimpleNamespace(stdout=[], wait=lambda: 1, returncode=1)

    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=call, PIPE=-1, STDOUT=-2))
    folder = tmp_path / "runs" / "point" / "smac" / "Ball__smac_offline_online__1"
    folder.mkdir(parents=True)
    (folder / "checkpoint.npz").touch()
    command = "smac_offline_online.py --env-id ball:Ball"
    with pytest.raises(buffers.InputError, match="did not end"):
        run.run("point", "smac", command, 1, ARGS)
    at = lines[0].index("--resume")
    assert (tmp_path / lines[0][at + 1]) == folder
    assert lines[0][lines[0].index("--env-id") + 1] == "ball:Ball"


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    """A real process: it is started with the flags and folders of the table."""
    for name in ("smac_offline_online.py", "envs.py", "sawyer.py", "buffers.py", "plumbing"):
        (tmp_path / name).symlink_to(run.ROOT / name)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(
        buffers.InputError,
        match="point smac seed 3 did not end: error: there is no dataset at nowhere",
    ):
        run.run("point", "smac", f"{COMMAND} --dataset nowhere", 3, ARGS)
    assert "nowhere" in (tmp_path / "runs" / "point" / "smac" / "3.log").read_text()
    assert not (tmp_path / "benchmark").exists()


def test_a_benchmark_that_is_none():
    with pytest.raises(
        buffers.InputError, match="there is no benchmark point, only point_direction"
    ):
        run.main(run.Args("point"))
    with pytest.raises(buffers.InputError, match="sawyer has no macaw, only smac, meta_bc"):
        run.main(run.Args("sawyer", only=("smac", "macaw")))


def test_every_command_can_be_parsed_and_is_the_one_that_made_the_results():
    """Whatever flags are in the args.json of a result: the table's command still means the same."""
    results, compared = run.ROOT / "benchmark" / "results", 0
    for name, rows in run.BENCHMARKS.items():
        files = {
            file.stem: json.loads(file.read_text()) for file in (results / name).glob("*.json")
        }
        for label, (command, seeds) in rows.items():
            script, *flags = shlex.split(command)
            script = importlib.import_module(script.removesuffix(".py"))
            expected = json.loads(json.dumps(vars(parse_args(script.Args, script.PRESETS, flags))))
            for seed in seeds:
                found = files.pop(f"{label}__{seed}", {})
                shared = found.keys() & expected.keys() - {"seed", "run_dir", "resume"}
                shared -= {"device", "compile"}  # which change no more than rounding
                # The weights of losses that the run does not have
                unread = {"csro_weight", "unicorn_weight"}
                shared -= unread - {f"{expected.get('context_loss')}_weight"}
                assert {key: found[key] for key in shared} == {
                    key: expected[key] for key in shared
                }, (name, label)
                compared += len(shared)
        assert not files, f"results of {name} that its table does not have: {sorted(files)}"
    assert compared > 1_000


def test_rivals_of_the_context_have_the_steps_of_smac():
    """FOCAL, CSRO and UNICORN: as many as both its phases, evaluated at the end of the first."""

    def flags_of(command):
        script, *flags = shlex.split(command)
        script = importlib.import_module(script.removesuffix(".py"))
        return parse_args(script.Args, script.PRESETS, flags)

    for name in [tables.FOLDERS[environment] for environment in tables.COMPARED]:
        rows = run.BENCHMARKS[name]
        smac = flags_of(rows["smac"][0])
        online_steps = smac.online_iterations * smac.updates_per_iteration
        assert smac.offline_steps + online_steps == (
            flags_of(rows["smac_more_offline"][0]).offline_steps
        )
        for label in ("focal", "csro", "unicorn"):
            command, seeds = rows[f"{label}_more_offline"]
            rival = flags_of(command)
            assert rival.offline_steps == smac.offline_steps + online_steps
            assert smac.offline_steps % rival.eval_every == 0
            assert rival.context_loss == label
            shared = {"env_id", "dataset", "rl_batch", "policy_hidden", "lr", "reward_scale"}
            assert all(getattr(rival, flag) == getattr(smac, flag) for flag in shared)
            assert not rival.critic_to_encoder
            assert len(seeds) == (10 if name == "point_direction" else 4)
    rows = run.BENCHMARKS["point_direction"]
    assert flags_of(rows["focal_critic_more_offline"][0]).critic_to_encoder
    assert (
        flags_of(rows["csro_goal_data"][0]).dataset == flags_of(rows["smac_goal_data"][0]).dataset
    )


def test_a_lost_run_is_waited_for(tmp_path):
    """The lock of a run is held until the process that holds it has ended."""
    file = tmp_path / "args.json"
    run.wait_until_free(file)  # there is none
    file.write_text("{}")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with open(file, "r+") as held:
            lock(held)
            os.write(writing, b"locked")
            time.sleep(0.3)
            os.write(writing, b"over")
            os._exit(0)
    assert os.read(reading, 6) == b"locked"
    run.wait_until_free(file)
    os.set_blocking(reading, False)
    assert os.read(reading, 4) == b"over" and file.read_text() == "{}"
    os.waitpid(child, 0)


def test_a_run_ends_with_the_process_that_started_it():
    """On Linux, as when a worker of the cluster is killed."""
    if sys.platform != "linux":
        pytest.skip("other systems have no such signal")
    reading, writing = os.pipe()
    worker = os.fork()
    if not worker:
        late = f"import os, time; time.sleep(5); os.write({writing}, b'still there')"
        run.subprocess.Popen(
            [sys.executable, "-c", late], preexec_fn=run.end_with_parent, pass_fds=[writing]
        )
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(worker, 0)
    os.close(writing)
    assert os.read(reading, 20) == b""  # nobody is left who could write


def test_a_run_on_ray_is_that_of_its_command(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, include_dashboard=False))
    sizes = "--policy-hidden 8 --encoder-hidden 8 --rl-batch 8 --context-batch 8"
    command = f"meta_bc.py --env-id PointDirection {sizes} --offline-steps 20 --eval-every 20"
    monkeypatch.setitem(run.BENCHMARKS, "point", {"meta_bc": (command, (2,))})
    before = signal.getsignal(signal.SIGTERM)
    folders = {name: str(tmp_path / name) for name in ("run_dir", "results")}
    run.main(run.Args("point", ray="local", **folders))
    signal.signal(signal.SIGTERM, before)  # Ray leaves one of its own

    # The same in this process, with as many threads and in the same precision
    flags = [*command.split()[1:], "--seed", "2", "--run-dir", str(tmp_path / "here")]
    monkeypatch.setattr("plumbing.run.matmul_precision", lambda *_: "highest")
    meta_bc.main(parse_args(meta_bc.Args, meta_bc.PRESETS, flags))
    (expected,) = (tmp_path / "here").glob("*/eval.csv")
    made = tmp_path / "results" / "point" / "meta_bc__2.csv"
    assert made.read_bytes() == expected.read_bytes()


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        buffers.InputError, match="pip install -r benchmark/requirements-cluster.txt"
    ):
        run.main(run.Args("sawyer", ray="local"))


def test_results_of_a_run_that_ended_are_told_from_others(tmp_path):
    results = run.ROOT / "benchmark" / "results" / "point_direction"
    for name in ("macaw__1", "borel__1", "meta_bc__1", "pearl__1", "smac__1"):
        assert run.is_finished(results / f"{name}.csv")
        lines = (results / f"{name}.csv").read_text().splitlines()
        last = lines[-1].split(",")[0]
        stopped = [line for line in lines if not line.startswith(f"{last},")]
        (tmp_path / f"{name}.csv").write_text("\n".join(stopped))
        shutil.copy(results / f"{name}.json", tmp_path)
        assert not run.is_finished(tmp_path / f"{name}.csv")


def test_gpu_compares_recorded_plain_and_resumed_runs(tmp_path, monkeypatch):
    """On the CPU, where nothing is recorded, and without a compiler: all end alike."""
    monkeypatch.setattr("plumbing.run.compile_step", lambda step: step)
    sizes = dict(
        policy_hidden=(8,), encoder_hidden=(8,), decoder_hidden=(8,), rl_batch=8, context_batch=8
    )
    phases = {gpu.meta_bc: {"offline": lambda steps: dict(offline_steps=steps) | sizes}}
    monkeypatch.setattr(gpu, "PHASES", phases)
    gpu.main(gpu.Args("cpu", "PointDirection", steps=5, file=tmp_path / "gpu.md"))
    (row,) = [
        line.split(" | ")
        for line in (tmp_path / "gpu.md").read_text().splitlines()
        if "meta_bc" in line
    ]
    assert all(float(speed) > 0 for speed in row[2:5])
    assert row[5:] == ["0.0e+00", "0.0e+00", "0.0e+00 |"]
    assert gpu.apart({"a": np.array([2.0, 4.0])}, {"a": np.array([2.0, 3.0])}) == 0.25
