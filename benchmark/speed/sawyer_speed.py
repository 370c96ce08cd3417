"""Measure speed and memory of SawyerManipulation: python benchmark/speed/sawyer_speed.py

Writes benchmark/results/sawyer/speed.md. Times are processor times of one process, whatever else the machine does.
"""

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
from sawyer_policy import SawyerPolicy

import envs


def seconds(function, repeats):
    """Mean processor time of function(i)."""
    start = time.process_time()
    for i in range(repeats):
        function(i)
    return (time.process_time() - start) / repeats


def memory():
    """MiB that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def reset(i):
    env.set_task(tasks[i % len(tasks)])
    env.reset(seed=i)


def random_step(i):
    if i % 50 == 0:
        reset(i)
    env.step(actions[i])


def script_step(i):
    global policy
    if i % 75 == 0:
        reset(i)
        policy = SawyerPolicy(env, np.random.default_rng(i))
    env.step(policy())


tasks, actions = (
    envs.sample_tasks("SawyerManipulation", 60),
    np.random.default_rng(0).uniform(-1, 1, (3000, 4)),
)
env = envs.make("SawyerManipulation").unwrapped
reset(0)
rows = [("reset, ms", 1000 * seconds(reset, 200))]
before = memory()
seconds(reset, 1000)
rows += [("MiB more after 1000 resets", memory() - before)]
rows += [("random steps a second, with a reset every 50", 1 / seconds(random_step, 3000))]
rows += [("steps a second of the script, with a reset every 75", 1 / seconds(script_step, 3000))]
before, more = memory(), []
rows += [
    (
        "another environment, ms",
        1000 * seconds(lambda i: more.append(envs.make("SawyerManipulation")), 10),
    )
]
rows += [("MiB for each environment", (memory() - before) / 10)]
table = "\n".join(
    ["| what | value |", "|---|---|", *(f"| {name} | {value:.1f} |" for name, value in rows)]
)
(ROOT / "benchmark" / "results" / "sawyer" / "speed.md").write_text(table + "\n")
print(table)
