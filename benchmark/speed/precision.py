"""The shipped gradient step against a plain one, and compiled: python benchmark/speed/precision.py

Times SMAC's step in both phases: a plain version of it (benchmark/speed/plain_update.py), at both
precisions of matrix products; the shipped one at both; and the shipped one with --compile, at the
precision that `Run.fast` takes. All in one process and in turn, so that what disturbs one disturbs
all, and in another order each time, since what a step finds in the caches is of the one before.

Appends a table of medians to benchmark/results/speed/precision.md: milliseconds of the processor a
step, which other work on the machine changes little, and by the clock. Five minutes or more.
"""

import dataclasses
import os
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import tyro

# Read when PyTorch is imported: every step is compiled anew.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import envs
import smac_offline_online as smac
from benchmark.speed import speed
from benchmark.speed.plain_update import PlainAgent, plain_update
from plumbing.flags import preset
from plumbing.machine import compile_step, versions

SIZES = {
    "the paper's": ("paper", {}),
    "rl_batch 64": ("paper", {"rl_batch": 64}),
    "short": ("short", {}),
}
KINDS = ["plain highest", "plain medium", "shipped highest", "shipped medium", "compiled"]
RATIOS = ["plain / shipped", "shipped / compiled", "shipped / compiled by the clock"]


@dataclasses.dataclass
class Args:
    env_id: str = "HopperParam"
    sizes: tuple[str, ...] = tuple(SIZES)  # which of SIZES
    rounds: int = 40  # steps of each kind that are timed
    file: Path = ROOT / "benchmark" / "results" / "speed" / "precision.md"


def times(functions, rounds):
    """Call the functions in turn, in an order that changes.

    Returns for each its median milliseconds, of the processor and by the clock.
    """
    taken = [([], []) for _ in functions]
    order = list(range(len(functions)))
    rng = random.Random(0)
    for turn in range(rounds + 3):
        rng.shuffle(order)
        for i in order:
            processor = time.process_time()
            clock = time.perf_counter()
            functions[i]()
            if turn >= 3:
                taken[i][0].append(1e3 * (time.process_time() - processor))
                taken[i][1].append(1e3 * (time.perf_counter() - clock))
    return [(statistics.median(processor), statistics.median(clock)) for processor, clock in taken]


def at_precision(step, precision):
    """The step as a function without arguments, at a precision of matrix products."""

    def call():
        torch.set_float32_matmul_precision(precision)
        step()

    return call


def measure(spec, args, self_supervised, rounds):
    """One row of the table: what stands behind sizes and phase."""
    torch.compiler.reset()  # after some sizes it would go on without compiling
    agent, batch, steps, _ = speed.make(spec, args)
    taken = speed.set_precision(args)
    plain_agent = PlainAgent(agent, args.lr)
    plain = partial(plain_update, plain_agent, batch, args, self_supervised)
    shipped = steps[self_supervised]
    compiled = at_precision(compile_step(shipped), taken)
    functions = [
        at_precision(plain, "highest"),
        at_precision(plain, "medium"),
        at_precision(shipped, "highest"),
        at_precision(shipped, "medium"),
        compiled,
    ]
    start = time.perf_counter()
    compiled()
    seconds = time.perf_counter() - start

    found = dict(zip(KINDS, times(functions, rounds)))
    torch.set_float32_matmul_precision("highest")
    best_plain = found["plain highest"][0]
    ours, ours_by_clock = found[f"shipped {taken}"]
    compiled_ms, compiled_by_clock = found["compiled"]
    ratios = [best_plain / ours, ours / compiled_ms, ours_by_clock / compiled_by_clock]
    cells = [f"{processor:.2f} ({clock:.2f})" for processor, clock in found.values()]
    return [*cells, taken, *(f"{ratio:.2f}" for ratio in ratios), f"{seconds:.0f}"]


def main(cli):
    spec = envs.lookup(cli.env_id)
    rows = []
    for name in cli.sizes:
        variant, flags = SIZES[name]
        args = preset(smac.Args, smac.PRESETS, cli.env_id, variant)
        args = dataclasses.replace(args, **flags)
        if args.num_critics != 2 or args.awr_weights != "softmax":
            sys.exit(f"error: plain_update.py has two critics and softmax, {cli.env_id} has not")
        for phase, self_supervised in (("offline", False), ("self-supervised", True)):
            rows.append([name, phase, *measure(spec, args, self_supervised, cli.rounds)])
            print(*rows[-1], sep="  ", flush=True)
    found = versions()
    words = f"{found['cpu']} ({found['cpu_capability']}), {torch.get_num_threads()} thread(s)"
    header = ["sizes", "phase", *KINDS, "taken", *RATIOS, "s of compiling"]
    with open(cli.file, "a") as file:
        file.write(f"{words}, PyTorch {torch.__version__}, {cli.env_id}; ms of the processor a ")
        file.write("step (by the clock), medians.\n\n")
        file.write(speed.table(header, rows) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
