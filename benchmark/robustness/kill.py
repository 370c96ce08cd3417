"""Kill runs at random moments, resume them, compare: python benchmark/robustness/kill.py

Every run is a process forked from this one, on six tasks of PointDirection with small networks. SIGKILL hits it at a
random time, or as soon after it as checkpoint.npz.tmp is there: within the write of a checkpoint. It is resumed and
killed again until it ends; then the next one starts, until all kills are done. Each must end with the parameters,
optimizer, buffer, generators, curves and eval.csv, bit for bit, of a run that was never killed. Linux and macOS only.
"""

import dataclasses
import functools
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import envs
import plumbing.run
from plumbing.files import write_file
from plumbing.flags import parse_args
from plumbing.machine import versions

SPEC = envs.SPECS["PointDirection"]
TASKS, TEST_TASKS = 6, 2
SIZES = "--env-id PointDirection --device cpu --policy-hidden 32 32 --rl-batch 32 --eval-every 20"
ENCODER = "--encoder-hidden 32 --context-batch 16"
ONLINE = "--q-hidden 32 32 --updates-per-iteration 40 --tasks-per-iteration 2 --prior-steps 50 --posterior-steps 50"
FLAGS = {
    "smac_offline_online": f"{SIZES} {ENCODER} {ONLINE} --offline-steps 60 --online-iterations 2",
    "pearl_online_oracle": f"{SIZES} {ENCODER} {ONLINE} --online-iterations 3 --initial-steps 50",
    "meta_bc": f"{SIZES} {ENCODER} --offline-steps 120",
    "macaw": f"{SIZES} --context-batch 16 --value-hidden 32 32 --offline-steps 120",
    "borel": f"{SIZES} --q-hidden 32 32 --vae-steps 20 --vae-tasks 2 --elbo-terms 8 --offline-steps 80",
    "focal": f"{SIZES} {ENCODER} --q-hidden 32 32 --offline-steps 120",
}
PHASES = {  # the number of the first gradient step of each
    "smac_offline_online": {"offline": 0, "self-supervised": 60}, "pearl_online_oracle": {"PEARL": 0},
    "meta_bc": {"offline": 0}, "macaw": {"offline": 0}, "borel": {"VAE": 0, "SAC": 20},
    "focal": {"offline": 0},
}  # fmt: skip


@dataclasses.dataclass
class Args:
    # kills of SMAC, PEARL, meta-BC, MACAW, BOReL and FOCAL, with each number of threads
    kills: tuple[int, int, int, int, int, int] = (8, 5, 5, 5, 5, 2)
    threads: tuple[int, ...] = (1, 2)  # with two, evaluations are played in two processes
    seed: int = 0  # seed of the moments
    out: str = "benchmark/results/robustness/kill.md"  # where the result goes


def start(script, flags, log, threads=1):
    """Fork a run; its process id. Both output streams go to the file `log`."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    repeats = 1 if threads == 1 else 4  # eight environments are enough for two processes
    try:
        torch.set_num_threads(threads)
        plumbing.run.LOG_EVERY, plumbing.run.matmul_precision = (
            5,
            lambda *_: "highest",
        )  # not what is faster at the moment
        envs.make_evaluation = functools.partial(envs.make_evaluation, num_train=2, repeats=repeats)
        envs.SPECS["PointDirection"] = dataclasses.replace(
            SPEC, num_train_tasks=TASKS, num_test_tasks=TEST_TASKS
        )
        script.main(parse_args(script.Args, script.PRESETS, flags))
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def wait(pid, until=None):
    """Wait for the end of a process, or until something holds; whether the process has ended. Raises if it failed."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG if until else 0)
        if done:
            if status:
                raise RuntimeError(f"a run failed with status {status}")
            return True
        if until():
            return False
        time.sleep(0.0002)


def is_time(moment, file):
    """Whether the moment has passed, and there is such a file."""
    return time.time() > moment and file.exists()


def content(run):
    """What two equal runs share, as bytes: all of the checkpoint, points of the curves, eval.csv."""
    with np.load(run / "checkpoint.npz") as file:
        kept = {
            name: (file[name].dtype.str, file[name].shape, file[name].tobytes())
            for name in file.files
        }
    with tempfile.TemporaryDirectory() as folder:
        # TensorBoard reads files in the order of their names, which is any for two that began in the same second.
        files = sorted(run.glob("events.*"), key=lambda file: file.stat().st_mtime_ns)
        for i, file in enumerate(files):
            shutil.copy(file, f"{folder}/events.out.tfevents.{i:04d}")
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "train/SPS"]
    kept["curves"] = {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags
    }
    return kept | {"eval.csv": (run / "eval.csv").read_bytes()}


def phase(run, name):
    """Where a run is by its last checkpoint."""
    if not (run / "checkpoint.npz").exists():
        return "before the first checkpoint"
    with np.load(run / "checkpoint.npz") as file:
        step = file["step"].item()
    return [label for label, first in PHASES[name].items() if first <= step][-1]


def kill(name, kills, rng, folder, threads=1):
    """Kill and resume runs of one script.

    Returns:
        Counter of (phase, moment) of the kills; for each run that ended, whether it equals one never killed.
    """
    script, log, flags = importlib.import_module(name), folder / "log", FLAGS[name].split()
    more = []
    if hasattr(script.Args, "dataset"):
        data = buffers.load_dataset("PointDirection")
        rl = [entry for entry in data["rl"] if entry[0] < TASKS]
        tasks = data["train_tasks"][:TASKS], data["test_tasks"][:TEST_TASKS]
        buffers.save_dataset(
            folder / "small.npz", "PointDirection", *tasks, rl, [], data["command"]
        )
        more = ["--dataset", str(folder / "small.npz")]
    began = time.time()
    wait(start(script, [*flags, *more, "--run-dir", str(folder / "whole")], log, threads))
    duration, whole = time.time() - began, folder / "whole" / f"PointDirection__{name}__1"
    expected, counts, equal = content(whole), Counter(), []
    while True:
        run = folder / str(len(equal)) / whole.name
        temporary = run / "checkpoint.npz.tmp"
        temporary.unlink(
            missing_ok=True
        )  # what an earlier kill left: from now on it means a write that goes on
        resumed = (run / "checkpoint.npz").exists()
        pid = start(
            script,
            [
                *(["--resume", str(run)] if resumed else [*flags, "--run-dir", str(run.parent)]),
                *more,
            ],
            log,
            threads,
        )
        moment, in_write = time.time() + rng.uniform(0, 0.7 * duration), rng.random() < 0.5
        until = functools.partial(is_time, moment, temporary if in_write else folder)
        if wait(pid, until if counts.total() < kills else None):
            equal.append(content(run) == expected)
            if counts.total() == kills:
                return counts, equal
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            counts[
                phase(run, name),
                "within the write of a checkpoint" if temporary.exists() else "elsewhere",
            ] += 1


def main(args):
    importlib.import_module("torch._dynamo")  # Adam imports it: once here, and not in each fork
    torch.set_num_threads(1)  # a process with threads of its own could not be forked
    rng = np.random.default_rng(args.seed)
    lines = ["| script | threads | phase | moment | kills |", "|---|---|---|---|---|"]
    ended = []
    for threads in args.threads:
        for (name, flags), kills in zip(FLAGS.items(), args.kills):
            if not kills:
                continue
            with tempfile.TemporaryDirectory() as folder:
                counts, equal = kill(name, kills, rng, Path(folder), threads)
            for (where, moment), number in sorted(counts.items()):
                lines.append(f"| {name}.py | {threads} | {where} | {moment} | {number} |")
            with_threads = "one thread" if threads == 1 else f"{threads} threads"
            result = f"{kills} kills with {with_threads}, {len(equal)} runs to their end, "
            result += f"{sum(equal)} of them equal, bit for bit, to one that was never killed"
            ended.append(f"- {name}.py: {result}; `{flags}`")
            print(ended[-1], flush=True)
            if not all(equal):
                sys.exit(f"{name}.py: {equal.count(False)} of {len(equal)} runs differ")
    found = versions()
    flags = f"--kills {' '.join(map(str, args.kills))} --threads {' '.join(map(str, args.threads))}"
    text = f"`python benchmark/robustness/kill.py {flags} --seed {args.seed}`, {found['cpu']}; "
    text += f"Python {found['python']}, PyTorch {found['torch']}\n\n"
    text += "\n".join([*ended, "", *lines]) + "\n"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
