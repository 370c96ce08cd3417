"""Memory of a replay buffer with a dataset in it, against the number of tasks: python benchmark/robustness/memory.py

500,000 transitions of 20 numbers and actions of 6, in trajectories of 50 steps, spread over 10, 100 and 1000 tasks, in
a process each; writes benchmark/results/memory.md. Resident memory is measured before the data are made, with the data,
with the buffer of `buffers.from_dataset` beside them, and with one to which the same trajectories were added one after
another, as a run does. What glibc keeps of freed blocks is given back before.
"""

import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import buffers
import plumbing.machine

TASKS, TRANSITIONS, OBS_DIM, ACTION_DIM, STEPS = (
    (10, 100, 1000),
    500_000,
    20,
    6,
    50,
)  # sizes of CheetahVelocity
MIB = 2**20


def resident():
    """Memory of this process now, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def measure(num_tasks):
    """Numbers of one row of the table, in MiB."""
    empty, rng = resident(), np.random.default_rng(0)
    shapes = {
        "obs": (STEPS + 1, OBS_DIM),
        "actions": (STEPS, ACTION_DIM),
        "rewards": (STEPS,),
        "terminals": (STEPS,),
    }
    columns = {
        name: rng.random((TRANSITIONS // STEPS, *shape), np.float32)
        for name, shape in shapes.items()
    }
    paths = [
        {name: column[i] for name, column in columns.items()} for i in range(TRANSITIONS // STEPS)
    ]
    entries = [(i % num_tasks, path) for i, path in enumerate(paths)]
    data = resident()
    dataset = {"train_tasks": np.zeros((num_tasks, 1)), "rl": entries, "encoder": []}
    buffer = buffers.from_dataset(dataset, "CheetahVelocity")
    assert buffer.used == TRANSITIONS and int(buffer.sizes["rl"].sum()) == TRANSITIONS
    peak, at_once = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - empty,
        resident() - data,
    )
    del buffer
    data, buffer = resident(), buffers.ReplayBuffer(num_tasks, OBS_DIM, ACTION_DIM, TRANSITIONS)
    for i in rng.permutation(len(entries)):
        buffer.add(*entries[i])
    return [data - empty, at_once, peak, resident() - data]


def main():
    head = [
        "tasks",
        "data (MiB)",
        "buffer (MiB)",
        "peak of both (MiB)",
        "buffer, filled one by one (MiB)",
    ]
    rows = []
    for num_tasks in TASKS:
        words = [sys.executable, __file__, str(num_tasks)]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        rows.append([f"{num_tasks:,}", *(f"{value:.0f}" for value in found)])
    fields = TRANSITIONS * 4 * (2 * OBS_DIM + ACTION_DIM + 2) / MIB
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    versions = plumbing.machine.versions()
    note = f"""`python benchmark/robustness/memory.py` on {versions["cpu"]}, torch {versions["torch"]}.

A replay buffer of {TRANSITIONS:,} transitions ({OBS_DIM} numbers, actions of {ACTION_DIM}), filled from a dataset:
{fields:.0f} MiB are the transitions themselves, and the index takes 8 bytes of each, at most 32 after it has grown.
At the peak all trajectories are joined to one, once."""
    (Path(__file__).parents[1] / "results" / "memory.md").write_text(
        "\n".join([note, "", *lines, ""])
    )
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        main()
