"""The shipped gradient step against a plain one, at both precisions: python benchmark/precision.py, two minutes

A plain version of SMAC's step (benchmark/plain_update.py) and the shipped one, each with matrix products at "highest"
and at "medium" precision; in one process, in turn, so that what disturbs one disturbs all. Appends a table of medians,
and which precision `Run.fast` takes, to benchmark/results/speed/precision.md.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs
import smac_offline_online as smac
from benchmark import speed
from benchmark.plain_update import PlainAgent, plain_update
from plumbing.flags import preset
from plumbing.machine import matmul_precision, versions

SIZES = {"the paper's": ("paper", {}), "rl_batch 64": ("paper", {"rl_batch": 64}), "short": ("short", {})}


@dataclasses.dataclass
class Args:
    env_id: str = "HopperParam"
    rounds: int = 40  # steps of each kind that are timed
    file: Path = ROOT / "benchmark" / "results" / "speed" / "precision.md"


def times(functions, rounds):
    """The median milliseconds of each function, called in turn."""
    found = [[] for _ in functions]
    for turn in range(rounds + 3):
        for function, taken in zip(functions, found):
            start = time.perf_counter()
            function()
            if turn >= 3:
                taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in found]


def main(cli):
    rows, spec, device = [], envs.lookup(cli.env_id), torch.device("cpu")
    for name, (variant, flags) in SIZES.items():
        args = dataclasses.replace(preset(smac.Args, smac.PRESETS, cli.env_id, variant), **flags)
        agent, batch, steps, _ = speed.make(spec, args)
        plain = PlainAgent(agent, args.lr)
        for online in (False, True):
            kinds = {
                (kind, precision): (step, precision)
                for kind, step in (("plain", lambda: plain_update(plain, batch, args, online)), ("", steps[online]))
                for precision in ("highest", "medium")
            }

            def run(step, precision):
                torch.set_float32_matmul_precision(precision)
                step()

            found = dict(zip(kinds, times([lambda kind=kind: run(*kind) for kind in kinds.values()], cli.rounds)))
            taken = matmul_precision(device, args.meta_batch * args.rl_batch, args.policy_hidden[0])
            shipped = found["", taken]
            best = min(found["", "highest"], found["", "medium"])
            ratios = found["plain", "highest"] / shipped, found["plain", "medium"] / shipped, shipped / best
            row = [name, "self-supervised" if online else "offline", *(f"{ms:.1f}" for ms in found.values()), taken]
            rows.append([*row, *(f"{ratio:.2f}" for ratio in ratios)])
            print(*rows[-1], sep="  ", flush=True)
    torch.set_float32_matmul_precision("highest")
    text = f"{versions()['cpu']}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}, {cli.env_id}; ms a "
    text += "step, medians.\n\n"
    header = "sizes, phase, plain highest, plain medium, shipped highest, shipped medium, taken"
    text += speed.table(
        [*header.split(", "), "plain highest / shipped", "plain medium / shipped", "shipped / better of both"], rows
    )
    with open(cli.file, "a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
