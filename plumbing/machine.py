"""What a run finds: its device, how fast and how exact products are there, versions; recording a step on a GPU."""

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import platform
import re
import sys
import time
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
        raise InputError(f"--device {args.device}: the GPU can not be used ({error}); --device cpu works") from None


def versions(device=None) -> dict:
    """What a result may depend on beside its flags; the GPU's name where `device` is one."""
    found = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine()}
    with contextlib.suppress(OSError, IndexError):
        found["cpu"] = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    for name in ("torch", "numpy", "gymnasium", "mujoco", "pybullet"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device and device.type == "cuda" else {})


def keep_freed_memory():
    """glibc gives large freed blocks back to the system: thousands of page faults in a step. Let it keep them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((-3, 1 << 25), (-2, 1 << 26), (-1, (1 << 31) - 1)) if mallopt else ():
        mallopt(option, size)  # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD


@functools.cache
def matmul_precision(device, rows, width):
    """The precision of matrix products: "medium" where it is as exact as "highest" and faster, else "highest"."""
    keep_freed_memory()
    generator, before, times = torch.Generator().manual_seed(0), torch.get_float32_matmul_precision(), {}
    x, w = (torch.randn(n, width, generator=generator).to(device) for n in (min(rows, 4096), width))
    exact = x.double() @ w.double()
    try:
        for precision in 8 * ["highest", "medium"]:
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            error = ((x @ w - exact).norm() / exact.norm()).item()
            times[precision] = min(time.perf_counter() - start, times.get(precision, math.inf))
            if error > 1e-5:
                return "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if times["medium"] < 0.9 * times["highest"] else "highest"  # not by chance where they are the same


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
        if calls[key] <= 3:  # as it is, on a stream of its own, so that libraries allocate what they need
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
                raise InputError(f"no CUDA graph can be made ({error}): --no-cuda-graph goes without") from None
        records[key][0].replay()
        return records[key][1]

    return call
