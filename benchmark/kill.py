"""Kill runs at random moments, resume them, compare: python benchmark/kill.py

Every run is a process forked from this one, on six tasks of PointDirection with small networks. SIGKILL hits it at a
random time, or as soon after it as checkpoint.tmp is there: within the write of a checkpoint. It is resumed and killed
again until it ends; then the next one starts, until all kills are done. Each must end with the parameters, optimizer,
buffer, generators, curves and eval.csv, bit for bit, of a run that was never killed. Linux and macOS only.
"""

import dataclasses
import importlib
import os
import re
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs

SPEC = envs.SPECS["PointDirection"]
TASKS, TEST_TASKS = 6, 2
SIZES = "--env-id PointDirection --device cpu --policy-hidden 32 32 --encoder-hidden 32 --rl-batch 32"
SIZES += " --context-batch 16 --eval-every 50 --checkpoint-every 10"
ONLINE = "--q-hidden 32 32 --updates-per-iteration 40 --tasks-per-iteration 2 --prior-steps 50 --posterior-steps 50"
FLAGS = {
    "smac_offline_online": f"{SIZES} {ONLINE} --offline-steps 80 --online-iterations 2",
    "pearl_online_oracle": f"{SIZES} {ONLINE} --online-iterations 4 --initial-steps 50",
    "meta_bc": f"{SIZES} --offline-steps 160",
}


@dataclasses.dataclass
class Args:
    kills: tuple[int, int, int] = (50, 10, 10)
    """kills of SMAC, of PEARL and of meta-BC"""
    seed: int = 0
    """seed of the moments"""
    out: str = "benchmark/results/robustness/kill.md"
    """where the result goes"""


def start(script, flags, log):
    """Fork a run; its process id. Both output streams go to the file `log`."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        torch.set_num_threads(1)
        script.main(script.parse_args(flags))
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def wait(pid, until=lambda: False):
    """Wait for the end of a process, or until something holds; whether the process has ended. Raises if it failed."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a run failed with status {status}")
            return True
        if until():
            return False
        time.sleep(0.0002)


def content(run):
    """What two equal runs share: parts of the checkpoint, points of the curves, eval.csv."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    kept = {name: state[name] for name in state if name not in ("args", "buffer")}
    kept |= {"fields": state["buffer"]["fields"], "sizes": state["buffer"]["sizes"]}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    kept["curves"] = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    return kept | {"eval.csv": (run / "eval.csv").read_bytes()}


def same(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def kill(name, kills, rng, folder):
    """Kill and resume runs of one script.

    Returns:
        Counter of (progress bar, moment) of the kills; for each run that ended, whether it equals one never killed.
    """
    script = importlib.import_module(name)
    script.EVAL_REPEATS, script.TRAIN_EVAL_TASKS, script.LOG_EVERY = 1, 3, 10
    envs.SPECS["PointDirection"] = dataclasses.replace(SPEC, num_train_tasks=TASKS, num_test_tasks=TEST_TASKS)
    log, flags = folder / "log", FLAGS[name].split()
    if hasattr(script.Args, "dataset"):
        data = buffers.load_dataset(ROOT / "datasets" / "PointDirection.npz", "PointDirection", SPEC)
        rl = [entry for entry in data["rl"] if entry[0] < TASKS]
        tasks = data["train_tasks"][:TASKS], data["test_tasks"][:TEST_TASKS]
        buffers.save_dataset(folder / "small.npz", "PointDirection", *tasks, rl, [], data["command"])
        flags += ["--dataset", str(folder / "small.npz")]
    began = time.time()
    wait(start(script, [*flags, "--run-dir", str(folder / "whole")], log))
    duration, whole = time.time() - began, folder / "whole" / f"PointDirection__{name}__1"
    expected, counts, equal = content(whole), Counter(), []
    while True:
        run = folder / str(len(equal)) / whole.name
        temporary = run / "checkpoint.tmp"
        temporary.unlink(missing_ok=True)  # what an earlier kill left: from now on it means a write that goes on
        fresh, resumed = [*flags, "--run-dir", str(run.parent)], ["--resume", str(run)]
        pid = start(script, resumed if (run / "checkpoint.pt").exists() else fresh, log)
        moment = time.time() + rng.uniform(0, 0.7 * duration)
        in_write, left = rng.random() < 0.5, kills - counts.total()
        if wait(pid, lambda: left and time.time() > moment and (not in_write or temporary.exists())):
            equal.append(same(content(run), expected))
            if not left:
                return counts, equal
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            bars = re.findall(r"([\w -]+): +\d+%", log.read_text()) or ["start"]
            counts[bars[-1], "within the write of a checkpoint" if temporary.exists() else "elsewhere"] += 1


def main(args):
    importlib.import_module("torch._dynamo")  # Adam imports it: once here, and not in each fork
    rng, lines = np.random.default_rng(args.seed), ["| script | phase | moment | kills |", "|---|---|---|---|"]
    ended = []
    for (name, flags), kills in zip(FLAGS.items(), args.kills):
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                counts, equal = kill(name, kills, rng, Path(folder))
            lines += [f"| {name}.py | {bar} | {moment} | {n} |" for (bar, moment), n in sorted(counts.items())]
            result = f"{kills} kills, {len(equal)} runs to their end, {sum(equal)} of them equal, bit for bit, to one"
            ended.append(f"- {name}.py: {result} that was never killed; `{flags}`")
            print(ended[-1], flush=True)
            if not all(equal):
                sys.exit(f"{name}.py: {equal.count(False)} of {len(equal)} runs differ")
    text = f"`python benchmark/kill.py --kills {' '.join(map(str, args.kills))} --seed {args.seed}`\n\n"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(text + "\n".join([*ended, "", *lines]) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
