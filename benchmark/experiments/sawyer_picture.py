"""Draw training tasks (blue) and test tasks (orange), as in Figure 4: python benchmark/experiments/sawyer_picture.py

Writes benchmark/results/sawyer/tasks.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import envs
import sawyer

if __name__ == "__main__":
    spec, env = (
        envs.SPECS["SawyerManipulation"],
        envs.make("SawyerManipulation", render_mode="rgb_array"),
    )
    tasks = envs.sample_tasks("SawyerManipulation", spec.num_train_tasks + spec.num_test_tasks)
    figure, axes = plt.subplots(2, 3, figsize=(9, 5))
    for row, color, shown in zip(axes, ("tab:blue", "tab:orange"), (tasks[:3], tasks[-3:])):
        for axis, task in zip(row, shown):
            env.unwrapped.set_task(task)
            env.reset(seed=0)
            axis.imshow(env.render())
            axis.set(xticks=[], yticks=[], title=sawyer.BEHAVIOURS[int(task[-1])].replace("_", " "))
            plt.setp(axis.spines.values(), color=color, linewidth=4)
    figure.tight_layout()
    figure.savefig(ROOT / "benchmark" / "results" / "sawyer" / "tasks.png", dpi=80)
