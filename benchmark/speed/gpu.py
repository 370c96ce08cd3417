"""What the scripts do on a GPU: python benchmark/speed/gpu.py, a part of benchmark/speed/gpu.sh; under six minutes

Of each script: gradient steps a second at its default sizes, with the step recorded as a CUDA graph, without, and
compiled and recorded; how far apart they end after 20 steps of each phase (in SMAC's second phase after the buffer
grew); whether a run that is stopped and resumed ends like one that is not. Of SMAC's plain step: the share of its time
in which the GPU computes, the rest is spent on launching. Writes benchmark/results/speed/gpu.md and prints it.
"""

import contextlib
import dataclasses
import functools
import io
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark.speed import speed
from plumbing.files import read_npz
from plumbing.flags import preset
from plumbing.machine import versions


@dataclasses.dataclass
class Args:
    device: str = "cuda"  # "cpu" tries the script itself
    env_id: str = "HopperParam"
    steps: int = 1_000  # gradient steps that are timed
    file: Path = ROOT / "benchmark" / "results" / "speed" / "gpu.md"


ONLINE = dict(online_iterations=1, prior_steps=200, posterior_steps=200)
PHASES = {  # script: {phase: the flags of a run of so many steps}
    smac: {
        "offline": lambda steps: dict(offline_steps=steps, online_iterations=0),
        "self-supervised": lambda steps: (
            dict(offline_steps=0, updates_per_iteration=steps) | ONLINE
        ),
        "both": lambda steps: dict(offline_steps=steps, updates_per_iteration=steps) | ONLINE,
    },
    pearl: {"online": lambda steps: dict(updates_per_iteration=steps, initial_steps=200) | ONLINE},
    meta_bc: {"offline": lambda steps: dict(offline_steps=steps)},
    focal: {"offline": lambda steps: dict(offline_steps=steps)},
    macaw: {"offline": lambda steps: dict(offline_steps=steps)},
    borel: {
        "VAE": lambda steps: dict(vae_steps=steps, offline_steps=1),
        "SAC": lambda steps: dict(vae_steps=1, offline_steps=steps),
    },
}


def train(script, folder, args, **flags):
    """Train with small evaluations. Returns the last checkpoint's arrays and what the run logged as steps a second."""
    rates, scalars, before = [], buffers.Run.add_scalars, envs.make_evaluation

    def record(run, values):
        rates.extend(value for name, value in values.items() if name == "train/SPS")
        scalars(run, values)

    envs.make_evaluation = functools.partial(
        envs.make_evaluation, num_train=1, num_test=1, repeats=1
    )
    buffers.Run.add_scalars = record
    try:
        flags = {"eval_every": 10**6, "device": args.device, "run_dir": str(folder)} | flags
        if not flags.get("resume"):
            flags["env_id"] = args.env_id
        with contextlib.redirect_stdout(io.StringIO()):
            buffers.train(script, **flags)
    finally:
        envs.make_evaluation, buffers.Run.add_scalars = before, scalars
    (file,) = Path(folder).glob("*/checkpoint.npz")
    return read_npz(file, lambda name, *_: name.startswith(("agent/", "optimizer/"))), rates


def apart(first, second):
    """The largest difference of two checkpoints, relative to the largest number of its array."""
    pairs = [
        (np.abs(first[name] - second[name]).max(initial=0), np.abs(first[name]).max(initial=0))
        for name in first
    ]
    return max(difference / max(size, 1e-8) for difference, size in pairs)


def stop_and_resume(script, folder, args, **flags):
    """Stop by SIGTERM in the middle of a run, and resume."""
    steps, log = [], buffers.Run.log

    def stop(run, info):
        log(run, info)
        steps.append(1)
        if len(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    buffers.Run.log = stop
    try:
        train(script, folder, args, **flags)
    except SystemExit:
        pass
    finally:
        buffers.Run.log = log
    (run,) = Path(folder).iterdir()
    return train(script, folder, args, resume=str(run), device=args.device)[0]


def busy(args):
    """The share of the time of SMAC's plain offline step in which the GPU computes."""
    flags, spec = preset(smac.Args, smac.PRESETS, args.env_id), envs.lookup(args.env_id)
    agent = smac.Agent(spec.obs_dim, spec.action_dim, flags).to(args.device)
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=flags.lr, fused=True, capturable=True)
    buffer, rng = (
        speed.random_buffer(spec, 50, device=args.device),
        torch.Generator(args.device).manual_seed(0),
    )
    for count in (5, 50):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            start = time.perf_counter()
            for _ in range(count):
                smac.update(agent, optimizer, smac.sample_batch(buffer, flags, rng), flags, False)
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / wall


WAYS = {  # how a step is made
    "recorded": dict(cuda_graph=True),
    "plain": dict(cuda_graph=False),
    "compiled and recorded": dict(cuda_graph=True, compile=True),
}
HEADER = ["script", "phase", *(f"{way} (steps/s)" for way in WAYS)]
HEADER += ["plain apart", "compiled apart", "resumed apart"]


def measure(script, flags, args):
    """Steps a second of each way, and how far the ends of the others are from the recorded one."""
    ends = {}
    speeds = []
    with tempfile.TemporaryDirectory() as folder:
        for way, switches in WAYS.items():
            ends[way], _ = train(script, f"{folder}/{way}", args, **switches, **flags(20))
            timed = flags(args.steps)
            _, rates = train(script, f"{folder}/timed {way}", args, **switches, **timed)
            speeds.append(statistics.median(rates[1:] or rates))
        resumed = stop_and_resume(
            script, f"{folder}/resumed", args, **WAYS["recorded"], **flags(20)
        )
    recorded = ends["recorded"]
    others = ends["plain"], ends["compiled and recorded"], resumed
    return [f"{rate:.0f}" for rate in speeds] + [f"{apart(recorded, x):.1e}" for x in others]


def main(args):
    rows = []
    for script, phases in PHASES.items():
        for phase, flags in phases.items():
            rows.append([script.__name__, phase, *measure(script, flags, args)])
            print(*rows[-1], sep="  ", flush=True)
    cuda = args.device == "cuda"
    text = f"{torch.cuda.get_device_name() if cuda else 'no GPU'}, {versions()['cpu']}, PyTorch "
    text += f"{torch.__version__}; {args.env_id}, default sizes.\n\n"
    text += speed.table(HEADER, rows)
    if cuda:
        text += (
            f"\nThe GPU computes during {100 * busy(args):.0f} % of SMAC's plain offline step.\n"
        )
    args.file.write_text(text)
    print(f"\n{text}", end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
