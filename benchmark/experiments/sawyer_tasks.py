"""Do more training tasks help on new ones? python benchmark/experiments/sawyer_tasks.py

Eq. 3 alone, as in sawyer_kl.py and with the preset's KL weight, on the dataset (50 tasks of 50 trajectories) and on
about as many transitions from four times as many tasks (200 of 12), SawyerManipulation200.npz. Both are measured on the
same 10 test tasks, whose data are collected here. Writes benchmark/results/sawyer/tasks.md.
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


if __name__ == "__main__":
    torch.set_float32_matmul_precision(matmul_precision(torch.device("cpu"), 1024, 200))
    dataset = buffers.load_dataset(ENV_ID)
    few = buffers.from_dataset(dataset, ENV_ID)
    many = buffers.from_dataset(buffers.load_dataset(ENV_ID, MORE_TASKS), ENV_ID)
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
