"""What it costs never to lose a run: python benchmark/speed/cost.py

SMAC on HopperParam at the paper's sizes, but with few gradient steps and without evaluations: 50 self-supervised
iterations of 5 x 1000 transitions, a checkpoint after each, the last ones with the buffer as full as it gets. Writes
cost.md: memory, open files and threads over the iterations; the time of a checkpoint against that of the gradient steps
between two. Linux.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import smac_offline_online as smac
from plumbing.flags import parse_args
from plumbing.machine import versions

UPDATES = 20
FLAGS = (
    f"--env-id HopperParam --device cpu --offline-steps {UPDATES} --updates-per-iteration {UPDATES}"
)
FLAGS += f" --eval-every {UPDATES}"
OUT = ROOT / "benchmark" / "results" / "robustness" / "cost.md"
ROW = "| {} | {} | {:.1f} | {:.1f} | {} | {} |\n"


def resident():
    """MB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(flags=FLAGS, out=OUT):
    save, update, evaluate, rows, saves, updates = (
        buffers.Run.save,
        smac.update,
        smac.evaluate,
        [],
        [],
        [],
    )

    def timed_update(*args, **kwargs):
        began = (
            time.process_time()
        )  # other programs on the machine do not count; a wait for the disk, below, does
        info = update(*args, **kwargs)
        updates.append(time.process_time() - began)
        return info

    def timed_save(run):
        began = time.time()
        save(run)
        saves.append(time.time() - began)
        buffer = run.parts["buffer"].state_dict()
        tensors = [*buffer["fields"].values(), *buffer["index"].values()]
        filled, used = (
            sum(x.numel() * x.element_size() for x in tensors),
            len(buffer["fields"]["obs"]),
        )
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        rows.append((len(rows), used, filled / 1e6, resident(), files, threads))
        rows[-1] += (run.checkpoint.stat().st_size / 1e6,)

    buffers.Run.save, smac.update, smac.evaluate = timed_save, timed_update, lambda *_: ({}, {})
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            words = [*flags.split(), "--run-dir", folder]
            smac.main(parse_args(smac.Args, smac.PRESETS, words))
    finally:
        buffers.Run.save, smac.update, smac.evaluate = save, update, evaluate

    write, step, every = (
        np.median(saves[-10:]),
        np.median(updates[UPDATES:]),
        smac.Args().eval_every,
    )
    text = f"""`python benchmark/speed/cost.py`, one thread, {versions()["cpu"]}: `smac_offline_online.py {flags}`

- a checkpoint of {rows[-1][-1]:.1f} MB takes {write:.2f} s (median of the last ten; wall clock, fsync included)
- the {every} gradient steps between two take {every * step:.0f} s, {1000 * step:.0f} ms each (median; CPU time)
- so checkpoints are {100 * write / (write + every * step):.2f} % of the time, collection and evaluation aside;
  they would be 1 % at {every / (99 * write):.0f} gradient steps a second

| iteration | transitions | buffer filled, MB | process, MB | open files | threads |
|---|---|---|---|---|---|
"""
    shown = {0, 1, *range(5, len(rows), 5), len(rows) - 1}
    text += "".join(ROW.format(*row[:-1]) for row in rows if row[0] in shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
