"""What a run finds: its device, how fast and how exact products are there, versions; recording a step on a GPU."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from envs import InputError


def choose_device(args) -> torch.device:
    """The device of --device, tried. Raises InputError."""
    if args.device == "cpu" or args.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        return torch.ones(1, device="cuda").add(1).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {args.device}: the GPU can not be used ({error}); --device cpu works"
        ) from None


def versions(device=None) -> dict:
    """What a result may depend on beside its flags; the GPU's name where `device` is one."""
    found = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine()}
    with contextlib.suppress(OSError, IndexError):
        found["cpu"] = re.findall(
            r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )[0]
    for name in ("torch", "numpy", "gymnasium", "mujoco", "pybullet"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found | (
        {"gpu": torch.cuda.get_device_name(device)} if device and device.type == "cuda" else {}
    )


def commit():
    """The commit of the code that runs, with "+" where files differ from it; None where there is no git."""
    here = Path(__file__).resolve().parent
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(words, cwd=here, capture_output=True, encoding="utf-8", timeout=10)
        return found.stdout.strip() or None


def keep_freed_memory():
    """glibc gives large freed blocks back to the system: thousands of page faults in a step. Let it keep them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((-3, 1 << 25), (-2, 1 << 26), (-1, (1 << 31) - 1)) if mallopt else ():
        mallopt(option, size)  # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD


@functools.cache
def matmul_precision(device, rows, width):
    """The precision of matrix products: "medium" where it is as exact as "highest" and faster, else "highest".

    The answer is the same every time on a kind of processor, so that a seed gives the same numbers however busy the
    machine is. PyTorch hands "medium" to oneDNN. With AVX-512 and no bfloat16 units its products are true float32 and
    take 0.65 of the time; with AVX2 they take as long; where there are bfloat16 units, or on a GPU, they are rounded.
    MATMUL_PRECISION in the environment decides instead: benchmark/run.py sets it, so that a label has one precision.
    """
    keep_freed_memory()
    if "MATMUL_PRECISION" in os.environ:
        return os.environ["MATMUL_PRECISION"]
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "highest"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(min(rows, 4096), width, generator=generator)
    w = torch.randn(width, width, generator=generator)
    exact = x.double() @ w.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = (x @ w - exact).norm() / exact.norm()
    torch.set_float32_matmul_precision(before)
    return "medium" if error < 1e-5 else "highest"


def record(function):
    """On a GPU: `function` recorded on its fourth call and replayed, one launch in place of hundreds; a record for each
    set of keyword arguments. Raises InputError if that fails.

    What is recorded keeps the places of its tensors: arguments must be the same objects in every call, or what another
    recorded function returned; every call overwrites what the one before returned.
    """
    stream, calls, records = torch.cuda.Stream(), {}, {}

    def call(*arguments, **flags):
        key = tuple(flags.items())
        calls[key] = calls.get(key, 0) + 1
        if (
            calls[key] <= 3
        ):  # as it is, on a stream of its own, so that libraries allocate what they need
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function(*arguments, **flags)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if key not in records:
            graph = torch.cuda.CUDAGraph()
            try:
                for argument in arguments:
                    if isinstance(argument, torch.Generator):
                        graph.register_generator_state(argument)
                with torch.cuda.graph(graph):  # records, computes nothing
                    records[key] = graph, function(*arguments, **flags)
            except RuntimeError as error:
                raise InputError(
                    f"no CUDA graph can be made ({error}): --no-cuda-graph goes without"
                ) from None
        records[key][0].replay()
        return records[key][1]

    return call
