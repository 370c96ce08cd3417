"""Keep what acting needs of a run's agent: python benchmark/agents.py RUN [--out agents/HopperParam.npz]

Takes policy and encoder (MACAW: policy and value function) from the files that a run writes at the end of a phase, as
they were after the offline phase and at the end, and writes them with the run's flags, returns and test tasks into one
file for benchmark/watch.py.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs
from benchmark import watch
from plumbing.files import read_npz, write_file
from plumbing.flags import launch_tool, print_safely


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run
    out: Optional[Path] = None  # file to write; default agents/{env_id}.npz
    env_id: Optional[str] = None  # module:Name, if the run is of a family of one's own
    dataset: Optional[Path] = None  # the dataset of the run; default datasets/{env_id}.npz


def main(args):
    """Write the file, and return its path. Raises InputError."""
    files = [
        file
        for file in args.run.glob("agent_*.npz")
        if re.fullmatch(r"agent_[0-9]{1,15}", file.stem)
    ]
    files = {int(file.stem.split("_")[1]): file for file in files}
    if not files:
        raise buffers.InputError(
            f"there is no agent_*.npz in {args.run}: none of its phases has ended"
        )
    script, flags, tasks, _ = watch.load(args.run, args.env_id, args.dataset)
    arrays, returns = {"script": script.__name__, "test_tasks": tasks}, {}
    arrays["sha256"] = watch.data_hash(args.run) or ""
    kept = watch.SCRIPTS[script.__name__]
    last = max(files)
    # BOReL's offline phase begins after the steps of its VAE.
    offline_end = getattr(flags, "vae_steps", 0) + getattr(flags, "offline_steps", last)
    for step in sorted({offline_end, last} & set(files)):
        found = read_npz(files[step], lambda name, *_: name.startswith((*kept, "flags", "returns")))
        arrays |= {
            f"{step}/{name}": array for name, array in found.items() if name.startswith(kept)
        }
        arrays["flags"], returns[step] = found.get("flags", ""), found.get("returns", "")
    arrays["returns"] = json.dumps(returns)
    out = args.out or watch.ROOT / "agents" / f"{envs.short_name(flags.env_id)}.npz"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    watch.load(out, args.env_id)  # raises if it cannot be read
    return out


if __name__ == "__main__":
    launch_tool(lambda args: print_safely(main(args)), Args)
