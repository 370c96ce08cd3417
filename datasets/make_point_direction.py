"""Make the two PointDirection datasets: python datasets/make_point_direction.py

A scripted policy heads for a direction near the task's, at a random speed and with noise. Two kinds of data (README.md,
"When it helps"): the direction is off by N(0, 2^2) rad, hence almost any (`PointDirection.npz`, like the data of an
early PEARL run), or by N(0, 0.6^2) rad, hence the task shows in the actions alone (`PointDirectionGoal.npz`).
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs
from plumbing.flags import launch_tool

EPISODES = 6  # of each task
ACTION_NOISE = 0.5
DIRECTION_ERRORS = {"PointDirection": 2.0, "PointDirectionGoal": 0.6}  # rad, standard deviations


def play(env, heading, speed, seed, rng):
    """One trajectory of the scripted policy, as `ReplayBuffer.add` takes it."""
    path = {"obs": [env.reset(seed=seed)[0]], "actions": [], "rewards": [], "terminals": []}
    push = speed * np.array([np.cos(heading), np.sin(heading)])
    truncated = False
    while not truncated:
        action = push + rng.normal(0, ACTION_NOISE, 2)
        action = np.clip(action, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        path["actions"].append(action)
        path["obs"].append(obs)
        path["rewards"].append(reward)
        path["terminals"].append(terminated)
    return {name: np.array(values) for name, values in path.items()}


def make(name, direction_error):
    """Write one dataset."""
    rng = np.random.default_rng(0)
    env = envs.make("PointDirection")
    spec = envs.lookup("PointDirection")
    tasks = envs.sample_tasks("PointDirection", spec.num_train_tasks + spec.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    entries = []
    for task, (angle,) in enumerate(train_tasks):
        env.unwrapped.set_task([angle])
        for episode in range(EPISODES):
            heading = angle + rng.normal(0, direction_error)
            speed = rng.uniform(0.1, 0.8)
            path = play(env, heading, speed, EPISODES * task + episode, rng)
            entries.append((task, path))
    file = Path(__file__).parent / f"{name}.npz"
    command = "python datasets/make_point_direction.py"
    buffers.save_dataset(file, "PointDirection", train_tasks, test_tasks, entries, [], command)
    returns = [path["rewards"].sum() for _, path in entries]
    print(f"{file.name}: {len(entries)} trajectories, mean return {np.mean(returns):.1f}")


@dataclasses.dataclass
class Args:
    pass


def main(args):
    """Write both datasets."""
    for name, direction_error in DIRECTION_ERRORS.items():
        make(name, direction_error)


if __name__ == "__main__":
    launch_tool(main, Args)
