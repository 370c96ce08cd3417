"""Pictures and tables of a run: summary.png, the paths in TensorBoard, the table at its end."""

import csv
import math
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from envs import InputError
from plumbing.files import read_npz

COLOURS = {  # in every picture of a run, as in the paper's Figures 2, 6 and 8
    "offline data": "tab:red", "exploration": "tab:green",
    "offline context": "tab:blue", "online context": "tab:orange",
}  # fmt: skip


def draw_paths(axes, ground: dict) -> None:
    """Draw {label: paths (., L+1, 2) in metres} on matplotlib axes, from above."""
    for label in (label for label in COLOURS if label in ground):
        line = np.pad(ground[label], ((0, 0), (0, 1), (0, 0)), constant_values=np.nan).reshape(
            -1, 2
        )  # one for all
        axes.plot(*line.T, color=COLOURS[label], linewidth=0.6, label=label)
    axes.set(aspect="equal", xlabel="x (m)", ylabel="y (m)")
    for line in axes.legend(
        fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
    ).get_lines():  # beside the paths
        line.set_linewidth(2)


def draw_kls(axes, arrays: dict) -> None:
    """Figure 2: how far the posterior is from the prior on the training tasks, {kl_train_{context}_context: (E,)}."""
    kls = {
        f"{context} context": arrays.get(f"kl_train_{context}_context")
        for context in ("offline", "online")
    }
    kls = {context: kl for context, kl in kls.items() if kl is not None}
    axes.set_visible(bool(kls))  # MACAW has no posterior
    bins = np.linspace(
        0, max([1e-6, *(kl.max() for kl in kls.values())]), 25
    )  # rounding may take a KL below 0
    for context, kl in kls.items():
        label = f"{context}, mean {kl.mean():.1f}"
        axes.hist(
            kl, bins=bins, histtype="step", color=COLOURS[context], linewidth=1.5, label=label
        )
    axes.set(xlabel="KL of the posterior to the prior", ylabel="meta-episodes on training tasks")
    axes.margins(y=0.3)  # above the bars is room for the legend
    if kls:
        axes.legend(fontsize=8, loc="upper left")


def read_csv(path) -> dict:
    """eval.csv -> {(split, context): {(gradient step, new transitions): mean return over tasks}}."""
    cells = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            steps = cells.setdefault((row["split"], row["context"]), {})
            steps.setdefault((int(row["gradient_step"]), int(row["env_steps"])), []).append(
                float(row["return"])
            )
    return {
        group: {at: float(np.mean(values)) for at, values in steps.items()}
        for group, steps in cells.items()
    }


def table(path) -> str:
    """Every evaluation of an eval.csv, mean over tasks."""
    groups = read_csv(path)
    lines = ["", "Post-adaptation return, mean over tasks"]
    lines += [
        f"{'gradient step':>14}{'transitions':>13}"
        + "".join(f"{f'{s}, {c} context':>24}" for s, c in groups)
    ]
    for at in dict.fromkeys(at for steps in groups.values() for at in steps):
        values = "".join(
            f"{steps[at]:>24.1f}" if at in steps else " " * 24 for steps in groups.values()
        )
        lines.append(f"{at[0]:>14}{at[1]:>13}{values}")
    return "\n".join(lines)


def read_figures(folder, last=math.inf) -> dict:
    """The last ten figures_{step}.npz of a run up to a step: {step: {name: KLs (E,), or paths (., L+1, 2)}}. Raises
    InputError: they can not be read, or hold numbers that can not be drawn."""

    def accept(name, dtype, shape):
        wanted = len(shape) == 1 if name.startswith("kl_") else len(shape) == 3 and shape[2] == 2
        return wanted and dtype == np.float32 and 0 < math.prod(shape) <= 1 << 21

    found = [
        file
        for file in Path(folder).glob("figures_*.npz")
        if re.fullmatch(r"figures_\d{1,16}", file.stem)
    ]
    files = {int(file.stem.split("_")[1]): file for file in found}
    steps = sorted(step for step in files if step <= last)[-10:]
    figures = {step: read_npz(files[step], accept) for step in steps}
    for step, arrays in figures.items():
        for name, array in arrays.items():
            if (np.abs(array) > 1e19).any() or name.startswith("kl_") and not (array > -1).all():
                raise InputError(f"{files[step]}: {name} can not be drawn")
    return figures


def draw_summary(folder) -> Figure:
    """The picture of a run: its returns, and for each phase the KLs of Figure 2 and the paths of Figures 6 and 8."""
    groups = read_csv(Path(folder) / "eval.csv")
    last = max((step for steps in groups.values() for step, _ in steps), default=0)
    figures = read_figures(folder, last)
    rows = max(1, len(figures))
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 3)
    axes = figure.add_subplot(grid[:, 0])
    for (split, context), steps in groups.items():
        points = np.array([[step, value] for (step, _), value in steps.items()])
        style = dict(
            color=COLOURS[f"{context} context"], linestyle="-" if split == "test" else "--"
        )
        axes.plot(*points.T, **style, label=f"{split} tasks, {context} context")
    offline = [step for steps in groups.values() for step, transitions in steps if not transitions]
    if offline and max(offline) < last:
        axes.axvspan(max(offline), last, color="0.93", zorder=0, label="self-supervised phase")
    axes.set(xlabel="gradient step", ylabel="post-adaptation return")
    axes.set_title(Path(folder).resolve().name, parse_math=False)
    if groups:
        axes.legend(fontsize=8)
    for number, (step, arrays) in enumerate(figures.items()):
        ground = {name: array for name, array in arrays.items() if not name.startswith("kl_")}
        kls, paths = (figure.add_subplot(grid[number, column]) for column in (1, 2))
        draw_kls(kls, arrays)
        paths.set_visible(bool(ground))
        if ground:
            draw_paths(paths, ground)
        for panel in (kls, paths):
            panel.set_title(f"after {step} gradient steps")
    return figure
