"""Every picture and every table of the evidence, from the runs in benchmark/results.

python benchmark/plot.py all       all pictures, and the tables and numbers in all texts
python benchmark/plot.py texts     the texts alone
python benchmark/plot.py figure5   one picture: figure5, figure7, figure9, methods, context,
                                   own_share, ant, point
python benchmark/plot.py NAME      of a benchmark of run.py: results/NAME/curve.png, and its table

In README.md and in the texts of benchmark/results a table stands between `<!-- table: NAME -->` and
`<!-- end -->`, a number between `<!-- number: NAME -->` and `<!-- /number -->`. What stands there
is written here, and is never written by hand.
"""

import math
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import evidence, figures, studies, tables
from benchmark.evidence import SECOND, TEST, data_of
from benchmark.tables import FOLDERS, MORE_TASKS, NAMES, SIX
from buffers import InputError

# What a run is drawn with. A colour means one thing: black has true rewards after the offline
# phase, green explores the test tasks, red is SMAC as it is. A style tells apart what shares a
# colour.
STYLES = {
    "smac": ("tab:red", "-"),
    "smac_more_offline": ("tab:orange", "-"),
    "smac_no_new_data": ("tab:orange", "--"),
    "smac_actor_ablation": ("tab:blue", "-"),
    "meta_bc": ("tab:brown", "-"),
    "macaw": ("olive", "-"),
    "macaw_matched": ("olive", "--"),
    "borel": ("magenta", "-"),
    "borel_matched": ("magenta", "--"),
    "pearl": ("black", "-"),
    "smac_oracle_rewards": ("black", "--"),
    "smac_oracle_rewards_frozen": ("black", (0, (1, 3))),
    "smac_encoder_q": ("navy", "-"),
    "smac_encoder_reward_then_q": ("tab:cyan", "-"),
    "smac_encoder_prior": ("goldenrod", "-"),
    "smac_two_critics": ("teal", "-"),
    "smac_one_task": ("tab:red", "--"),
    "smac_five_tasks": ("tab:red", ":"),
    "smac_lambda_10": ("tab:gray", "-"),
    "smac_lambda_10_no_pearl": ("tab:gray", ":"),
    "smac_lambda_10_no_pearl_no_new_data": ("tab:gray", "-."),
    "smac_lambda_10_more_offline": ("tab:gray", "--"),
    "smac_text_kl": ("darkseagreen", "-"),
    "smac_text_kl_more_offline": ("darkseagreen", "--"),
    "smac_small_kl": ("slategray", "-"),
    "smac_small_kl_more_offline": ("slategray", "--"),
    "smac_small_kl_lambda_10": ("slategray", "-."),
    "smac_small_kl_lambda_10_more_offline": ("slategray", ":"),
    "smac_tiny_kl": ("darkslategray", "-"),
    "smac_tiny_kl_more_offline": ("darkslategray", "--"),
    "smac_wide_more_offline": ("slategray", (0, (1, 1))),
    "smac_no_pearl": ("indigo", "--"),
    "smac_test_tasks": ("tab:green", "-"),
    "smac_test_tasks_five_tasks": ("tab:green", "--"),
    "smac_test_tasks_oracle_rewards": ("black", "-."),
    "smac_test_tasks_oracle_rewards_five_tasks": ("black", (0, (5, 2, 1, 2, 1, 2))),
    "smac_goal_data": ("saddlebrown", "-"),
    "smac_goal_data_more_offline": ("tab:orange", ":"),
    "smac_goal_data_slow": ("saddlebrown", "--"),
    "smac_goal_data_oracle_rewards": ("black", ":"),
    "focal": ("tab:purple", "-"),
    "focal_more_offline": ("tab:purple", "--"),
    "focal_critic": ("tab:purple", ":"),
    "focal_critic_more_offline": ("tab:purple", "-."),
    "focal_lambda_10": ("tab:purple", (0, (5, 2, 1, 2, 1, 2))),
    "focal_lambda_10_more_offline": ("tab:purple", (0, (5, 2, 1, 2))),
    "csro_lambda_10": ("tab:pink", ":"),
    "csro_lambda_10_more_offline": ("tab:pink", "-."),
    "unicorn_lambda_10": ("deepskyblue", ":"),
    "unicorn_lambda_10_more_offline": ("deepskyblue", "-."),
    "csro": ("tab:pink", "-"),
    "csro_more_offline": ("tab:pink", "--"),
    "unicorn": ("deepskyblue", "-"),
    "unicorn_more_offline": ("deepskyblue", "--"),
    "focal_goal_data": ("tab:purple", (0, (1, 1))),
    "csro_goal_data": ("tab:pink", (0, (1, 1))),
    "unicorn_goal_data": ("deepskyblue", (0, (1, 1))),
}
METHODS = (
    "smac smac_more_offline smac_actor_ablation meta_bc macaw macaw_matched borel borel_matched "
    "pearl"
).split()
ENCODERS = ["smac", "smac_encoder_q", "smac_encoder_reward_then_q"]
EXPLORED = [
    "smac",
    "smac_test_tasks",
    "smac_test_tasks_oracle_rewards",
    "smac_five_tasks",
    "smac_test_tasks_five_tasks",
    "smac_test_tasks_oracle_rewards_five_tasks",
]
FIGURE_7 = ["HopperParam", "WalkerParam", "HumanoidDirection"]
FIGURES = {  # name: (labels, environments)
    "figure5": (METHODS, SIX),
    "figure7": (ENCODERS, FIGURE_7),
    "figure9": (EXPLORED, ["SawyerManipulation8"]),
}
GROUND = {  # pictures of Figures 2, 6 and 8: the folder of seed 1 of SMAC
    "ant": "short/AntDirection",
    "point": "point_direction",
}
CURVES = [
    "point_direction",
    "hopper_param",
    "hopper_small",
    "walker_small",
    "ant_small",
    "cheetah_small",
    "sawyer_small",
]
PANELS = {  # of the picture of one benchmark
    "methods": METHODS,
    "the controls": ["smac", "smac_more_offline", "smac_no_new_data"],
    "what trains the encoder": ENCODERS,
    "another loss for the encoder": [
        "smac",
        "focal_more_offline",
        "focal_critic_more_offline",
        "csro_more_offline",
        "unicorn_more_offline",
    ],
    "where it explores": EXPLORED[:3],
    "true rewards in the second phase": ["smac", "smac_oracle_rewards"],
    "lambda of Eq. 2": [
        "smac",
        "smac_lambda_10",
        "smac_lambda_10_no_pearl",
        "smac_lambda_10_no_pearl_no_new_data",
        "smac_lambda_10_more_offline",
    ],
    "what enters the encoder's buffer": ["smac", "smac_encoder_prior"],
    "critics": ["smac", "smac_two_critics"],
    "how much it collects": ["smac", "smac_one_task", "smac_five_tasks"],
    "data that give the task away": [
        "smac",
        "smac_goal_data",
        "smac_goal_data_more_offline",
        "smac_goal_data_slow",
        "smac_goal_data_oracle_rewards",
        "focal_goal_data",
        "csro_goal_data",
        "unicorn_goal_data",
    ],
}
SHADE = "SMAC's self-supervised phase"
DATA = "the data"


# ===== Pictures


def save(figure, file):
    """Write a picture that is the same whenever it is drawn from the same numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_curves(axes, title, found, labels):
    """Returns on test tasks of some labels {label: {seed: Run}} of a benchmark.

    Returns {label: number of seeds} of what was drawn.
    """
    labels = [label for label in labels if label in found]
    axes.set_title(title)
    if not labels:
        style = {"color": "gray", "ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "no run yet", **style)
        axes.set(xticks=[], yticks=[])
        return {}
    for label in labels:
        draw_seeds(axes, label, list(found[label].values()))

    # What the data have, once for each dataset; the colour of its run where there are several
    levels = {}
    for label in labels:
        level = data_of(next(iter(found[label].values())).flags)[0]
        if not math.isnan(level) and level not in levels:
            levels[level] = STYLES[label][0] if levels else "gray"
    for level, colour in levels.items():
        name = DATA if colour == "gray" else "its data"
        axes.axhline(level, color=colour, linestyle=(0, (1, 3)), linewidth=1.2, label=name)

    first = next(iter(found[labels[0]].values()))
    if SECOND in first.phases and first.offline_end > 0:
        axes.axvspan(first.offline_end, first.end, color="0.93", zorder=0, label=SHADE)
    axes.set_xlabel("gradient step")
    axes.margins(y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    return {label: len(found[label]) for label in labels}


def draw_seeds(axes, label, runs):
    """The seeds of a label as thin lines, their mean as a thick one that ends in a point."""
    colour, style = STYLES[label]
    steps = sorted(set.intersection(*(set(run.curves[TEST]) for run in runs)))
    curves = np.array([[run.curves[TEST][step] for step in steps] for run in runs])
    if len(runs) > 1:
        for curve in curves:
            axes.plot(steps, curve, color=colour, linestyle=style, linewidth=0.6, alpha=0.45)
    mean = curves.mean(0)
    axes.plot(steps, mean, color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.plot(steps[-1], mean[-1], color=colour, marker="o", markersize=5)


def seed_words(numbers):
    """In a legend: how many seeds a label has, {panel: number}."""
    least, most = min(numbers), max(numbers)
    plural = "" if most == 1 else "s"
    return f"{most} seed{plural}" if least == most else f"{least} to {most} seeds"


def draw_legend(figure, panels, drawn, **options):
    """One legend for all panels, with the number of seeds of each label."""
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    labels = [label for label in NAMES if label in handles]
    others = [label for label in handles if label not in NAMES]
    texts = []
    for label in labels:
        numbers = [seeds[label] for seeds in drawn if label in seeds]
        texts.append(f"{NAMES[label]} ({seed_words(numbers)})")
    return figure.legend(
        [handles[label] for label in labels + others], texts + others, fontsize=9, **options
    )


def draw_figure(name):
    """Figure 5, 7 or 9 of the paper: a panel for each environment, one legend."""
    labels, environments = FIGURES[name]
    columns = min(3, len(environments))
    rows = math.ceil(len(environments) / columns)
    size = (max(9, 4.2 * columns), 3.2 * rows + 1.2)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    drawn = []
    for axes, environment in zip(grid.flat, environments):
        shown = labels
        if environment == MORE_TASKS:  # whose data are not of PEARL
            shown = [*labels, "smac_oracle_rewards"]
        found = evidence.load(FOLDERS[environment])
        drawn.append(draw_curves(axes, environment, found, shown))
    figure.supylabel("return on test tasks", fontsize=10)
    draw_legend(figure, grid.flat, drawn, loc="outside lower center", ncols=3)
    save(figure, evidence.RESULTS / f"{name}.png")


def draw_benchmark(name):
    """The picture of one benchmark: a panel for each question that its runs answer."""
    found = evidence.load(name)
    panels = {}
    for title, labels in PANELS.items():
        present = [label for label in labels if label in found]
        if len(present) > 1 or title == "methods":
            panels[title] = present
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (max(8, 5.5 * columns), 5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, labels) in zip(grid.flat, panels.items()):
        numbers = draw_curves(axes, title, found, labels)
        handles, drawn = axes.get_legend_handles_labels()
        texts = []
        for label in drawn:
            known = label in NAMES
            texts.append(f"{NAMES[label]} ({seed_words([numbers[label]])})" if known else label)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 1}
        axes.legend(handles, texts, fontsize=8, **place)
        axes.set_ylabel("return on test tasks")
    save(figure, evidence.RESULTS / name / "curve.png")


def draw_methods():
    """The picture of README.md: each method over six environments, with its interval."""
    rows = tables.normalised_means()
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.6), layout="constrained")
    for place, (label, mean, interval, _) in enumerate(reversed(rows)):
        colour = STYLES[label][0]
        if mean is None:
            axes.text(0.02, place, "not yet run on all six", color="gray", va="center", fontsize=8)
            continue
        if interval:
            axes.plot(interval, [place] * 2, color=colour, linewidth=6, alpha=0.35)
        filled = colour if interval else "white"
        style = {"marker": "o", "markersize": 8, "markeredgecolor": colour}
        axes.plot(mean, place, color=filled, **style)
    names = []
    for label, _, _, numbers in reversed(rows):
        seeds = f" ({seed_words(numbers)})" if numbers else ""
        names.append(tables.method_name(label) + seeds)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    for level in (0, 1):
        axes.axvline(level, color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel(
        "normalised return on test tasks\n"
        "(0: the data; Sawyer: never achieved. 1: the best of these and of FOCAL, CSRO, UNICORN)\n"
        "interquartile mean over six environments, bar: its 95 % interval\n"
        "(hollow, no bar: a single seed on some environment)",
        fontsize=9,
    )
    save(figure, evidence.RESULTS / "methods.png")


def draw_context():
    """The gap between contexts: a panel for each environment, a row for each method."""
    methods = dict(reversed(tables.CONTEXT_METHODS.items()))
    figure, grid = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    for axes in grid.flat[len(tables.COMPARED) :]:
        axes.set_visible(False)
    for axes, environment in zip(grid.flat, tables.COMPARED):
        axes.set_title(tables.SHORT_NAMES[environment])
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(-0.6, len(methods) - 0.4)
        for place, (labels, phase) in enumerate(methods.values()):
            found = tables.context_scores(environment, labels, phase)
            own, offline = (list(found[group].values()) for group in (TEST, ("train", "offline")))
            if own and offline:
                draw_gap(axes, place, STYLES[labels[0]][0], own, offline)
    figure.supxlabel(
        "return; filled: own context on test tasks, with its 95 % interval over seeds; "
        "hollow: offline context on training tasks",
        fontsize=10,
    )
    save(figure, evidence.RESULTS / "context" / "gap.png")


def draw_gap(axes, place, colour, own, offline):
    """A dot for returns with own context (seeds,), another for those with offline context."""
    mean, half = evidence.interval(own)
    other = np.mean(offline)
    axes.plot([mean, other], [place] * 2, color=colour, linewidth=1)
    if not math.isnan(half):
        axes.plot([mean - half, mean + half], [place] * 2, color=colour, linewidth=6, alpha=0.3)
    style = {"marker": "o", "markersize": 7, "markeredgecolor": colour}
    axes.plot(other, place, color="white", **style)
    axes.plot(mean, place, color=colour, **style)


def draw_own_share():
    """When the second phase helps on the Ant, by what the data know."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    studies.draw_own_share(axes, STYLES)
    save(figure, evidence.RESULTS / "own_share" / "own_share.png")


def draw_ground(name):
    """Figures 2, 6 and 8 of seed 1 of SMAC."""
    folder = evidence.RESULTS / GROUND[name]
    run = figures.read(folder, folder / "smac__1.json", folder / "smac__1.csv")
    figure = figures.draw(*run)
    save(figure, folder / "figures.png")


# ===== Texts


def texts():
    """The files with marks."""
    root = evidence.RESULTS.parent.parent
    return [root / "README.md", *sorted(evidence.RESULTS.glob("**/README.md"))]


def fill(text):
    """A text with the tables and numbers between its marks written anew. Raises InputError."""

    def table(mark):
        make = studies.TABLES.get(mark[2])
        made = make() if make else tables.table(mark[2])
        return f"{mark[1]}\n{made}\n\n{mark[3]}"

    def number(mark):
        make = studies.NUMBERS.get(mark[2])
        made = make() if make else tables.number(mark[2])
        return f"{mark[1]}{made}{mark[3]}"

    text = re.sub(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", table, text, flags=re.S)
    return re.sub(
        r"(<!-- number: (\S+) -->)[^<]*(<!-- /number -->)",
        number,
        text,
    )


def fill_texts():
    for file in texts():
        before = file.read_text()
        after = fill(before)
        if after != before:
            file.write_text(after)


# ===== Commands


def pictures():
    """{name: (function, argument)} of every picture."""
    found = {"methods": (draw_methods,), "context": (draw_context,)}
    found["own_share"] = (draw_own_share,)
    found |= {name: (draw_figure, name) for name in FIGURES}
    found |= {name: (draw_ground, name) for name in GROUND}
    found |= {name: (draw_benchmark, name) for name in CURVES}
    return found


def main(name):
    """Draw and write what a name asks for. Raises InputError."""
    if name in ("all", "texts"):
        fill_texts()
        if name == "all":
            for draw, *arguments in pictures().values():
                draw(*arguments)
    elif name in pictures():
        draw, *arguments = pictures()[name]
        draw(*arguments)
        if name in CURVES:
            print(tables.runs_table(name))
    elif evidence.load(name):
        draw_benchmark(name)
        print(tables.runs_table(name))
    else:
        folder = evidence.RESULTS / name
        raise InputError(f"there are no results in {folder}: run benchmark/run.py {name}")


if __name__ == "__main__":
    try:
        for name in sys.argv[1:] or ["all"]:
            main(name)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
