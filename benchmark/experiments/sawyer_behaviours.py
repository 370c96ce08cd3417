"""Which behaviours does a Sawyer agent know? python benchmark/experiments/sawyer_behaviours.py RUN_OR_FILE [--dataset FILE]

Plays meta-episodes of a SMAC or meta-BC agent. For each behaviour, among the meta-episodes in which it is not achieved
from the start: how often it happens in an exploration episode, in any of the two, in the third episode, and in the
third of those meta-episodes whose exploration had it, and had it not. Prints a table in Markdown.
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
import sawyer
from benchmark import watch
from plumbing.flags import launch_tool, print_safely


@dataclasses.dataclass
class Args:
    agent: tyro.conf.Positional[Path]  # folder of a run, or an agent file
    dataset: Optional[Path] = None  # its dataset; default datasets/{env_id}.npz
    train_tasks: int = 20  # training tasks, evenly spaced; of the test tasks all
    episodes: int = 4  # meta-episodes a task


def share(happened, among):
    """The share of some meta-episodes in which something happened, and their number."""
    return f"{happened[among].mean():.2f} ({among.sum()})" if among.any() else ""


def rows(tasks, final, exploration):
    """Cells of the table for each behaviour, from the tasks' behaviours (E,) and the paths of E meta-episodes."""
    third = np.array([(path["rewards"] == 0).any() for path in final])
    each = np.array(
        [[(path["rewards"] == 0).any() for path in pair] for pair in exploration]
    )  # (E, 2)
    start = np.array([path["rewards"][0] == 0 for path in final])
    any_of = each.any(1)
    for behaviour in np.unique(tasks):
        among = (tasks == behaviour) & ~start
        if among.any():
            cells = [share(happened, among) for happened in (each.mean(1), any_of, third)]
            cells += [share(third, among & found) for found in (any_of, ~any_of)]
            yield [sawyer.BEHAVIOURS[behaviour], *cells]


def main(args):
    """Print the table. Raises InputError."""
    script, flags, _, agents = watch.load(args.agent, dataset=args.dataset)
    if not flags.env_id.startswith("Sawyer") or script.__name__ not in (
        "smac_offline_online",
        "meta_bc",
    ):
        raise buffers.InputError(f"{args.agent} is no SMAC or meta-BC agent of a Sawyer family")
    data = watch.load_dataset(args.agent, flags.env_id, args.dataset)
    buffer = buffers.from_dataset(data, flags.env_id)
    pairs = envs.make_evaluation(
        flags.env_id,
        data["train_tasks"],
        data["test_tasks"],
        args.train_tasks,
        repeats=args.episodes,
    )
    head = "step|tasks, context|behaviour|exploration episode|any of two|third episode|third, if so|third, if not"
    print_safely(f"| {' | '.join(head.split('|'))} |\n|{' --- |' * len(head.split('|'))}")
    for step, agent in agents.items():
        rng = torch.Generator().manual_seed(flags.seed)
        for split, (numbers, env_list) in pairs.items():
            final, exploration, *_ = script.adapt(env_list, agent, flags, rng)
            played = {"own": final}
            if split == "train":
                steps = sum(len(path["actions"]) for path in exploration[0])
                h_offline = script.make_context(
                    buffer.sample(numbers, steps, rng, "offline"), flags
                )
                with torch.no_grad():
                    z = agent.encoder(h_offline)
                played["offline"] = script.rollout(env_list, agent, *z, rng, deterministic=True)
            tasks = data[f"{split}_tasks"][numbers, -1].astype(int)
            for context, final in played.items():
                for row in rows(tasks, final, exploration):
                    print_safely(f"| {step} | {split}, {context} | {' | '.join(row)} |")


if __name__ == "__main__":
    launch_tool(main, Args)
