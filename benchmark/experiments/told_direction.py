"""Can a policy follow its task on the data of make_told.py? python benchmark/experiments/told_direction.py DATASET

Behaviour cloning of HumanoidDirection's data, told the task's true direction in place of z: what a
policy can learn of them whatever encoder, decoder and Q-functions do. What it reads and how large it
is change from row to row. Then it plays an episode in each training task, with its best actions.
Writes benchmark/results/told/direction.md.
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
from plumbing.flags import launch_tool

ENV_ID = "HumanoidDirection"
STEPS = 20_000
TASKS = 4  # in a batch, and 64 transitions of each, as in SMAC with --preset short
TRANSITIONS = 64
SEEDS = 1, 2, 3
SEEN = 45  # position and velocity; the other numbers are inertias, velocities of bodies, torques
OUT = ROOT / "benchmark" / "results" / "told" / "direction.md"
SMALL = (128, 128), 1e-3  # hidden sizes and learning rate of --preset short, and the paper's
LARGE = (300, 300, 300), 3e-4
ROWS = {  # in words: numbers that it reads, whether they are scaled, network, whether told as by a z
    "all 376 numbers": (376, False, SMALL, False),
    "all 376, scaled": (376, True, SMALL, False),
    "position and velocity": (SEEN, False, SMALL, False),
    "position and velocity, scaled": (SEEN, True, SMALL, False),
    "the same, told with the noise of a z": (SEEN, True, SMALL, True),
    "the same, the paper's network": (SEEN, True, LARGE, True),
}


def told(directions, as_z, generator):
    """What the policy reads as z (T, 5): the direction and three numbers, which are 0 or noise.

    as_z: with the noise that a z drawn from SMAC's posterior has on these data.
    """
    rest = torch.zeros(len(directions), 3)
    if as_z:
        noise = torch.randn(directions.shape, generator=generator)
        directions = directions + 0.2 * noise
        rest = torch.randn(rest.shape, generator=generator)
    return torch.cat([directions, rest], dim=1)


def train(buffer, directions, scale, numbers, network, as_z, seed):
    """A policy after STEPS gradient steps of behaviour cloning."""
    hidden, lr = network
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = smac.Policy(numbers, envs.lookup(ENV_ID).action_dim, hidden, 5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)
    for _ in range(STEPS):
        tasks = torch.randperm(len(directions), generator=generator)[:TASKS]
        batch = buffer.sample(tasks, TRANSITIONS, generator)
        z = told(directions[tasks], as_z, generator).repeat_interleave(TRANSITIONS, 0)
        mean, log_std = policy(scale(batch["obs"].flatten(0, 1))[:, :numbers], z)
        u = torch.atanh(batch["actions"].flatten(0, 1))
        loss = -smac.tanh_gaussian_log_prob(u, mean, log_std).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@torch.no_grad()
def play(policy, angles, scale, numbers, as_z, seed):
    """An episode in each task: (steps up, velocity along the task in m/s, return), means."""
    env = envs.make(ENV_ID)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, angle in enumerate(angles):
        env.unwrapped.set_task([angle])
        direction = torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float32)
        z = told(direction, as_z, generator)
        obs, _ = env.reset(seed=number)
        along = []
        total = 0.0
        done = False
        while not done:
            mean, _ = policy(scale(torch.from_numpy(obs)[None])[:, :numbers], z)
            obs, reward, terminated, truncated, info = env.step(torch.tanh(mean)[0].numpy())
            along.append(info["reward_forward"] / 1.25)
            total += reward
            done = terminated or truncated
        rows.append((len(along), np.mean(along), total))
    return np.mean(rows, axis=0)


@dataclasses.dataclass
class Args:
    dataset: tyro.conf.Positional[Path]  # as make_told.py writes it


def main(cli):
    """Train, play, write the table. Raises InputError."""
    torch.set_num_threads(1)
    dataset = buffers.load_dataset(ENV_ID, cli.dataset)
    buffer = buffers.from_dataset(dataset, ENV_ID)
    angles = dataset["train_tasks"][:, 0]
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    directions = torch.tensor(circle, dtype=torch.float32)
    obs = torch.tensor(np.concatenate([path["obs"] for _, path in dataset["rl"]]))
    mean = obs.mean(0)
    std = obs.std(0) + 1e-3  # some numbers never change

    lines = ["| the policy reads | steps up | m/s along the task | return |", "| --- " * 4 + "|"]
    for words, (numbers, scaled, network, as_z) in ROWS.items():
        scale = (lambda x: (x - mean) / std) if scaled else (lambda x: x)
        results = []
        for seed in SEEDS:
            policy = train(buffer, directions, scale, numbers, network, as_z, seed)
            results.append(play(policy, angles, scale, numbers, as_z, seed))
        cells = []
        for values, digits in zip(np.transpose(results), (0, 2, 0)):
            mean_of, low, high = (f"{f(values):.{digits}f}" for f in (np.mean, np.min, np.max))
            cells.append(f"{mean_of} ({low} to {high})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    command = f"`python benchmark/experiments/told_direction.py {cli.dataset}`"
    steps = f"{STEPS:,} gradient steps of behaviour cloning, an episode in each of 50 tasks"
    head = f"{command}: {steps}; {len(SEEDS)} seeds, their mean and (lowest to highest)."
    OUT.write_text("\n".join([head, "", *lines, ""]))


if __name__ == "__main__":
    launch_tool(main, Args)
