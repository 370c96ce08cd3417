"""Learning curves and table of a benchmark: python benchmark/plot.py point_direction

Reads benchmark/results/{name}/{label}__{seed}.csv and .json, the eval.csv and args.json of its runs; writes curve.png
and table.md beside them. A line is the mean over seeds, the band their standard deviation (n - 1).
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
METHODS = {  # label of a run: its name and colour in every picture
    "smac": ("SMAC", "tab:red"),
    "smac_actor_ablation": ("SMAC (actor ablation)", "tab:blue"),
    "smac_encoder_prior": ("SMAC, encoder buffer grows", "goldenrod"),
    "smac_one_task": ("SMAC, one task an iteration", "mediumpurple"),
    "smac_two_critics": ("SMAC, two critics", "navy"),
    "meta_bc": ("meta behaviour cloning", "tab:brown"),
    "macaw": ("MACAW", "tab:olive"),
    "macaw_matched": ("MACAW, SMAC-matched", "yellowgreen"),
    "borel": ("BOReL", "tab:pink"),
    "borel_matched": ("BOReL, SMAC-matched", "orchid"),
    "pearl": ("Online Oracle (PEARL)", "black"),
    "smac_encoder_q": ("only Q-loss (online & offline)", "dimgray"),
    "smac_encoder_reward_then_q": ("only Q-loss (online)", "tab:cyan"),
    "smac_oracle_rewards": ("true rewards", "tab:gray"),
    "smac_test_tasks": ("explores test tasks", "tab:orange"),
    "smac_test_tasks_oracle_rewards": ("explores test tasks, true rewards", "tab:purple"),
    "smac_goal_data": ("SMAC, goal-directed data", "tab:green"),
    "smac_goal_data_slow": ("SMAC, goal-directed data, lr 3e-4", "darkseagreen"),
}
PANELS = {
    "methods (Figure 5)": "smac smac_actor_ablation meta_bc macaw macaw_matched borel borel_matched pearl",
    "what trains the encoder (Figure 7)": "smac smac_encoder_q smac_encoder_reward_then_q",
    "what enters the encoder buffer": "smac smac_encoder_prior",
    "critics": "smac smac_two_critics",
    "how much it collects": "smac smac_one_task",
    "where it explores (Figure 9)": "smac smac_oracle_rewards smac_test_tasks smac_test_tasks_oracle_rewards",
    "data that give the task away": "smac smac_goal_data smac_goal_data_slow",
}
GROUPS = (("test", "online"), ("train", "online"), ("train", "offline"))  # tasks, context


def read(file):
    """eval.csv -> {(tasks, context): {gradient step: mean return}}, and the last step without new transitions."""
    cells, offline_end = defaultdict(lambda: defaultdict(list)), 0
    with open(file, newline="") as lines:
        for row in csv.DictReader(lines):
            step = int(row["gradient_step"])
            cells[row["split"], row["context"]][step].append(float(row["return"]))
            offline_end = max(offline_end, step) if row["env_steps"] == "0" else offline_end
    curves = {group: {step: np.mean(values) for step, values in steps.items()} for group, steps in cells.items()}
    return curves, offline_end


def data_return(env_id, file):
    """Mean return of the trajectories in a dataset, up to the horizon (where a task's data begin within one, of what is
    left of it)."""
    spec = envs.SPECS[env_id]
    dataset = buffers.load_dataset(RESULTS.parent.parent / file, env_id, spec)
    return np.mean([path["rewards"][: spec.horizon].sum() for _, path in dataset["rl"]])


def main(name):
    folder, runs, ends, files, env_id = RESULTS / name, defaultdict(list), defaultdict(list), {}, ""
    for file in sorted(folder.glob("*.csv")):
        label = file.stem.rsplit("__", 1)[0]
        curves, offline_end = read(file)
        runs[label].append(curves)
        ends[label].append(offline_end)
        args = json.loads(file.with_suffix(".json").read_text())
        env_id = args["env_id"]
        files[label] = (args["dataset"] or f"datasets/{env_id}.npz") if "dataset" in args else None
    if not runs:
        print(f"error: there are no results in {folder}: run benchmark/run.py {name}", file=sys.stderr)
        sys.exit(2)

    for label, seeds in runs.items():  # a mean over seeds is of those that have come farthest
        reached = [max(seed["test", "online"], default=0) for seed in seeds]
        runs[label] = [seed for seed, step in zip(seeds, reached) if step == max(reached)]
        ends[label] = ends[label][reached.index(max(reached))]
        if len(runs[label]) < len(seeds):
            print(f"{label}: left out what has not come to step {max(reached)} ({len(seeds) - len(runs[label])} seeds)")

    def curve(label, group):
        """Gradient steps that all seeds have (S,), their returns (seeds, S)."""
        seeds = [seed[group] for seed in runs[label]]
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))  # a run that was made longer has one more
        return steps, np.array([[seed[step] for step in steps] for seed in seeds])

    last = max(step for label in runs for step in curve(label, ("test", "online"))[0])
    panels = {title: [label for label in labels.split() if label in runs] for title, labels in PANELS.items()}
    panels = {title: labels for title, labels in panels.items() if len(labels) > 1 or title == next(iter(PANELS))}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, (title, labels) in zip(axes[0], panels.items()):
        for label in labels:
            (words, colour), (steps, values) = METHODS[label], curve(label, ("test", "online"))
            mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
            axis.plot(steps, mean, color=colour, label=words)
            axis.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
            if steps[-1] == ends[label] < last:  # it has no second phase
                axis.plot([steps[-1], last], [mean[-1]] * 2, color=colour, linestyle=":")
        silver = dict(color="silver", linewidth=0.8)
        axis.axhline(data_return(env_id, files["smac"]), **silver, label="the data, training tasks")
        axis.axvline(ends["smac"], **silver, linestyle="--")  # the self-supervised phase begins
        axis.set(title=title, xlabel="gradient step")
        axis.locator_params(axis="x", nbins=5)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel(f"{env_id}: return on test tasks")
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=100)

    columns = [f"{split} tasks, {context} context" for split, context in GROUPS]
    lines = ["| run | seeds | data, train tasks | " + " | ".join(columns) + " |", "|---" * 6 + "|"]
    for label in sorted(runs, key=list(METHODS).index):
        cells = [f"{data_return(env_id, files[label]):.1f}" if files[label] else ""]
        for group in GROUPS:
            steps, values = curve(label, group) if group in runs[label][0] else ([], None)
            moments = [step for step in (ends[label], max(steps, default=0)) if step in steps and step > 0]
            shown = [values[:, steps.index(step)] for step in dict.fromkeys(moments)]
            spread = [f" ± {column.std(ddof=1):.1f}" if len(column) > 1 else "" for column in shown]
            cells.append(" → ".join(f"{column.mean():.1f}{std}" for column, std in zip(shown, spread)))
        lines.append(f"| {label} | {len(runs[label])} | " + " | ".join(cells) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "point_direction")
