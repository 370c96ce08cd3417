"""What the KL weight of Eq. 3 does on SawyerManipulation: python benchmark/experiments/sawyer_kl.py

In SMAC's offline phase encoder and decoder learn from Eq. 3 alone, whatever policy and critic do: here they are
trained without them, for a quarter of that phase. Then z is inferred from 64 transitions of a task, and the decoder
compared with the true rewards of 256 others: on the 50 training tasks, and on the 10 test tasks, where the script of
the dataset acts as well. Writes benchmark/results/sawyer/kl.md.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
import make_sawyer

import buffers
import envs
import smac_offline_online as smac
from plumbing.flags import preset
from plumbing.machine import matmul_precision

ENV_ID, WEIGHTS, STEPS, SEED, DRAWS = (
    "SawyerManipulation",
    (0.1, 0.01, 1 / 256, 0.001),
    12_500,
    1,
    20,
)
SPEC = envs.SPECS[ENV_ID]


@torch.no_grad()
def measure(agent, buffer, args):
    """KL, squared error of the decoder, and that over the reward's variance: means over tasks and over DRAWS draws."""
    generator, tasks = torch.Generator().manual_seed(SEED), torch.arange(buffer.sizes["rl"].numel())
    rows, rewards = [], []
    for _ in range(DRAWS):
        context = smac.make_context(
            buffer.sample(tasks, args.context_batch, generator, "encoder"), args
        )
        mu, sigma = agent.encoder(context)  # (T, dz)
        batch = {
            name: x.flatten(0, 1)
            for name, x in buffer.sample(tasks, args.rl_batch, generator).items()
        }
        batch["rewards"] = batch["rewards"].squeeze(-1)
        z = mu + sigma * torch.randn(mu.shape, generator=generator)
        loss = smac.reward_loss(agent, batch, z.repeat_interleave(args.rl_batch, 0))
        rows.append((smac.kl_to_prior(mu, sigma).mean().item(), loss.item()))
        rewards.append(batch["rewards"])
    kl, loss = np.mean(rows, axis=0)
    return kl, loss, loss / torch.cat(rewards).var().item()


def train(buffer, kl_coef):
    """Encoder and decoder after STEPS gradient steps of Eq. 3."""
    args = dataclasses.replace(preset(smac.Args, smac.PRESETS, ENV_ID), kl_coef=kl_coef, seed=SEED)
    torch.manual_seed(SEED)
    agent = smac.Agent(SPEC.obs_dim, SPEC.action_dim, args)
    trained = [*agent.encoder.parameters(), *agent.decoder.parameters()]
    optimizer, generator = (
        torch.optim.Adam(trained, lr=args.lr, fused=True),
        torch.Generator().manual_seed(SEED),
    )
    for _ in range(STEPS):
        batch = smac.sample_batch(buffer, args, generator)
        mu, sigma = agent.encoder(batch["context"])  # (T, dz)
        z = (mu + sigma * batch["noise_z"]).repeat_interleave(args.rl_batch, dim=0)  # (N, dz)
        batch |= {name: batch[name].flatten(0, 1) for name in ("obs", "actions")}
        batch["rewards"] = batch["rewards"].flatten()
        optimizer.zero_grad()
        (
            smac.reward_loss(agent, batch, z) + kl_coef * smac.kl_to_prior(mu, sigma).mean()
        ).backward()  # Eq. 3
        optimizer.step()
    return agent, args


if __name__ == "__main__":
    torch.set_float32_matmul_precision(matmul_precision(torch.device("cpu"), 1024, 200))
    dataset = buffers.load_dataset(ENV_ID)
    seen = buffers.from_dataset(dataset, ENV_ID)
    unseen = buffers.ReplayBuffer(SPEC.num_test_tasks, SPEC.obs_dim, SPEC.action_dim, 200_000)
    for i, task in enumerate(dataset["test_tasks"]):
        for _, path in make_sawyer.collect(ENV_ID, SPEC.num_train_tasks + i, task):
            unseen.add(i, path)
    figures = ("KL", "decoder loss", "decoder loss over variance")
    head = [
        "kl_coef",
        *(f"{name}, {split} tasks" for split in ("training", "test") for name in figures),
    ]
    lines = [head, ["---"] * len(head)]
    for kl_coef in WEIGHTS:
        agent, args = train(seen, kl_coef)
        figures = [*measure(agent, seen, args), *measure(agent, unseen, args)]
        lines.append([f"{kl_coef:.3g}", *(f"{figure:.3f}" for figure in figures)])
        print(*lines[-1], flush=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"Seed {SEED}, {STEPS} gradient steps of Eq. 3.\n\n{table}\n"
    (ROOT / "benchmark" / "results" / "sawyer" / "kl.md").write_text(text)
