"""Make a Sawyer dataset (Section 6): python datasets/make_sawyer.py [SawyerManipulation8] [NUMBER_OF_TASKS]

A script that does not know the rewarded behaviour acts in each of 50 training tasks, for 50 trajectories of 75 steps.
With another number of tasks, which are then others, the trajectories of a task are fewer or more, so that there are as
many transitions. There are only a few hundred tasks, so that two draws are often the same: there the test tasks are the
first that differ, and the training tasks the next that are none of these. Two processes share the tasks; what they write
does not depend on that.
"""

import dataclasses
import multiprocessing
import sys
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sawyer_policy import SawyerPolicy

import buffers
import envs
import sawyer
from plumbing.flags import launch_tool

TRAJECTORIES = 50  # of a task
STEPS = 75  # of a trajectory; by Table 2 3750 transitions a task
MOST_TASKS = 50 * TRAJECTORIES  # with more there is no trajectory for each


def collect(env_id, number, task, trajectories=TRAJECTORIES):
    """The trajectories of one task, a list of (task number, trajectory)."""
    env = envs.make(env_id).unwrapped  # goes on beyond the horizon
    rng = np.random.default_rng(number)
    entries = []
    env.set_task(task)
    for trajectory in range(trajectories):
        obs, _ = env.reset(seed=TRAJECTORIES * number + trajectory)
        policy = SawyerPolicy(env, rng)
        path = {"obs": [obs], "actions": [], "rewards": [], "terminals": []}
        for _ in range(STEPS):
            action = policy()
            obs, reward, terminated, _, _ = env.step(action)
            for key, value in zip(path, (obs, action, reward, terminated)):
                path[key].append(value)
        entries.append((number, {key: np.array(values) for key, values in path.items()}))
    env.close()
    return entries


def draw_tasks(env_id, number=None):
    """Training tasks, `number` of them, and test tasks, of which none is a training task."""
    spec = envs.lookup(env_id)
    tasks = envs.sample_tasks(env_id, spec.num_train_tasks + spec.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    if number:
        drawn = envs.sample_tasks(env_id, 10 * number, seed=1)
        _, firsts = np.unique(drawn, axis=0, return_index=True)
        test_tasks = drawn[np.sort(firsts)[: spec.num_test_tasks]]
        is_test_task = (drawn[:, None] == test_tasks).all(2).any(1)  # (10 * number,)
        train_tasks = drawn[~is_test_task][:number]
    return train_tasks, test_tasks


@dataclasses.dataclass
class Args:
    env_id: tyro.conf.Positional[Literal["SawyerManipulation", "SawyerManipulation8"]] = (
        "SawyerManipulation"
    )
    number: tyro.conf.Positional[Optional[int]] = None  # of training tasks, in place of 50


def main(args):
    """Write the dataset. Raises InputError."""
    if args.number is not None and not 1 <= args.number <= MOST_TASKS:
        raise buffers.InputError(
            f"the number of tasks is {args.number}, expected 1 to {MOST_TASKS}"
        )
    train_tasks, test_tasks = draw_tasks(args.env_id, args.number)
    trajectories = TRAJECTORIES * envs.lookup(args.env_id).num_train_tasks // len(train_tasks)
    with multiprocessing.Pool(2) as pool:
        jobs = [(args.env_id, i, task, trajectories) for i, task in enumerate(train_tasks)]
        parts = pool.starmap(collect, jobs, chunksize=1)
    entries = [entry for part in parts for entry in part]
    file = Path(__file__).parent / f"{args.env_id}{args.number or ''}.npz"
    command = " ".join(["python datasets/make_sawyer.py", *sys.argv[1:]])
    buffers.save_dataset(file, args.env_id, train_tasks, test_tasks, entries, [], command)
    # The share of a task's steps in which its behaviour is achieved, (tasks,)
    solved = np.array([np.mean([path["rewards"] == 0 for _, path in part]) for part in parts])
    print(f"{file.name}: {len(entries)} trajectories, reward 0 in {solved.mean():.1%} of the steps")
    for behaviour in np.unique(train_tasks[:, -1]).astype(int):
        of = train_tasks[:, -1] == behaviour
        print(f"  {sawyer.BEHAVIOURS[behaviour]}: {of.sum()} tasks, {solved[of].mean():.1%}")


if __name__ == "__main__":
    launch_tool(main, Args)
