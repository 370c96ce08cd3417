"""What Sawyer's tasks are made of: python benchmark/experiments/sawyer_composition.py

For each dataset and its training and test tasks: how many of them differ, what they ask for, what doing
nothing returns, and what the script of the data returns, in the data or, on test tasks, in EPISODES
episodes of each that are played here. Writes benchmark/results/sawyer/composition.md.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
import make_sawyer

import buffers
import envs

FILES = {  # dataset: its family
    "SawyerManipulation": "SawyerManipulation",
    "SawyerManipulation200": "SawyerManipulation",
    "SawyerManipulation8": "SawyerManipulation8",
}
EPISODES = 12  # of the script, on each test task
HEAD = "data", "tasks", "number", "different", "scenes", "scenes with several behaviours"
HEAD += "tasks by behaviour", "doing nothing", "the script"


def return_of_nothing(env_id, task):
    """The return of an episode of zero actions, from one reset."""
    env = envs.make(env_id)
    env.unwrapped.set_task(task)
    env.reset(seed=0)
    rewards = [env.step(np.zeros(4, np.float32))[1] for _ in range(envs.SPECS[env_id].horizon)]
    env.close()
    return sum(rewards)


def mean_return(entries, horizon):
    """The mean over tasks of the mean return of a task's trajectories, up to the horizon."""
    returns = {}
    for task, path in entries:
        returns.setdefault(task, []).append(path["rewards"][:horizon].sum())
    return np.mean([np.mean(values) for values in returns.values()])


def row(env_id, tasks, entries):
    scenes = {}
    for task in tasks.tolist():
        scenes.setdefault(tuple(task[:-1]), set()).add(task[-1])
    shares = np.bincount(tasks[:, -1].astype(int)) / len(tasks)
    nothing = np.mean([return_of_nothing(env_id, task) for task in tasks])
    return (
        len(tasks),
        len(np.unique(tasks, axis=0)),
        len(scenes),
        sum(len(behaviours) > 1 for behaviours in scenes.values()),
        ", ".join(f"{share:.2f}" for share in shares),
        f"{nothing:.1f}",
        f"{mean_return(entries, envs.SPECS[env_id].horizon):.1f}",
    )


if __name__ == "__main__":
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, env_id in FILES.items():
        dataset = buffers.load_dataset(env_id, ROOT / "datasets" / f"{name}.npz")
        played = []
        for i, task in enumerate(dataset["test_tasks"]):
            played += make_sawyer.collect(env_id, len(dataset["train_tasks"]) + i, task, EPISODES)
        for split, entries in (("train", dataset["rl"]), ("test", played)):
            lines.append((name, split, *row(env_id, dataset[f"{split}_tasks"], entries)))
            print(*lines[-1], flush=True)
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    text = f"""`python benchmark/experiments/sawyer_composition.py`: mean returns of 50 steps; behaviours
in the order of `sawyer.BEHAVIOURS`.

{table}
"""
    (ROOT / "benchmark" / "results" / "sawyer" / "composition.md").write_text(text)
