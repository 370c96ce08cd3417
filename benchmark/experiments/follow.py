"""Does a Humanoid walk where it infers to? python benchmark/experiments/follow.py AGENT [--dataset FILE]

HumanoidDirection pays 5 for a step in which it is up, and 1.25 for a m/s along the task, so that a
return tells how long it was up. This measures the velocity, a mean over an episode's steps: with z from
the agent's own exploration, from that of another task, from the prior; and on training tasks with z
from the data. And does z know the task? A linear map of posterior means to directions is fitted to
histories of the data, and applied to those of its own exploration: the mean cosine between that
direction and the task's. Adds a line for each agent in the file to
benchmark/results/told/following.md.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import envs
from benchmark import watch
from plumbing.flags import launch_tool

EPISODES = 16  # of each test task
HISTORIES = 8  # of each training task, to which the linear map is fitted
OUT = ROOT / "benchmark" / "results" / "told" / "following.md"
COLUMNS = "run", "gradient step", "own context", "another task's", "the prior", "steps up"
COLUMNS += (
    "training tasks, own context",
    "training tasks, the data's",
    "training tasks, another's data",
    "cosine, the data's",
    "cosine, own",
)


@dataclasses.dataclass
class Args:
    agent: tyro.conf.Positional[Path]  # an agent file of benchmark/agents.py, of SMAC
    dataset: Optional[Path] = None  # the dataset of its run
    env_id: Optional[str] = None  # module:Name, if it is of a family of one's own


def along(paths, angles):
    """The mean velocity along the task of each of E trajectories, (E,) in m/s."""
    column, _ = envs.HumanoidDirection.ground_velocity
    velocities = np.stack([path["obs"][1:, column : column + 2].mean(0) for path in paths])
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (velocities * directions).sum(1)


def in_words(values):
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def on_test_tasks(script, agent, args, tasks, rng):
    """The cells of the test tasks."""
    evaluation = envs.make_evaluation(args.env_id, tasks, tasks, 1, len(tasks), EPISODES)
    numbers, env_list = evaluation["test"]
    angles = tasks[numbers, 0]
    own, _, posterior = watch.meta_episode(script, agent, args, env_list, rng)
    anothers = [part.roll(EPISODES, 0) for part in posterior]  # tasks stand together
    cells = [in_words(along(own, angles))]
    for z in (anothers, script.prior(len(env_list), args, "cpu")):
        paths = script.rollout(env_list, agent, *z, rng, deterministic=True)
        cells.append(in_words(along(paths, angles)))
    cells.append(f"{np.mean([len(path['actions']) for path in own]):.0f}")
    return cells


@torch.no_grad()
def on_training_tasks(script, agent, args, dataset, rng):
    """The cells of the training tasks, of which there are offline data."""
    tasks = dataset["train_tasks"]
    buffer = buffers.from_dataset(dataset, args.env_id)
    posteriors = []
    for _ in range(HISTORIES):
        history = buffer.sample(torch.arange(len(tasks)), args.context_batch, rng, "offline")
        posteriors.append(agent.encoder(script.make_context(history, args)))
    posterior = posteriors[0]
    env_list = []
    for task in tasks:
        env_list.append(envs.make(args.env_id))
        env_list[-1].unwrapped.set_task(task)
    own, _, own_posterior = watch.meta_episode(script, agent, args, env_list, rng)
    cells = [in_words(along(own, tasks[:, 0]))]
    for shift in (0, 1):
        z = [part.roll(shift, 0) for part in posterior]
        paths = script.rollout(env_list, agent, *z, rng, deterministic=True)
        cells.append(in_words(along(paths, tasks[:, 0])))
    cells += cosines([mu for mu, _ in posteriors], own_posterior[0], tasks[:, 0])
    return cells


def cosines(means, own_means, angles):
    """How well posterior means (N, dz) give the direction of N tasks: of the data, of own context."""
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # (N, 2)
    with_one = [np.column_stack([mu, np.ones(len(mu))]) for mu in [*means, own_means]]
    of_data = np.concatenate(with_one[:-1])
    weights, *_ = np.linalg.lstsq(of_data, np.tile(directions, (len(means), 1)), rcond=None)
    cells = []
    for rows in (with_one[0], with_one[-1]):
        guesses = rows @ weights
        cosine = (guesses * directions).sum(1) / np.linalg.norm(guesses, axis=1)
        cells.append(in_words(cosine))
    return cells


def main(options):
    """Add the lines. Raises InputError."""
    script, args, tasks, agents = watch.load(options.agent, options.env_id, options.dataset)
    dataset = watch.load_dataset(options.agent, args.env_id, options.dataset)
    lines = []
    if not OUT.exists():
        lines += [
            "Velocity along the task, m/s, in the third episode, with z from these contexts; and"
        ]
        lines += [
            "the cosine between the task and the direction that z holds. ± is the standard error"
        ]
        lines += [f"over {EPISODES} meta-episodes on each test task, or over training tasks.", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for step, agent in agents.items():
        rng = torch.Generator().manual_seed(args.seed)
        cells = [watch.name_in_tables(options.agent), str(step)]
        cells += on_test_tasks(script, agent, args, tasks, rng)
        cells += on_training_tasks(script, agent, args, dataset, rng)
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1])
    with open(OUT, "a") as file:
        file.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    launch_tool(main, Args)
