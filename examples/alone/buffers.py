"""The data, the replay buffer, and a run that counts gradient steps and prints returns."""

from collections import namedtuple

import numpy as np
import torch
import tyro

import envs

Evaluation = namedtuple("Evaluation", "split context tasks final exploration kl", defaults=[None])


class ReplayBuffer:
    """All transitions in one table, and for each task the lists of its rows."""

    device = torch.device("cpu")

    def __init__(self, num_tasks, *sizes_and_device):  # it grows as it needs to, on the CPU
        self.trajectories = []
        self.rows = {}
        for source in ("rl", "encoder", "offline"):
            self.rows[source] = [[] for _ in range(num_tasks)]

    @property
    def sizes(self):
        sizes = {}
        for source, lists in self.rows.items():
            sizes[source] = torch.tensor([len(rows) for rows in lists])
        return sizes

    def add(self, task, path, encoder=True):
        self.trajectories.append(path)
        self.fields = join(self.trajectories)
        new_rows = range(len(self.fields["obs"]))[-len(path["actions"]) :]
        self.rows["rl"][task] += new_rows
        if encoder:
            self.rows["encoder"][task] += new_rows

    def clear_encoder(self, task):
        self.rows["encoder"][task] = []

    def sample(self, tasks, n, generator, source="rl"):
        """n random transitions of each of T tasks: {name: (T, n, .)}."""
        drawn = []
        for task in tasks:
            rows = torch.tensor(self.rows[source][task])
            drawn.append(rows[torch.randint(len(rows), (n,), generator=generator)])
        drawn = torch.stack(drawn)  # (T, n)
        return {name: field[drawn] for name, field in self.fields.items()}

    def offline_paths(self, task):
        return []  # they would only be drawn


def join(paths, device="cpu"):
    """All transitions of some trajectories: {name: (N, .)}."""
    columns = {"obs": [path["obs"][:-1] for path in paths]}
    columns["next_obs"] = [path["obs"][1:] for path in paths]
    for name in ("actions", "rewards", "terminals"):
        columns[name] = [path[name] for path in paths]
    for name, parts in columns.items():
        column = torch.tensor(np.concatenate(parts), dtype=torch.float32)
        columns[name] = column.reshape(len(column), -1)
    return columns


def load_dataset(env_id, file=None):
    """Your data: trajectories of each training task. Here the ball is pushed at random."""
    tasks = envs.sample_tasks(env_id, envs.SIZES.num_train_tasks + envs.SIZES.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [envs.SIZES.num_train_tasks])
    env = envs.make(env_id)
    rng = torch.Generator().manual_seed(0)
    data = []
    for task in list(range(len(train_tasks))) * 5:
        env.unwrapped.set_task(train_tasks[task])
        (path,) = envs.random_episodes([env], rng)
        data.append((task, path))
    return dict(train_tasks=train_tasks, test_tasks=test_tasks, rl=data, encoder=[], sha256="")


def from_dataset(dataset, env_id, device, more_tasks=0, more_steps=0):
    assert not dataset["encoder"], "here the RL data fill both buffers"
    buffer = ReplayBuffer(len(dataset["train_tasks"]) + more_tasks)
    for task, path in dataset["rl"]:
        buffer.add(task, path)
    buffer.rows["offline"] = [list(rows) for rows in buffer.rows["encoder"]]
    return buffer


class Run:
    """Counts, and prints. It writes no file."""

    def __init__(self, args, script, sha256="", **parts):
        self.eval_every = args.eval_every
        self.step = 0
        self.env_steps = 0

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def steps(self, end, name):
        while self.step < end:
            next_step = self.step + 1
            self.evaluation_due = next_step == end or next_step % self.eval_every == 0
            yield self.step
            self.step = next_step

    def count(self, name, values):
        return values

    def fast(self, function, compiled=False):
        return function

    def log(self, info): ...

    def write(self, evaluations, scalars, data=()):
        print(f"step {self.step + 1}, {self.env_steps} new transitions")
        for split, context, _, final, _, _ in evaluations:
            mean = np.mean([path["rewards"].sum() for path in final])
            print(f"    {split} ({context} context): return {mean:.1f}")


def on_cores(function, *arguments, **flags):
    return function(*arguments, **flags)


def choose_device(args):
    return torch.device("cpu")


def launch(main, args_class, presets):
    args = tyro.cli(args_class)
    assert not getattr(args, "save_dataset", None), "nothing here writes a dataset"
    main(args)
