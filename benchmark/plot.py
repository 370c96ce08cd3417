"""Learning curve and table of a benchmark: python benchmark/plot.py point_direction

Reads benchmark/results/{name}/{label}__{seed}.csv and .json, the eval.csv and args.json of its runs; writes curve.png and
table.md beside them. A line is the mean over seeds, the band its standard deviation. "Data" is the mean return of the
trajectories in the offline dataset (where a task's data begin within a trajectory, of what is left of it).
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs

RESULTS = Path(__file__).resolve().parent / "results"
GROUPS = {("test", "online"): "-", ("train", "online"): "--", ("train", "offline"): ":"}  # what is measured: line style
COLOURS = {"smac": "tab:red", "smac_goal_data": "tab:blue", "smac_goal_data_slow": "tab:cyan"}  # others black


def read(file):
    """eval.csv -> {(split, context): {(gradient step, transitions): mean over tasks}}, steps in order."""
    cells = defaultdict(lambda: defaultdict(list))
    with open(file, newline="") as lines:
        for row in csv.DictReader(lines):
            at = (int(row["gradient_step"]), int(row["env_steps"]))
            cells[row["split"], row["context"]][at].append(float(row["return"]))
    return {group: {at: np.mean(values) for at, values in steps.items()} for group, steps in cells.items()}


def data_return(file):
    """Mean return of the trajectories that a run was given, from its args.json; empty for a run without a dataset."""
    args = json.loads(file.read_text())
    if "dataset" not in args:
        return ""
    root, env_id = RESULTS.parent.parent, args["env_id"]
    dataset = buffers.load_dataset(root / (args["dataset"] or f"datasets/{env_id}.npz"), env_id, envs.SPECS[env_id])
    return f"{np.mean([path['rewards'].sum() for _, path in dataset['rl']]):.1f}"


def main(name):
    folder = RESULTS / name
    runs = defaultdict(list)
    for file in sorted(folder.glob("*.csv")):
        runs[file.stem.rsplit("__", 1)[0]].append(read(file))
    if not runs:
        print(f"error: there are no results in {folder}: run benchmark/run.py {name}", file=sys.stderr)
        sys.exit(2)
    figure, axes = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.4), sharey=True, squeeze=False)
    lines = ["| run | seeds | data | measured on | after the offline phase | at the end |", "|---|---|---|---|---|---|"]
    for axis, (label, seeds) in zip(axes[0], runs.items()):
        for group, style in GROUPS.items():
            if group not in seeds[0]:
                continue
            steps = sorted(set.intersection(*(set(at[0] for at in seed[group]) for seed in seeds)))
            by_step = [{at[0]: value for at, value in seed[group].items()} for seed in seeds]
            values = np.array([[seed[step] for step in steps] for seed in by_step])  # (seeds, steps)
            mean, std = values.mean(0), values.std(0)
            axis.plot(steps, mean, style, color=COLOURS.get(label, "black"), label=f"{group[0]} tasks, {group[1]} context")
            axis.fill_between(steps, mean - std, mean + std, color=COLOURS.get(label, "black"), alpha=0.12, linewidth=0)
            offline = [at[0] for at in seeds[0][group] if at[1] == 0]
            switch = steps.index(max(offline)) if offline else None
            before = f"{mean[switch]:.1f} ± {std[switch]:.1f}" if offline else ""
            what = f"{len(seeds)} | {data_return(folder / f'{label}__1.json')} | {group[0]} tasks, {group[1]} context"
            lines.append(f"| {label} | {what} | {before} | {mean[-1]:.1f} ± {std[-1]:.1f} |")
        if offline and switch < len(steps) - 1:
            axis.axvline(steps[switch], color="grey", linewidth=0.8)  # here the self-supervised phase begins
        axis.set(title=label, xlabel="gradient step")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("post-adaptation return")
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=110)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "point_direction")
