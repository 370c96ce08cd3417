"""Does the encoder read rewards, or where a trajectory went? python benchmark/experiments/told_encoder.py DATASET OUT

Trains encoder and decoder by Eq. 3 on three quarters of each task's trajectories, of a dataset of
humanoid_scaled.py. A linear map of posterior means to the task's direction is fitted to histories of
these. Then z of each other trajectory, read whole: the cosine between the direction that it holds
and the task's, by the cosine between where the trajectory went and the task. An encoder that reads
rewards would know the task of one that went the opposite way, too. OUT is the file to write.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import envs
import smac_offline_online as smac
from benchmark.experiments import humanoid_scaled  # registers the family
from plumbing.flags import launch_tool

ENV_ID = humanoid_scaled.HumanoidScaled.env_id
SPEC = envs.lookup(ENV_ID)
STEPS = 10_000
TASKS = 4  # in a batch, and 64 transitions of each
TRANSITIONS = 64
KL_COEF = 0.001
HISTORIES = 20  # of each task, to which the linear map is fitted
SHORTEST = 60  # steps of a trajectory that is looked at
SEEDS = 1, 2, 3
BOUNDS = -1.0, -0.5, 0.5, 0.9, 1.0  # of the cosine between where it went and the task


def split(entries):
    """Three quarters of each task's trajectories, and every fourth."""
    seen = {}
    kept = []
    held_out = []
    for task, path in entries:
        seen[task] = seen.get(task, 0) + 1
        (held_out if seen[task] % 4 == 0 else kept).append((task, path))
    return kept, held_out


def train(buffer, args, seed):
    """Encoder and decoder after STEPS gradient steps of Eq. 3."""
    torch.manual_seed(seed)
    agent = smac.Agent(SPEC.obs_dim, SPEC.action_dim, args)
    generator = torch.Generator().manual_seed(seed)
    trained = [*agent.encoder.parameters(), *agent.decoder.parameters()]
    optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True)
    for _ in range(STEPS):
        tasks = torch.randperm(SPEC.num_train_tasks, generator=generator)[:TASKS]
        batch = buffer.sample(tasks, TRANSITIONS, generator)
        history = buffer.sample(tasks, TRANSITIONS, generator, "encoder")
        mu, sigma = agent.encoder(smac.make_context(history, args))
        z = mu + sigma * torch.randn(mu.shape, generator=generator)
        flat = {name: batch[name].flatten(0, 1) for name in ("obs", "actions")}
        flat["rewards"] = batch["rewards"].flatten()
        loss = smac.reward_loss(agent, flat, z.repeat_interleave(TRANSITIONS, 0))
        loss = loss + KL_COEF * smac.kl_to_prior(mu, sigma).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return agent


@torch.no_grad()
def linear_map(agent, buffer, directions, args, seed):
    """The least-squares map of (posterior mean, 1) to a direction, (dz + 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(HISTORIES):
        tasks = torch.arange(len(directions))
        history = buffer.sample(tasks, TRANSITIONS, generator, "encoder")
        means.append(agent.encoder(smac.make_context(history, args))[0])
    of_data = with_one(torch.cat(means))
    return np.linalg.lstsq(of_data, np.tile(directions, (HISTORIES, 1)), rcond=None)[0]


def with_one(means):
    return np.column_stack([means, np.ones(len(means))])


@torch.no_grad()
def cosines(agent, entries, directions, weights, args):
    """Of each trajectory the cosine with its task: of where it went, of what z holds. (n, 2)"""
    column, _ = envs.HumanoidDirection.ground_velocity
    rows = []
    for task, path in entries:
        steps = len(path["actions"])
        if steps < SHORTEST:
            continue
        parts = {"obs": path["obs"][:-1], "actions": path["actions"]}
        parts["rewards"] = path["rewards"][:, None]
        history = {name: torch.from_numpy(part)[None] for name, part in parts.items()}
        mu, _ = agent.encoder(smac.make_context(history, args))
        inferred = (with_one(mu) @ weights)[0]
        went = path["obs"][1:, column : column + 2].mean(0)
        rows.append([v @ directions[task] / np.linalg.norm(v) for v in (went, inferred)])
    return np.array(rows)


@dataclasses.dataclass
class Args:
    dataset: tyro.conf.Positional[Path]  # as humanoid_scaled.py writes it
    out: tyro.conf.Positional[Path]  # file to write


def main(cli):
    """Train and write the table. Raises InputError."""
    torch.set_num_threads(1)
    dataset = buffers.load_dataset(ENV_ID, cli.dataset)
    args = smac.Args(encoder_hidden=(128, 128), lr=1e-3)
    angles = dataset["train_tasks"][:, 0]
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kept, held_out = split(dataset["rl"])
    buffer = buffers.from_dataset(dataset | {"rl": kept}, ENV_ID)
    found = []
    for seed in SEEDS:
        agent = train(buffer, args, seed)
        weights = linear_map(agent, buffer, directions, args, seed)
        found.append(cosines(agent, held_out, directions, weights, args))

    head = "cosine of where it went", "trajectories", "cosine of the direction in z"
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- |"]
    for low, high in zip(BOUNDS, BOUNDS[1:]):
        means = []
        for rows in found:
            inside = (low < rows[:, 0]) & (rows[:, 0] <= high)
            means.append(rows[inside, 1].mean())
        spread = f"{np.mean(means):.2f} ({np.min(means):.2f} to {np.max(means):.2f})"
        lines.append(f"| {low} to {high} | {inside.sum()} | {spread} |")
    command = f"`python benchmark/experiments/told_encoder.py {cli.dataset} {cli.out}`"
    method = f"{STEPS:,} gradient steps of Eq. 3; {len(SEEDS)} seeds, their mean and (lowest to highest)."
    cli.out.write_text("\n".join([f"{command}: {method}", "", *lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    launch_tool(main, Args)
