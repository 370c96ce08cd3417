"""Figures 2, 6 and 8 of a run: python benchmark/figures.py runs/PointDirection__smac_offline_online__1

A row for each figures_{step}.npz of the run, one after each phase. First how far the posterior is from the prior, with
offline and with online context on the same training tasks (Figure 2). Then, in the Direction families, the paths over
ground: post-adaptation with either context (Figure 6), and with the exploration and the dataset (Figure 8).
"""

import dataclasses
import sys
from pathlib import Path

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
from plumbing.files import write_file
from plumbing.flags import launch_tool
from plumbing.pictures import draw_kls, draw_paths, read_figures


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run
    out: Path = Path("figures.png")  # picture to write


def main(args):
    """Draw. Raises InputError."""
    figures = read_figures(args.run)
    if not figures:
        raise buffers.InputError(f"there is no figures_*.npz in {args.run}")
    figure = Figure(figsize=(12, 3.8 * len(figures)), layout="constrained")
    for row, (step, arrays) in zip(
        figure.subplots(len(figures), 3, squeeze=False), figures.items()
    ):
        draw_kls(row[0], arrays)
        row[0].set_title(f"after {step} steps")
        everything = {name: array for name, array in arrays.items() if not name.startswith("kl_")}
        contexts = {name: array for name, array in everything.items() if name.endswith("context")}
        for axis, ground, title in (
            (row[1], contexts, "Figure 6"),
            (row[2], everything, "Figure 8"),
        ):
            axis.set_visible(bool(ground))
            if ground:
                draw_paths(axis, ground)
                axis.set_title(title)
    # "tight": without the room for what is not drawn
    style = dict(format=args.out.suffix[1:] or "png", dpi=100, bbox_inches="tight")
    write_file(args.out, lambda file: figure.savefig(file, **style))


if __name__ == "__main__":
    launch_tool(main, Args)
