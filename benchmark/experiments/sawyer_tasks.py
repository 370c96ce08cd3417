"""Do more training tasks help on new ones? python benchmark/experiments/sawyer_tasks.py

Eq. 3 alone, as in sawyer_kl.py and with the preset's KL weight, on the dataset (50 tasks of 50 trajectories) and on
about as many transitions from four times as many tasks (200 of 12), SawyerManipulation200.npz. Both are measured on the
dataset's 10 test tasks, whose data are collected here; those of the 200 that are one of them are left out. Writes
benchmark/results/sawyer/tasks.md.
"""

import numpy as np
import torch
from sawyer_kl import (
    ENV_ID,
    ROOT,
    SEED,
    SPEC,
    STEPS,
    buffers,
    make_sawyer,
    matmul_precision,
    measure,
    smac,
    train,
)

MORE_TASKS = ROOT / "datasets" / "SawyerManipulation200.npz"


def fill(tasks, first, trajectories):
    """A buffer of the script's data in some tasks; `first` is the number of the first of them, which seeds its data."""
    buffer = buffers.ReplayBuffer(
        len(tasks), SPEC.obs_dim, SPEC.action_dim, len(tasks) * trajectories * 75
    )
    for i, task in enumerate(tasks):
        for _, path in make_sawyer.collect(ENV_ID, first + i, task, trajectories):
            buffer.add(i, path)
    return buffer


def without(dataset, tasks):
    """A dataset without those of its training tasks that are among `tasks`."""
    is_kept = ~(dataset["train_tasks"][:, None] == tasks).all(2).any(1)  # (N,)
    numbers = is_kept.cumsum() - 1  # of the tasks that are kept
    paths = [(numbers[task], path) for task, path in dataset["rl"] if is_kept[task]]
    return dataset | {"train_tasks": dataset["train_tasks"][is_kept], "rl": paths}


if __name__ == "__main__":
    torch.set_float32_matmul_precision(matmul_precision(torch.device("cpu"), 1024, 200))
    dataset = buffers.load_dataset(ENV_ID)
    few = buffers.from_dataset(dataset, ENV_ID)
    more = without(buffers.load_dataset(ENV_ID, MORE_TASKS), dataset["test_tasks"])
    many = buffers.from_dataset(more, ENV_ID)
    unseen = fill(dataset["test_tasks"], SPEC.num_train_tasks, 50)
    kl_coef = smac.PRESETS[ENV_ID]["kl_coef"]
    figures = ("KL", "decoder loss", "decoder loss over variance")
    head = [
        "training tasks",
        *(f"{name}, {split} tasks" for split in ("training", "test") for name in figures),
    ]
    lines = [head, ["---"] * len(head)]
    for seen in (few, many):
        agent, args = train(seen, kl_coef)
        figures = np.concatenate([measure(agent, seen, args), measure(agent, unseen, args)])
        lines.append([str(len(seen.sizes["rl"])), *(f"{figure:.3f}" for figure in figures)])
        print(*lines[-1], flush=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"Seed {SEED}, {STEPS} gradient steps of Eq. 3, KL weight {kl_coef:.3g}.\n\n{table}\n"
    (ROOT / "benchmark" / "results" / "sawyer" / "tasks.md").write_text(text)
