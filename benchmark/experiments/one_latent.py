"""Does it matter whether z is drawn at every step or once an episode, with offline context?

python benchmark/experiments/one_latent.py agents/PointDirection.npz agents/AntDirection.npz

In its evaluations with offline context the authors' code keeps one z ~ q(z | h_offline) for a whole
episode, and in all others it draws a new one at every step; this code draws at every step in all.
For each agent in the files, of the end of each phase, this plays the training tasks of an
evaluation both ways, with the same histories, and writes a table in Markdown.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs
from benchmark import watch
from plumbing.flags import launch_tool


@dataclasses.dataclass
class Args:
    agents: tyro.conf.Positional[tuple[Path, ...]]  # agent files of SMAC or meta-BC
    rounds: int = 8  # histories drawn for each of the 40 environments of an evaluation
    out: Path = ROOT / "benchmark" / "results" / "one_latent.md"


@torch.no_grad()
def play(script, agent, args, dataset, rounds):
    """Returns the returns of both ways, (rounds, E) each."""
    buffer = buffers.from_dataset(dataset, args.env_id)
    train_tasks = dataset["train_tasks"]
    evaluation = envs.make_evaluation(args.env_id, train_tasks, dataset["test_tasks"])
    tasks, env_list = evaluation["train"]
    rng = torch.Generator().manual_seed(args.seed)
    length = 2 * envs.lookup(args.env_id).horizon  # as two episodes to the time limit
    every_step, once = [], []
    for _ in range(rounds):
        h_offline = buffer.sample(tasks, length, rng, "offline")
        mu, sigma = agent.encoder(script.make_context(h_offline, args))
        z = mu + sigma * torch.randn(mu.shape, generator=rng)
        for returns, posterior in ((every_step, (mu, sigma)), (once, (z, torch.zeros_like(z)))):
            paths = script.rollout(env_list, agent, *posterior, rng, deterministic=True)
            returns.append([path["rewards"].sum() for path in paths])
    return np.array(every_step), np.array(once)


def main(cli):
    """Play and write the table. Raises InputError."""
    if not cli.agents:
        raise buffers.InputError("name at least one agent file")
    lines = [
        f"Returns on training tasks with offline context, {cli.rounds} x 40 episodes; ± is the",
        "standard error of the difference over episodes.",
        "",
        "| environment | gradient steps | z at every step | one z an episode | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in cli.agents:
        script, args, _, agents = watch.load(file)
        if script.__name__ not in ("smac_offline_online", "meta_bc"):
            raise buffers.InputError(f"{file} is of {script.__name__}.py, expected SMAC or meta-BC")
        dataset = watch.load_dataset(file, args.env_id)
        for step, agent in agents.items():
            every_step, once = play(script, agent, args, dataset, cli.rounds)
            difference = once - every_step
            error = difference.std(ddof=1) / np.sqrt(difference.size)
            cells = [args.env_id, step, f"{every_step.mean():.1f}", f"{once.mean():.1f}"]
            cells.append(f"{difference.mean():.1f} ± {error:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    cli.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    launch_tool(main, Args)
