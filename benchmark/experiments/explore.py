"""Does it matter how an agent explores at test time? Prior, random actions, IDAQ, side by side.

python benchmark/experiments/explore.py agents/PointDirection.npz runs/PointDirection__focal__1 --out x.md

Each agent, of SMAC, meta-BC or focal.py, plays meta-episodes on all test tasks, once for each way to
explore (`explore` in focal.py says what they are) and number of exploration episodes, and once with
offline context in ten training tasks, of as many transitions as two episodes to the time limit have
(where robots fall these are more than in the evaluations of a run). This writes a table in Markdown,
by default into benchmark/results/context/, which plot.py puts together with the others there.
Training is not changed by any of it.
"""

import dataclasses
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs
import focal
from benchmark import watch
from plumbing.flags import launch_tool

WAYS = ("prior", "random", "task", "idaq")
RESULTS = ROOT / "benchmark" / "results" / "context"


@dataclasses.dataclass
class Args:
    agents: tyro.conf.Positional[tuple[Path, ...]]  # agent files, or folders of runs
    episodes: tuple[int, ...] = (2, 10)  # numbers of exploration episodes
    rounds: int = 4  # meta-episodes on each test task, at least two
    dataset: Path | None = None  # the dataset of the agents; by default datasets/{env_id}.npz
    out: Path | None = None  # the table; by default explore_{env_id}.md of the first agent


def mean_and_error(returns, rounds):
    """The mean of returns (T * rounds,), and its standard error for these T tasks, as words.

    The error is that over meta-episodes: tasks differ, and are not drawn anew.
    """
    of_tasks = np.array(returns).reshape(-1, rounds)
    error = math.sqrt(of_tasks.var(1, ddof=1).mean() / of_tasks.size)
    return f"{of_tasks.mean():.1f} ± {error:.1f}"


@torch.no_grad()
def play(script, agent, args, tasks, z_train, way, episodes, rounds):
    """Returns of exploration on test tasks, their mean, and of the episode after it, as words."""
    rng = torch.Generator().manual_seed(args.seed)
    evaluation = envs.make_evaluation(args.env_id, tasks, tasks, 1, len(tasks), rounds)
    _, env_list = evaluation["test"]
    setting = (script, agent, args, env_list, rng, z_train, way, episodes)
    exploration, mu, sigma = watch.explore(*setting)
    final = script.rollout(env_list, agent, mu, sigma, rng, deterministic=True)
    explored = [path["rewards"].sum() for paths in exploration for path in paths]
    returns = [path["rewards"].sum() for path in final]
    return f"{np.mean(explored):.1f} → {mean_and_error(returns, rounds)}"


@torch.no_grad()
def play_offline(script, agent, args, dataset, buffer, rounds):
    """Returns on training tasks with z from the dataset, as words."""
    rng = torch.Generator().manual_seed(args.seed)
    train_tasks = dataset["train_tasks"]
    evaluation = envs.make_evaluation(
        args.env_id, train_tasks, dataset["test_tasks"], 10, 1, rounds
    )
    tasks, env_list = evaluation["train"]
    length = 2 * envs.lookup(args.env_id).horizon
    h_offline = buffer.sample(tasks, length, rng, "offline")
    mu, sigma = agent.encoder(script.make_context(h_offline, args))
    if script is focal:
        sigma = torch.zeros_like(mu)
    final = script.rollout(env_list, agent, mu, sigma, rng, deterministic=True)
    return mean_and_error([path["rewards"].sum() for path in final], rounds)


def main(cli):
    """Play and write the table. Raises InputError."""
    if cli.rounds < 2:
        raise buffers.InputError("--rounds must be at least 2: the table has standard errors")
    if not cli.agents:
        raise buffers.InputError("name at least one agent file or folder of a run")
    command = ["python", *sys.argv]
    lines = [
        f"    {shlex.join(command)}",
        "",
        f"Mean returns on all test tasks, {cli.rounds} meta-episodes each: of the exploration",
        "episodes, and of the one after them ± its standard error over meta-episodes, for these",
        "tasks. The last column: training tasks with offline context. A row is one agent, of one",
        "seed of training.",
        "",
    ]
    names = [f"{way}, {number}" for way in WAYS for number in cli.episodes]
    lines.append(f"| agent | gradient steps | {' | '.join(names)} | offline context |")
    lines.append("| --- " * (len(names) + 3) + "|")
    out = cli.out
    for file in cli.agents:
        script, args, tasks, agents = watch.load(file, dataset=cli.dataset)
        if script.__name__ not in watch.CAN_EXPLORE:
            raise buffers.InputError(f"{file} is of {script.__name__}.py, which cannot explore so")
        dataset = watch.load_dataset(file, args.env_id, cli.dataset)
        buffer = buffers.from_dataset(dataset, args.env_id)
        for step, agent in agents.items():
            rng = torch.Generator().manual_seed(args.seed)
            with torch.no_grad():
                z_train = focal.training_z(agent, buffer, args, rng)
            name = "/".join(watch.name_in_tables(file).split("/")[-2:])
            cells = [name, str(step)]
            for way in WAYS:
                for number in cli.episodes:
                    setting = (script, agent, args, tasks, z_train, way, number, cli.rounds)
                    cells.append(play(*setting))
            offline = play_offline(script, agent, args, dataset, buffer, cli.rounds)
            lines.append(f"| {' | '.join(cells)} | {offline} |")
            print(lines[-1], flush=True)
        out = out or RESULTS / f"explore_{args.env_id}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    launch_tool(main, Args)
