"""Learning curves and tables of benchmarks, from {label}__{seed}.csv and .json in benchmark/results/{name}/.

python benchmark/plot.py point_direction    curve.png and table.md of this benchmark, beside its files
python benchmark/plot.py figure5            the six domains of the paper in one picture; also figure7, figure9
python benchmark/plot.py glance             glance.md, a row for each environment; also larger
python benchmark/plot.py short              of SMAC with the preset short a panel and a row for each environment
"""

import csv
import dataclasses
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {  # label of a run: its name and colour in every picture
    "smac": ("SMAC", "tab:red"), "smac_actor_ablation": ("SMAC (actor ablation)", "tab:blue"),
    "meta_bc": ("meta behaviour cloning", "tab:brown"), "macaw": ("MACAW", "olive"),
    "macaw_matched": ("MACAW, SMAC-matched", "yellowgreen"), "borel": ("BOReL", "magenta"),
    "borel_matched": ("BOReL, SMAC-matched", "purple"), "pearl": ("Online Oracle (PEARL)", "black"),
    "smac_encoder_q": ("only Q-loss (online & offline)", "navy"),
    "smac_encoder_reward_then_q": ("only Q-loss (online)", "tab:cyan"),
    "smac_encoder_prior": ("encoder buffer grows", "goldenrod"), "smac_two_critics": ("two critics", "teal"),
    "smac_one_task": ("one task an iteration", "tab:orange"), "smac_oracle_rewards": ("true rewards", "dimgray"),
    "smac_test_tasks": ("explores test tasks", "tab:green"),
    "smac_test_tasks_oracle_rewards": ("explores test tasks, true rewards", "mediumslateblue"),
    "smac_five_tasks": ("five tasks an iteration", "sienna"), "smac_lambda_pearl": ("lambda_pearl 1", "indigo"),
    "smac_goal_data": ("goal-directed data", "darkgreen"),
    "smac_goal_data_slow": ("goal-directed data, lr 3e-4", "darkseagreen"),
    "smac_goal_data_oracle_rewards": ("goal-directed data, true rewards", "saddlebrown"),
}  # fmt: skip
PANELS = {
    "methods (Figure 5)": "smac smac_actor_ablation meta_bc macaw macaw_matched borel borel_matched pearl",
    "what trains the encoder (Figure 7)": "smac smac_encoder_q smac_encoder_reward_then_q",
    "where it explores (Figure 9)": "smac smac_test_tasks smac_test_tasks_oracle_rewards",
    "true rewards in the second phase": "smac smac_oracle_rewards",
    "what enters the encoder buffer": "smac smac_encoder_prior",
    "critics": "smac smac_two_critics",
    "how much it collects; the actor": "smac smac_one_task smac_five_tasks smac_lambda_pearl",
    "data that give the task away": "smac smac_goal_data smac_goal_data_slow smac_goal_data_oracle_rewards",
}
LARGER = {  # the benchmark of an environment with larger networks and more steps
    "HopperParam": "hopper_small", "WalkerParam": "walker_small", "CheetahVelocity": "cheetah_small",
    "AntDirection": "ant_small", "HumanoidDirection": "humanoid_small", "SawyerManipulation": "sawyer_small",
}  # fmt: skip
SCENES = "SawyerManipulation, 200 scenes"  # its default data have fifty
FOLDERS = {env_id: f"short/{env_id}" for env_id in envs.SPECS} | {
    "PointDirection": "point_direction"
}
FOLDERS |= {SCENES: "short/SawyerManipulation200"}
DOMAINS = [*[*LARGER][:-1], SCENES]
FIGURES = {  # true rewards stand for the Online Oracle on Sawyer, whose data are not of PEARL
    "figure5": ("methods (Figure 5)", DOMAINS),
    "figure7": (
        "what trains the encoder (Figure 7)",
        ("HopperParam", "WalkerParam", "HumanoidDirection"),
    ),
    "figure9": ("where it explores (Figure 9)", ("SawyerManipulation8",)),
}
TEST, ENV_STEPS = ("test", "online"), ("env_steps", "")  # groups of `read`
GROUPS = (TEST, ("train", "online"), ("train", "offline"))  # tasks, context
NOTE = """\
Post-adaptation return after the offline phase → at the end: mean over seeds ± half the width of the 95 % interval of
that mean (Student's t; none of one seed), in brackets the number of seeds. Data: mean over the training tasks of the
mean return of a task's trajectories."""
COST_NOTE = """
Transitions: draws for training, in millions, by critic and actor + as context (MACAW: outer + inner batch; BOReL: SAC +
VAE). New: transitions collected in the environment, mean over seeds."""


@dataclasses.dataclass
class Runs:
    """Seeds of one label: flags, last step of the offline phase, {group: (steps (S,), returns (seeds, S))}."""

    args: dict
    end: int
    curves: dict

    def moments(self, group=TEST):
        """{gradient step: returns (seeds,)} after the offline phase, if there is one, and at the end."""
        steps, values = self.curves.get(group, ([], None))
        wanted = dict.fromkeys((self.end, max(steps, default=0)))
        return {step: values[:, steps.index(step)] for step in wanted if step in steps and step > 0}


def read(file):
    """eval.csv -> {(tasks, context): {gradient step: mean return}}, and the last step without new transitions.

    The group ENV_STEPS has the number of new transitions in place of a return.
    """
    cells, offline_end = defaultdict(lambda: defaultdict(list)), 0
    with open(file, newline="") as lines:
        for row in csv.DictReader(lines):
            step = int(row["gradient_step"])
            cells[row["split"], row["context"]][step].append(float(row["return"]))
            cells[ENV_STEPS][step].append(int(row["env_steps"]))
            offline_end = max(offline_end, step) if row["env_steps"] == "0" else offline_end
    curves = {
        group: {step: np.mean(values) for step, values in steps.items()}
        for group, steps in cells.items()
    }
    return curves, offline_end


def load(name):
    """{label: Runs} of a benchmark, in the order of METHODS; of a label the seeds that have come farthest."""
    found, runs = defaultdict(list), {}
    for file in sorted((RESULTS / name).glob("*.csv")):
        curves, end = read(file)
        if max(curves.get(TEST, [0])) > 0:
            found[file.stem.rsplit("__", 1)[0]].append(
                (curves, end, json.loads(file.with_suffix(".json").read_text()))
            )
    for label in sorted(found, key=[*METHODS, *found].index):
        last = max(max(curves[TEST]) for curves, _, _ in found[label])
        seeds, ends, flags = zip(*(seed for seed in found[label] if max(seed[0][TEST]) == last))
        if left_out := len(found[label]) - len(seeds):
            print(f"{name}, {label}: left out what has not come to step {last} ({left_out} seeds)")
        runs[label] = Runs(flags[0], ends[0], {})
        for group in seeds[
            0
        ]:  # at the steps that all have: a run that was made longer has one more
            steps = sorted(set.intersection(*(set(seed[group]) for seed in seeds)))
            runs[label].curves[group] = (
                steps,
                np.array([[seed[group][step] for step in steps] for seed in seeds]),
            )
    return runs


def interval(values):
    """Mean over seeds, and half the width of its 95 % interval: (seeds, ...) -> (...), (...); 0 for one seed."""
    n, mean = len(values), values.mean(0)
    if n == 1:
        return mean, 0 * mean
    # The quantile of Student's t, d degrees of freedom: with t = sqrt(d) tan(angle) the density is cos(angle)^(d - 1)
    d, edges = n - 1, np.linspace(0, math.pi / 2, 10_001)
    mass = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (d - 1))
    quantile = math.sqrt(d) * math.tan(np.interp(0.95, mass / mass[-1], edges[1:]))
    return mean, quantile * values.std(0, ddof=1) / math.sqrt(n)


def data_of(args):
    """Of a run's dataset, RL part, means over tasks: the mean return of a task's trajectories up to the horizon (where
    its data begin within one, of what is left of it), and the mean length of three in a row; of both parts the number
    of transitions. NaN if there is none."""
    file = RESULTS.parent.parent / (args.get("dataset") or f"datasets/{args['env_id']}.npz")
    if "dataset" not in args or not file.exists():  # the oracle has none
        return np.nan, np.nan, np.nan
    with np.load(file, allow_pickle=False) as arrays:
        tasks, lengths, rewards = (arrays[f"rl_{name}"] for name in ("tasks", "lengths", "rewards"))
        size = len(rewards) + len(arrays["encoder_rewards"])
    paths = [
        path[: envs.SPECS[args["env_id"]].horizon]
        for path in np.split(rewards, lengths.cumsum()[:-1])
    ]
    returns = np.array([path.sum(dtype=np.float64) for path in paths])
    parts = [tasks == task for task in np.unique(tasks)]
    triples = [lengths[part].sum() / math.ceil(part.sum() / 3) for part in parts]
    return np.mean([returns[part].mean() for part in parts]), np.mean(triples), size


def transitions(args, step):
    """Millions of transitions drawn for training up to a gradient step: (by critic and actor, as context)."""
    vae = min(step, args.get("vae_steps", 0))
    tasks = (step - vae) * args["meta_batch"]
    context = tasks * args.get("context_batch", 0)
    if vae:  # BOReL's first stage draws meta-trajectories, three episodes in a row
        context += vae * args["vae_tasks"] * args["vae_trajectories"] * data_of(args)[1]
    return tasks * args["rl_batch"] / 1e6, context / 1e6


def words(moments):
    """Returns at one or two moments, (seeds,) each, as a cell of a table."""
    pairs, moments = [interval(values) for values in moments], [*moments]
    means = [f"{mean:.1f}" + f" ± {half:.1f}" * (len(moments[0]) > 1) for mean, half in pairs]
    return " → ".join(means) + f" ({len(moments[0])})" if means else ""


def write_table(file, head, rows, note):
    """A note and a table in Markdown, into a file and onto the screen."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    file.write_text("\n".join([note, "", *lines, ""]))
    print("\n".join(lines))


def draw(axis, title, runs, labels):
    """Returns on test tasks of some runs of a benchmark."""
    labels = [label for label in labels if label in runs]
    axis.set_title(title)
    if not labels:
        axis.text(
            0.5, 0.5, "no run yet", color="gray", ha="center", va="center", transform=axis.transAxes
        )
        axis.set(xticks=[], yticks=[])
        return
    last = max(runs[label].curves[TEST][0][-1] for label in labels)
    for label in labels:
        (name, colour), (steps, values) = METHODS[label], runs[label].curves[TEST]
        mean, half = interval(values)
        axis.plot(steps, mean, color=colour, label=name)
        outline = np.column_stack(
            [steps + steps[::-1], np.append(mean - half, (mean + half)[::-1])]
        )
        if (
            len(values) > 2
        ):  # the interval of two seeds is twelve times their standard error: it would fill the panel
            # Not fill_between: lines alone decide how much the axis shows, the bands of three seeds may be cut off
            axis.add_artist(plt.Polygon(outline, color=colour, alpha=0.12, linewidth=0))
        if steps[-1] == runs[label].end < last:  # it has no second phase
            axis.plot([steps[-1], last], [mean[-1]] * 2, color=colour, linestyle=":")
    levels = [data_of(runs[label].args)[0] for label in labels]
    for i, data in enumerate(levels):
        if (
            not np.isnan(data) and data not in levels[:i]
        ):  # another dataset has the colour of its run
            colour, name = ("gray", "the data") if i == 0 else (METHODS[labels[i]][1], "its data")
            axis.axhline(data, color=colour, linestyle="-.", linewidth=1, label=name)
    first = runs[labels[0]]  # SMAC, if it has run
    if 0 < first.end < first.curves[TEST][0][-1]:
        axis.axvspan(
            first.end,
            first.curves[TEST][0][-1],
            color="0.93",
            zorder=0,
            label="self-supervised phase",
        )
    axis.set_xlabel("gradient step")
    axis.margins(y=0.1)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.locator_params(axis="x", nbins=6)


def picture(file, panels, one_legend):
    """Draw panels {title: (runs, labels)}, of one environment, or of several with one legend."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows, legend = math.ceil(len(panels) / columns), {}
    width, height = max(8, 4 * columns), (3.1 if one_legend else 4.1) * rows + 0.6 * one_legend
    size = dict(figsize=(width, height), layout="constrained")
    figure, axes = plt.subplots(rows, columns, sharey=not one_legend, squeeze=False, **size)
    for axis, (title, (runs, labels)) in zip(axes.flat, panels.items()):
        draw(axis, title, runs, labels)
        handles, names = axis.get_legend_handles_labels()
        legend |= zip(names, handles)
        if not one_legend:
            axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(
        "Mean over seeds; band: 95 % interval of the mean, of three seeds or more; dotted: no second phase",
        fontsize=9,
    )
    figure.supylabel("return on test tasks", fontsize=10)
    if one_legend:
        names = sorted(legend, key=[*(name for name, _ in METHODS.values()), *legend].index)
        figure.legend(
            [legend[name] for name in names], names, loc="outside lower center", ncols=4, fontsize=9
        )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def adaptation(name):
    """Returns of a benchmark's SMAC runs with z from three sources, mean over seeds, as a cell of a table."""
    own, common = RESULTS / name / "adaptation.md", RESULTS / "adaptation.md"
    file, prefix = (own, "") if own.exists() else (common, f"{name}/")
    rows = [
        line.strip("| ").split(" | ")
        for line in (file.read_text().splitlines() if file.exists() else ())
    ]
    rows = [row for row in rows if re.search(rf"(^|/){prefix}smac(/|__)", row[0])]
    rows = [
        row for row in rows if int(row[1]) == max(int(row[1]) for row in rows)
    ]  # at the end of the run
    means = (
        np.mean([[float(cell.split()[0]) for cell in row[2:5]] for row in rows], axis=0)
        if rows
        else ()
    )
    return " / ".join(f"{mean:.1f}" for mean in means) + f" ({len(rows)})" * bool(rows)


def cell(runs, labels, phase):
    """The best of some labels at moment number `phase`, with seeds, gradient steps and new transitions, or ""."""
    found = [
        (runs[label], [*runs[label].moments().items()][phase:][:1])
        for label in labels.split()
        if label in runs
    ]
    ends = [(run, *moment) for run, moments in found for moment in moments]
    if not ends:
        return ""
    run, step, values = max(ends, key=lambda end: np.mean(end[2]))
    steps, counts = run.curves[ENV_STEPS]
    new = counts[:, steps.index(step)].mean()
    return f"{words([values])[:-1]}; {step / 1000:g}k{f'; {new / 1000:.0f}k' if new else ''})"


def glance(file, folders, sizes):
    """Write a table with a row for each environment; sizes: what the runs have in common, in words."""
    head = "environment|data|SMAC, offline|after|actor ablation|meta-BC|MACAW|BOReL|Online Oracle|of it adaptation"
    note = f"""\
{sizes}
On test tasks, z from two episodes of the agent's own exploration: mean over seeds ± half its 95 % interval (Student's
t; none of one seed); in brackets seeds; gradient steps; new transitions, the oracle's with rewards. Data: mean over the
training tasks of the mean return of a task's trajectories. MACAW, BOReL: the better preset of those that were run. Of
it adaptation: SMAC at the end with z from its own context / from another task's / from the prior. Empty: not run."""
    rows = []
    for env_id, folder in folders.items():
        runs = load(folder)
        data = [
            f"{mean:.1f} ({n / 1000:g}k)"
            for mean, _, n in (data_of(run.args) for run in runs.values())
            if n > 0
        ]
        rows.append([env_id, *(data[:1] or [""])])
        rows[-1] += [cell(runs, "smac", phase) for phase in (0, 1)]
        oracle = "smac_oracle_rewards" if env_id == SCENES else "pearl"
        for labels in (
            "smac_actor_ablation",
            "meta_bc",
            "macaw macaw_matched",
            "borel borel_matched",
            oracle,
        ):
            rows[-1].append(cell(runs, labels, -1))
        rows[-1].append(adaptation(folder))
    write_table(file, head.split("|"), rows, note)


def short():
    """Write short/curve.png and short/table.md, of SMAC in each environment."""
    folders = {env_id: f"short/{env_id}" for env_id in envs.SPECS} | {SCENES: FOLDERS[SCENES]}
    runs = {env_id: load(folder).get("smac") for env_id, folder in folders.items()}
    runs = {env_id: run for env_id, run in runs.items() if run}
    panels = {env_id: ({"smac": run}, ["smac"]) for env_id, run in runs.items()}
    picture(RESULTS / "short" / "curve.png", panels, one_legend=True)
    note = f"""SMAC with --preset short, on test tasks with online context.
{NOTE}
A seed's end is the mean of its last three evaluations, its gain what that is above the end of its offline phase.
Minutes: processor time, mean over seeds, where times.txt has it."""
    times, rows = RESULTS / "short" / "times.txt", []
    times = times.read_text() if times.exists() else ""
    for env_id, run in runs.items():
        steps, values = run.curves[TEST]
        offline, last = (
            values[:, steps.index(run.end)],
            values[:, [step > run.end for step in steps]][:, -3:],
        )
        ends = [last.mean(1)] if last.size else []  # none: no second phase yet
        gains = ", ".join(f"{gain:+.1f}" for end in ends for gain in end - offline)
        pattern = rf"^{folders[env_id]} smac seed \d+: ([\d.]+) minutes of processor time"
        minutes = re.findall(pattern, times, re.MULTILINE)
        minutes = f"{np.mean([float(word) for word in minutes]):.0f}" if minutes else ""
        data = data_of(run.args)[0]
        rows.append(
            [
                env_id,
                "" if np.isnan(data) else f"{data:.1f}",
                words([offline]),
                words(ends),
                gains,
                minutes,
            ]
        )
    head = "environment|data|after the offline phase|at the end|gain in each seed|minutes"
    write_table(RESULTS / "short" / "table.md", head.split("|"), rows, note)


def main(name):
    if name == "glance":
        sizes = """\
--preset short, PointDirection its own. Sawyer: five tasks an iteration with fifty scenes; oracle: true rewards."""
        folders = {env_id: FOLDERS[env_id] for env_id in (*LARGER, SCENES, "PointDirection")}
        return glance(RESULTS / "glance.md", folders, sizes)
    if name == "larger":
        sizes = """\
The paper's networks; batches of 4 x 64 transitions (the paper: 4 x 256), Sawyer 4 x 128 and one task an iteration."""
        return glance(
            RESULTS / "larger.md",
            {env_id: name for env_id, name in LARGER.items() if load(name)},
            sizes,
        )
    if name in FIGURES:
        title, env_ids = FIGURES[name]
        panels = {env_id: (load(FOLDERS[env_id]), PANELS[title].split()) for env_id in env_ids}
        if SCENES in panels:
            panels[SCENES][1].append("smac_oracle_rewards")
        return picture(RESULTS / f"{name}.png", panels, one_legend=True)
    if name == "short":
        return short()
    if not (runs := load(name)):
        print(
            f"error: there are no results in {RESULTS / name}: run benchmark/run.py {name}",
            file=sys.stderr,
        )
        sys.exit(2)
    panels = {
        title: (runs, [label for label in labels.split() if label in runs])
        for title, labels in PANELS.items()
    }
    panels = {
        title: panel
        for title, panel in panels.items()
        if len(panel[1]) > 1 or title == next(iter(PANELS))
    }
    picture(RESULTS / name / "curve.png", panels, one_legend=False)

    rows = []
    for label, run in runs.items():
        steps, data = run.moments(), data_of(run.args)[0]
        cost = [transitions(run.args, step) for step in steps]
        rows.append([label, "" if np.isnan(data) else f"{data:.1f}"])
        rows[-1] += [words(run.moments(group).values()) for group in GROUPS]
        rows[-1] += [
            " → ".join(f"{step:,}" for step in steps),
            " → ".join(f"{rl:.1f} + {h:.1f}" for rl, h in cost),
        ]
        rows[-1].append(f"{run.curves[ENV_STEPS][1][:, -1].mean():,.0f}")
    columns = [f"{tasks} tasks, {context} context" for tasks, context in GROUPS]
    head = ["run", "data", *columns, "gradient steps", "transitions", "new"]
    write_table(RESULTS / name / "table.md", head, rows, NOTE + COST_NOTE)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "point_direction")
