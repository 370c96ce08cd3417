"""Pictures and tables of a run: summary.png, the pictures in TensorBoard, the table at its end.

matplotlib is imported where something is drawn: it takes half a second.
"""

import math
import re
from pathlib import Path

import numpy as np

from plumbing.errors import InputError
from plumbing.files import CONTEXTS, SPLITS, read_npz

COLOURS = {  # in every picture of a run, as in the paper's Figures 2, 6 and 8
    "offline data": "tab:red",
    "exploration": "tab:green",
    "offline context": "tab:blue",
    "own context": "tab:orange",
}


# ===== The table of evaluations, see CSV_COLUMNS in plumbing/files.py


def mean_returns(rows) -> dict:
    """Rows (R, 7) -> {(split, context): {(gradient step, new transitions): mean over tasks}}."""
    returns = {}
    for step, env_steps, split, context, _, value, _ in rows.tolist():
        group = SPLITS[int(split)], CONTEXTS[int(context)]
        steps = returns.setdefault(group, {})
        steps.setdefault((int(step), int(env_steps)), []).append(value)
    return {
        group: {moment: float(np.mean(values)) for moment, values in steps.items()}
        for group, steps in returns.items()
    }


def table_of_means(rows) -> str:
    """Every evaluation as text, mean over tasks."""
    groups = mean_returns(rows)
    head = f"{'gradient step':>14}{'transitions':>13}"
    for split, context in groups:
        label = f"{split}, {context} context"
        head += f"{label:>24}"
    lines = ["", "Post-adaptation return, mean over tasks", head]
    moments = dict.fromkeys(moment for steps in groups.values() for moment in steps)
    for moment in moments:
        line = f"{moment[0]:>14}{moment[1]:>13}"
        for steps in groups.values():
            line += f"{steps[moment]:>24.1f}" if moment in steps else " " * 24
        lines.append(line)
    return "\n".join(lines)


def returns_by_task(rows):
    """Returns of the test tasks with the agent's own context.

    Returns task numbers (M,), gradient steps (K,), returns (M, K), NaN where there is none.
    """
    is_test = rows[:, 2] == SPLITS.index("test")
    is_own = rows[:, 3] == CONTEXTS.index("own")
    rows = rows[is_test & is_own]
    steps, columns = np.unique(rows[:, 0], return_inverse=True)
    tasks, lines = np.unique(rows[:, 4], return_inverse=True)
    returns = np.full((len(tasks), len(steps)), np.nan)
    returns[lines, columns] = rows[:, 5]
    return tasks.astype(int), steps.astype(int), returns


# ===== Panels


def draw_paths(axes, ground: dict) -> None:
    """Draw {label: paths (., L+1, 2) in metres} on matplotlib axes, from above."""
    for label, colour in COLOURS.items():
        if label in ground:
            # All paths in one line, with gaps between them
            with_gaps = np.pad(ground[label], ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
            line = with_gaps.reshape(-1, 2)
            axes.plot(*line.T, color=colour, linewidth=0.6, label=label)
    axes.set(aspect="equal", xlabel="x (m)", ylabel="y (m)")
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the paths
    for line in legend.get_lines():
        line.set_linewidth(2)


def draw_kls(axes, arrays: dict) -> None:
    """Figure 2: how far the posterior is from the prior on the training tasks.

    arrays: {kl_train_{context}_context: (E,)}, and others, which are left out.
    """
    kls = {}
    for context in ("offline", "own"):
        kl = arrays.get(f"kl_train_{context}_context")
        if kl is not None:
            kls[f"{context} context"] = kl
    axes.set_visible(bool(kls))  # MACAW has no posterior
    largest = max([1e-6, *(kl.max() for kl in kls.values())])  # rounding may take a KL below 0
    bins = np.linspace(0, largest, 25)
    for context, kl in kls.items():
        style = dict(histtype="step", color=COLOURS[context], linewidth=1.5)
        axes.hist(kl, bins=bins, label=f"{context}, mean {kl.mean():.1f}", **style)
    axes.set(xlabel="KL of the posterior to the prior", ylabel="meta-episodes on training tasks")
    axes.margins(y=0.3)  # above the bars is room for the legend
    if kls:
        axes.legend(fontsize=8, loc="upper left")


def draw_returns(axes, rows) -> None:
    """The mean returns of all evaluations; the self-supervised phase has a grey background."""
    groups = mean_returns(rows)
    for (split, context), steps in groups.items():
        points = np.array([[step, value] for (step, _), value in steps.items()])
        style = dict(color=COLOURS[f"{context} context"])
        style["linestyle"] = "-" if split == "test" else "--"
        axes.plot(*points.T, **style, label=f"{split} tasks, {context} context")
    border = end_of_offline_phase(rows)
    if border:
        last = rows[:, 0].max()
        axes.axvspan(border, last, color="0.93", zorder=0, label="self-supervised phase")
    axes.set(xlabel="gradient step", ylabel="post-adaptation return")
    if groups:
        axes.legend(fontsize=8)


def end_of_offline_phase(rows):
    """The last gradient step that was evaluated before there were new transitions, or None."""
    is_offline = rows[:, 1] == 0
    if is_offline.all() or not is_offline.any():
        return None
    return rows[is_offline, 0].max()


def draw_tasks(axes, rows) -> None:
    """A field for each test task and evaluation: a mean can hide that one task collapses."""
    tasks, steps, returns = returns_by_task(rows)
    axes.set_visible(bool(len(tasks)))
    if not len(tasks):
        return
    image = axes.imshow(returns, aspect="auto", origin="lower", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    columns = np.unique(np.linspace(0, len(steps) - 1, 4).round().astype(int))
    axes.set_xticks(columns, [str(step) for step in steps[columns]])
    lines = np.unique(np.linspace(0, len(tasks) - 1, 11).round().astype(int))
    axes.set_yticks(lines, [str(task) for task in tasks[lines]])
    border = end_of_offline_phase(rows)
    if border in steps:
        axes.axvline(list(steps).index(border) + 0.5, color="white", linewidth=1.5)
    axes.set(xlabel="gradient step", ylabel="test task")
    axes.set_title("return of each test task, own context", fontsize=10)


# ===== Whole figures


def paths_figure(arrays: dict):
    """The paths of an evaluation, for TensorBoard."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    draw_paths(figure.subplots(), arrays)
    return figure


def tasks_figure(rows):
    """The returns by task of all evaluations so far, for TensorBoard."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    draw_tasks(figure.subplots(), rows)
    return figure


def read_figures(folder, last=math.inf) -> dict:
    """The last ten figures_{step}.npz of a run, up to a step.

    Returns {step: {name: KLs (E,), or paths (., L+1, 2)}}.

    Raises InputError: they cannot be read, or hold numbers that cannot be drawn.
    """

    def accept(name, dtype, shape):
        is_kl = name.startswith("kl_") and len(shape) == 1
        is_paths = not name.startswith("kl_") and len(shape) == 3 and shape[2] == 2
        return (is_kl or is_paths) and dtype == np.float32 and 0 < math.prod(shape) <= 1 << 21

    files = {}
    for file in Path(folder).glob("figures_*.npz"):
        if re.fullmatch(r"figures_\d{1,16}", file.stem):
            files[int(file.stem.split("_")[1])] = file
    steps = sorted(step for step in files if step <= last)[-10:]
    figures = {step: read_npz(files[step], accept) for step in steps}
    for step, arrays in figures.items():
        for name, array in arrays.items():
            too_large = (np.abs(array) > 1e19).any()
            no_kl = name.startswith("kl_") and not (array > -1).all()
            if too_large or no_kl:
                raise InputError(f"{files[step]}: {name} cannot be drawn")
    return figures


def draw_summary(folder, rows):
    """The picture of a run: its returns, those of each test task, and for each phase the KLs of
    Figure 2 and the paths of Figures 6 and 8.

    Args:
        folder: of the run; figures_{step}.npz are read from it.
        rows: its table of evaluations (R, 7).
    """
    from matplotlib.figure import Figure

    last = rows[:, 0].max(initial=0)
    figures = read_figures(folder, last)
    height = max(1, len(figures))
    figure = Figure(figsize=(17, 3.6 * height), layout="constrained")
    grid = figure.add_gridspec(height, 4)
    returns = figure.add_subplot(grid[:, 0])
    draw_returns(returns, rows)
    returns.set_title(Path(folder).resolve().name, parse_math=False)
    draw_tasks(figure.add_subplot(grid[:, 1]), rows)
    for number, (step, arrays) in enumerate(figures.items()):
        kls = figure.add_subplot(grid[number, 2])
        draw_kls(kls, arrays)
        kls.set_title(f"after {step} gradient steps")
        ground = {name: array for name, array in arrays.items() if not name.startswith("kl_")}
        paths = figure.add_subplot(grid[number, 3])
        paths.set_visible(bool(ground))
        paths.set_title(f"after {step} gradient steps")
        if ground:
            draw_paths(paths, ground)
    return figure
