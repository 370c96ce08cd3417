"""Figures 2, 6 and 8 of a run: python benchmark/figures.py RUN

A row for each figures_{step}.npz of the run, one after each phase. First how far the posterior is
from the prior, with offline and with own context on the same training tasks (Figure 2). In the
Direction families then the paths over ground after adaptation, with offline and with own context
(Figure 6): each task has a shade, and a dot of that shade on the rim shows where the task asks the
agent to go. Last the same paths with the exploration and the dataset (Figure 8).
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs
from plumbing.files import write_file
from plumbing.flags import launch_tool
from plumbing.pictures import read_figures

COLOURS = {  # as in the paper's figures
    "offline data": "tab:red",
    "exploration": "tab:green",
    "offline context": "tab:blue",
    "own context": "tab:orange",
}
CONTEXTS = "offline context", "own context"


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run
    out: Path = Path("figures.png")  # picture to write


def read(folder, flags_file, csv_file):
    """What a run left to draw.

    Args:
        flags_file, csv_file: args.json and eval.csv of the run.
    Returns {step: {name: KLs (E,), or paths (., L+1, 2)}}, and the angles of the training tasks of
    an evaluation in the order of the paths, (T,): None where tasks are no directions. Raises
    InputError.
    """
    figures = read_figures(folder)
    if not figures:
        raise buffers.InputError(f"there is no figures_*.npz in {folder}")
    if not flags_file.exists() or not csv_file.exists():
        return figures, None
    try:
        flags = json.loads(flags_file.read_text())
        env_id = flags["env_id"]
        is_own_family = ":" in env_id
        with open(csv_file, newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == "train"]
        tasks = list(dict.fromkeys(int(row["task"]) for row in rows))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
        words = f"{flags_file} or {csv_file} is not what a run writes"
        raise buffers.InputError(words) from None
    # A family of one's own is a module, and a file must not run code
    if is_own_family or not issubclass(envs.lookup(env_id).env_class, envs.Direction):
        return figures, None
    if "task_seed" in flags:  # PEARL has no dataset
        spec = envs.lookup(env_id)
        number = spec.num_train_tasks + spec.num_test_tasks
        drawn = envs.sample_tasks(env_id, number, flags["task_seed"])
        train_tasks = drawn[: spec.num_train_tasks]
    else:
        train_tasks = buffers.load_dataset(env_id, flags.get("dataset"))["train_tasks"]
    if not tasks or not 0 <= min(tasks) <= max(tasks) < len(train_tasks):
        raise buffers.InputError(f"{csv_file} has training tasks that its dataset has not")
    return figures, train_tasks[tasks, 0]


def draw_kls(axes, arrays):
    """Figure 2: how far the posterior is from the prior on the training tasks."""
    kls = {context: arrays.get(f"kl_train_{context.replace(' ', '_')}") for context in CONTEXTS}
    kls = {context: kl for context, kl in kls.items() if kl is not None}
    axes.set_visible(bool(kls))  # MACAW has no posterior
    if not kls:
        return
    highest = max(kl.max() for kl in kls.values())
    bins = np.linspace(0, max(highest, 1e-6), 25)
    for context, kl in kls.items():
        style = {"histtype": "step", "linewidth": 1.5, "color": COLOURS[context]}
        axes.hist(kl, bins=bins, label=f"{context}, mean {kl.mean():.1f}", **style)
    axes.set(xlabel="KL of the posterior to the prior", ylabel="meta-episodes on training tasks")
    axes.margins(y=0.3)  # room for the legend above the bars
    axes.legend(fontsize=8, loc="upper left")


def draw_paths(axes, paths, colour, label=None):
    """Paths (., L+1, 2) in metres, in one colour."""
    gaps = np.pad(paths, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
    axes.plot(*gaps.reshape(-1, 2).T, color=colour, linewidth=0.6, label=label)


def shade(angle):
    """A colour for a direction; directions that are near have shades that are near."""
    return matplotlib.colormaps["hsv"](angle % (2 * np.pi) / (2 * np.pi))


def draw_rim(axes, angles, radius, colours):
    """A circle, and on it a dot where each task points."""
    around = np.linspace(0, 2 * np.pi, 200)
    axes.plot(radius * np.cos(around), radius * np.sin(around), color="0.85", linewidth=0.8)
    axes.scatter(radius * np.cos(angles), radius * np.sin(angles), color=colours, s=45, zorder=3)


def finish(axes, title, radius):
    limit = 1.1 * radius
    axes.set(aspect="equal", xlabel="x (m)", ylabel="y (m)", title=title)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit))


def draw_contexts(panels, arrays, angles, radius):
    """Figure 6: paths after adaptation, a panel for each context and a shade for each task."""
    for axes, context in zip(panels, CONTEXTS):
        axes.set_visible(context in arrays)
        if context not in arrays:
            continue
        paths = arrays[context]
        if angles is None or len(paths) % len(angles):
            draw_paths(axes, paths, COLOURS[context])
        else:
            for angle, some in zip(angles, np.split(paths, len(angles))):
                draw_paths(axes, some, shade(angle))
            draw_rim(axes, angles, radius, [shade(angle) for angle in angles])
        finish(axes, f"Figure 6: {context}", radius)


def draw_everything(axes, ground, angles, radius):
    """Figure 8: the same with the exploration and the dataset."""
    for name, colour in COLOURS.items():
        if name in ground:
            draw_paths(axes, ground[name], colour, name)
    if angles is not None:
        draw_rim(axes, angles, radius, "0.5")
    finish(axes, "Figure 8", radius)
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for line in legend.get_lines():
        line.set_linewidth(2)


def draw(figures, angles):
    """Draw what `read` returned; a row for each phase."""
    figure = Figure(figsize=(17, 4.2 * len(figures)), layout="constrained")
    grid = figure.subplots(len(figures), 4, squeeze=False)
    for row, (step, arrays) in zip(grid, figures.items()):
        draw_kls(row[0], arrays)
        row[0].set_title(f"Figure 2, after {step:,} gradient steps")
        ground = {name: array for name, array in arrays.items() if name in COLOURS}
        for axes in row[1:]:
            axes.set_visible(bool(ground))
        if not ground:
            continue
        lengths = [np.nanmax(np.linalg.norm(paths, axis=-1)) for paths in ground.values()]
        radius = 1.05 * max(lengths)
        draw_contexts(row[1:3], ground, angles, radius)
        draw_everything(row[3], ground, angles, radius)
    return figure


def main(args):
    """Draw. Raises InputError."""
    if args.out.suffix not in ("", ".png", ".pdf", ".svg"):
        raise buffers.InputError(f"--out is {args.out}, expected .png, .pdf or .svg")
    found = read(args.run, args.run / "args.json", args.run / "eval.csv")
    figure = draw(*found)
    # "tight": without the room for what is not drawn
    style = {"format": args.out.suffix[1:] or "png", "dpi": 100, "bbox_inches": "tight"}
    write_file(args.out, lambda file: figure.savefig(file, **style))


if __name__ == "__main__":
    launch_tool(main, Args)
