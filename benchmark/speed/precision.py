"""The shipped gradient step against a plain one, at both precisions: python benchmark/speed/precision.py, five minutes

A plain version of SMAC's step (benchmark/speed/plain_update.py) and the shipped one, each with matrix products at "highest"
and at "medium" precision, and the shipped one with --compile at the precision that `Run.fast` takes; in one process, in
turn, so that what disturbs one disturbs all, and in another order each time, as what a step finds in the caches is of
the one before. Appends a table of medians to benchmark/results/speed/precision.md.
"""

import dataclasses
import os
import random
import statistics
import sys
import time
from pathlib import Path

import tyro

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = (
    "1"  # read with PyTorch: every step is compiled anew
)
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import envs
import smac_offline_online as smac
from benchmark.speed import speed
from benchmark.speed.plain_update import PlainAgent, plain_update
from plumbing.flags import preset
from plumbing.machine import versions

SIZES = {
    "the paper's": ("paper", {}),
    "rl_batch 64": ("paper", {"rl_batch": 64}),
    "short": ("short", {}),
}


@dataclasses.dataclass
class Args:
    env_id: str = "HopperParam"
    rounds: int = 40  # steps of each kind that are timed
    file: Path = ROOT / "benchmark" / "results" / "speed" / "precision.md"


def times(functions, rounds):
    """The median milliseconds of each function, called in turn, in an order that changes."""
    found, order, rng = [[] for _ in functions], [*range(len(functions))], random.Random(0)
    for turn in range(rounds + 3):
        rng.shuffle(order)
        for i in order:
            start = time.perf_counter()
            functions[i]()
            if turn >= 3:
                found[i].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in found]


def main(cli):
    rows, spec = [], envs.lookup(cli.env_id)
    for name, (variant, flags) in SIZES.items():
        args = dataclasses.replace(preset(smac.Args, smac.PRESETS, cli.env_id, variant), **flags)
        agent, batch, steps, _ = speed.make(spec, args)
        plain, taken = PlainAgent(agent, args.lr), speed.set_precision(args)
        for online in (False, True):
            torch.compiler.reset()  # or it would go on without compiling, after some sizes
            kinds = {
                (kind, precision): (step, precision)
                for kind, step in (
                    ("plain", lambda: plain_update(plain, batch, args, online)),
                    ("", steps[online]),
                )
                for precision in ("highest", "medium")
            }
            kinds["compiled", taken] = torch.compile(steps[online]), taken

            def run(step, precision):
                torch.set_float32_matmul_precision(precision)
                step()

            start = time.perf_counter()
            run(*kinds["compiled", taken])
            compiling = time.perf_counter() - start
            found = dict(
                zip(
                    kinds,
                    times([lambda kind=kind: run(*kind) for kind in kinds.values()], cli.rounds),
                )
            )
            shipped, plainest, compiled = (
                found["", taken],
                found["plain", "highest"],
                found["compiled", taken],
            )
            best = min(found["", "highest"], found["", "medium"])
            ratios = plainest / shipped, found["plain", "medium"] / shipped, shipped / best
            ratios += (plainest / compiled,)
            row = [
                name,
                "self-supervised" if online else "offline",
                *(f"{ms:.1f}" for ms in found.values()),
                taken,
            ]
            rows.append([*row, *(f"{ratio:.2f}" for ratio in ratios), f"{compiling:.0f}"])
            rows[-1].append(
                f"{1e3 * compiling / (shipped - compiled):.0f}" if compiled < shipped else "never"
            )
            print(*rows[-1], sep="  ", flush=True)
    torch.set_float32_matmul_precision("highest")
    text = f"{versions()['cpu']}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}, {cli.env_id}; ms a "
    text += "step, medians.\n\n"
    header = "sizes, phase, plain highest, plain medium, shipped highest, shipped medium, compiled, taken"
    text += speed.table(
        [
            *header.split(", "), "plain highest / shipped", "plain medium / shipped", "shipped / better of both",
            "plain highest / compiled", "s of compiling", "pays from step",
        ],
        rows,
    )  # fmt: skip
    with open(cli.file, "a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
