"""What it costs never to lose a run: python benchmark/cost.py

SMAC on HopperParam at the paper's sizes, but with few gradient steps: 50 self-supervised iterations of 5 x 1000
transitions, a checkpoint after each, the last ones with the buffer as full as it gets. Writes cost.md: memory, open
files and threads over the iterations; the time of a checkpoint against that of the gradient steps between two. Linux.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import smac_offline_online as smac

UPDATES = 20
FLAGS = f"--env-id HopperParam --device cpu --offline-steps {UPDATES} --updates-per-iteration {UPDATES}"
FLAGS += f" --checkpoint-every {UPDATES} --eval-every 1000000"
OUT = ROOT / "benchmark" / "results" / "robustness" / "cost.md"


def resident():
    """MB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    save, update, rows, saves, updates = smac.save_checkpoint, smac.update, [], [], []

    def timed_update(*args, **kwargs):
        began = time.process_time()  # other programs on the machine do not count; a wait for the disk, below, does
        info = update(*args, **kwargs)
        updates.append(time.process_time() - began)
        return info

    def timed_save(run, args, step, env_steps, parts, generators):
        began = time.time()
        save(run, args, step, env_steps, parts, generators)
        saves.append(time.time() - began)
        buffer = parts["buffer"]
        filled = buffer.used * 4 * sum(field.shape[1] for field in buffer.fields.values())
        filled += 4 * sum(int(buffer.sizes[name].sum()) for name in buffer.tables)
        size = (run / "checkpoint.pt").stat().st_size / 1e6
        rows.append((step // UPDATES - 1, buffer.used, filled / 1e6, resident(), len(os.listdir("/proc/self/fd")),
                     threading.active_count(), size))  # fmt: skip

    smac.save_checkpoint, smac.update = timed_save, timed_update
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        smac.main(smac.parse_args([*FLAGS.split(), "--run-dir", folder]))

    write, step, every = np.median(saves[-10:]), np.median(updates[UPDATES:]), smac.Args().checkpoint_every
    text = f"""`python benchmark/cost.py`, one thread: `smac_offline_online.py {FLAGS}`

- a checkpoint of {rows[-1][-1]:.1f} MB takes {write:.2f} s (median of the last ten; wall clock, fsync included)
- the {every} gradient steps between two take {every * step:.0f} s, {1000 * step:.0f} ms each (median; CPU time)
- so checkpoints are {100 * write / (write + every * step):.2f} % of the time, collection and evaluation aside;
  they would be 1 % at {every / (99 * write):.0f} gradient steps a second

| iteration | transitions | buffer filled, MB | process, MB | open files | threads |
|---|---|---|---|---|---|
"""
    for at in (0, 1, *range(5, 51, 5)):
        text += "| {} | {} | {:.1f} | {:.1f} | {} | {} |\n".format(*rows[at][:-1])
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
