"""Why SMAC's labels fail on HumanoidDirection: python benchmark/experiments/humanoid_labels.py [DATASET OUT]

Trains encoder and decoder alone, by Eq. 3, on three quarters of the trajectories of each task, and compares the decoder
with the true rewards of the others, z being inferred from 64 transitions of these: with the short preset's sizes, then
with one thing changed after another. Writes benchmark/results/short/HumanoidDirection/labels.md. For another dataset
than the shipped one name it, and the file to write.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import envs
import smac_offline_online as smac
from plumbing.flags import preset

ENV_ID, STEPS, SEED, DRAWS = "HumanoidDirection", 15_000, 1, 20
OUT = ROOT / "benchmark" / "results" / "short" / ENV_ID / "labels.md"
SPEC = envs.SPECS[ENV_ID]
ROWS = (  # weight of the KL, what the encoder reads r without, whether z is the true direction, trajectories are dealt
    ("the preset: KL weight .1, the encoder reads r", 0.1, 0.0, False, False),
    ("the same, the task's direction in place of z", 0.1, 0.0, True, False),
    ("KL weight 1/256, the encoder reads r", 1 / 256, 0.0, False, False),
    ("KL weight 1/256, the encoder reads r - 5", 1 / 256, 5.0, False, False),
    ("the same, trajectories dealt to tasks at random", 1 / 256, 5.0, False, True),
)


def deal(entries, tasks):
    """Trajectories of (task number, trajectory) in an order drawn at random, with the rewards of the task where each
    has come to: from the state in each observation, which holds all but the place, MuJoCo steps anew."""
    env = envs.make(ENV_ID)
    env.reset(seed=0)
    order, dealt = np.random.default_rng(SEED).permutation(len(entries)), []
    for (task, _), number in zip(entries, order):
        path = entries[number][1]
        env.unwrapped.set_task(tasks[task])
        rewards = []
        for obs, action in zip(path["obs"].astype(np.float64), path["actions"]):
            env.unwrapped.set_state(np.append([0, 0], obs[:22]), obs[22:45])
            env.unwrapped.data.qacc_warmstart[:] = 0
            rewards.append(env.unwrapped.step(action)[1])
        dealt.append((task, path | {"rewards": np.array(rewards, np.float32)}))
    return dealt


def split(entries):
    """Replay buffers of three quarters of each task's trajectories, and of every fourth."""
    count, parts = {}, ([], [])
    for task, path in entries:
        count[task] = count.get(task, 0) + 1
        parts[count[task] % 4 == 0].append((task, path))
    result = []
    for part in parts:
        size = sum(len(path["actions"]) for _, path in part)
        result.append(
            buffers.ReplayBuffer(SPEC.num_train_tasks, SPEC.obs_dim, SPEC.action_dim, size)
        )
        result[-1].extend(part)
    return result


def draw(buffer, tasks, args, bonus, generator):
    """A batch with histories h, of whose rewards `bonus` is taken."""
    batch = buffer.sample(tasks, args.rl_batch, generator)
    history = buffer.sample(tasks, args.context_batch, generator, "encoder")
    return batch | {
        "context": smac.make_context(history | {"rewards": history["rewards"] - bonus}, args)
    }


def infer(agent, batch, known, noise=0.0):
    """z (T, dz) of a batch's history, or the tasks' directions `known` (T, dz); and the KL to the prior."""
    mu, sigma = agent.encoder(batch["context"])
    kl = smac.kl_to_prior(mu, sigma).mean()
    return mu + sigma * noise if known is None else known, kl


def loss(agent, batch, z):
    """The decoder's squared error of a batch (T, B, ...), z (T, dz)."""
    flat = {name: batch[name].flatten(0, 1) for name in ("obs", "actions")}
    flat["rewards"] = batch["rewards"].flatten()
    return smac.reward_loss(agent, flat, z.repeat_interleave(batch["obs"].shape[1], 0))


@torch.no_grad()
def measure(agent, buffer, args, bonus, directions):
    """KL, and the decoder's squared error over the rewards' variance: of all tasks, DRAWS times."""
    generator, tasks, rows = (
        torch.Generator().manual_seed(SEED),
        torch.arange(SPEC.num_train_tasks),
        [],
    )
    for _ in range(DRAWS):
        batch = draw(buffer, tasks, args, bonus, generator)
        z, kl = infer(agent, batch, directions)
        rows.append((kl.item(), loss(agent, batch, z).item(), batch["rewards"].var().item()))
    kl, error, variance = np.mean(rows, axis=0)
    return kl, error / variance


def train(buffer, args, bonus, directions):
    """Encoder and decoder after STEPS gradient steps of Eq. 3."""
    torch.manual_seed(SEED)
    agent, generator = (
        smac.Agent(SPEC.obs_dim, SPEC.action_dim, args),
        torch.Generator().manual_seed(SEED),
    )
    trained = [*agent.encoder.parameters(), *agent.decoder.parameters()]
    optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True)
    for _ in range(STEPS):
        tasks = torch.randperm(SPEC.num_train_tasks, generator=generator)[: args.meta_batch]
        batch = draw(buffer, tasks, args, bonus, generator)
        noise = torch.randn(args.meta_batch, args.latent_dim, generator=generator)
        z, kl = infer(agent, batch, None if directions is None else directions[tasks], noise)
        optimizer.zero_grad()
        (loss(agent, batch, z) + args.kl_coef * kl).backward()  # Eq. 3
        optimizer.step()
    return agent


if __name__ == "__main__":
    named = sys.argv[1:]
    if len(named) not in (0, 2):
        print("error: name a dataset and the file to write, or neither", file=sys.stderr)
        sys.exit(2)
    out = Path(named[1]) if named else OUT
    dataset = buffers.load_dataset(ENV_ID, named[0] if named else None)
    angles = torch.from_numpy(dataset["train_tasks"][:, 0]).float()
    directions = torch.stack([angles.cos(), angles.sin(), *[0 * angles] * 3], dim=1)  # (tasks, dz)
    head = [
        "",
        *(
            f"{name}, {part}"
            for part in ("trained on", "held out")
            for name in ("KL", "error over variance")
        ),
    ]
    lines = [head, ["---"] * len(head)]
    for name, kl_coef, bonus, known, dealt in ROWS:
        args = preset(smac.Args, smac.PRESETS, ENV_ID, "short")
        args = dataclasses.replace(args, kl_coef=kl_coef)
        seen, unseen = split(
            deal(dataset["rl"], dataset["train_tasks"]) if dealt else dataset["rl"]
        )
        known = directions if known else None
        agent = train(seen, args, bonus, known)
        figures = [
            *measure(agent, seen, args, bonus, known),
            *measure(agent, unseen, args, bonus, known),
        ]
        lines.append([name, *(f"{figure:.2f}" for figure in figures)])
        print(*lines[-1], sep=" | ", flush=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    command = " ".join(["python benchmark/experiments/humanoid_labels.py", *named])
    text = f"`{command}`: seed {SEED}, {STEPS} gradient steps of Eq. 3.\n\n{table}\n"
    out.write_text(text)
