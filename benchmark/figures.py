"""Figures 2, 6 and 8 of a run: python benchmark/figures.py runs/PointDirection__smac_offline_online__1

A row for each figures_{step}.npz of the run, one after each phase. First how far the posterior is from the prior, with
offline and with online context on the same training tasks (Figure 2). Then, in the Direction families, the paths over
ground: post-adaptation with either context (Figure 6), and with the exploration and the dataset (Figure 8).
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from buffers import draw_paths


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """folder of a run"""
    out: Path = Path("figures.png")
    """picture to write"""


def main(args):
    files = sorted(args.run.glob("figures_*.npz"), key=lambda file: int(file.stem.split("_")[1]))
    if not files:
        print(f"error: there is no figures_*.npz in {args.run}", file=sys.stderr)
        sys.exit(2)
    figure, axes = plt.subplots(len(files), 3, figsize=(12, 3.8 * len(files)), squeeze=False)
    for row, file in zip(axes, files):
        with np.load(file, allow_pickle=False) as arrays:
            arrays = dict(arrays)
        kls = {context: arrays.get(f"kl_train_{context}_context") for context in ("offline", "online")}
        kls = {context: kl for context, kl in kls.items() if kl is not None}
        row[0].set_visible(bool(kls))  # MACAW has no posterior
        bins = np.linspace(0, max((kl.max() for kl in kls.values()), default=1), 25)
        for (context, kl), colour in zip(kls.items(), ("tab:blue", "tab:orange")):
            row[0].hist(kl, bins=bins, color=colour, alpha=0.6, label=f"{context} context, mean {kl.mean():.1f}")
        row[0].set(title=f"after {file.stem.split('_')[1]} steps", xlabel="KL of the posterior to the prior")
        if kls:
            row[0].legend(fontsize=7)
        contexts = {name: arrays[name] for name in ("offline context", "online context") if name in arrays}
        everything = {name: array for name, array in arrays.items() if not name.startswith("kl_")}
        for axis, ground, title in ((row[1], contexts, "Figure 6"), (row[2], everything, "Figure 8")):
            axis.set_visible(bool(ground))
            if ground:
                draw_paths(axis, ground)
                axis.set_title(title)
    figure.tight_layout()
    figure.savefig(args.out, dpi=100, bbox_inches="tight")  # without the room for what is not drawn


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
