"""What a run finds: device, how fast and how exact products are there, versions; CUDA graphs."""

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

from plumbing.errors import InputError

# ----- What there is


def choose_device(args) -> torch.device:
    """The device of --device, tried. Raises InputError."""
    no_gpu = args.device == "auto" and not torch.cuda.is_available()
    if args.device == "cpu" or no_gpu:
        return torch.device("cpu")
    try:
        return torch.ones(1, device="cuda").add(1).device
    except (RuntimeError, AssertionError) as error:
        reason = f"the GPU cannot be used ({error}); --device cpu works"
        raise InputError(f"--device {args.device}: {reason}") from None


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def versions(device=None) -> dict:
    """What a result may depend on beside its flags; the GPU's name where `device` is one."""
    texts = {"python": platform.python_version(), "cpu": processor()}
    for name in ("torch", "numpy", "gymnasium", "mujoco", "pybullet"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            texts[name] = importlib.metadata.version(name)
    texts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if device and device.type == "cuda":
        texts["gpu"] = torch.cuda.get_device_name(device)
    return texts


def commit():
    """The commit of the code, with "+" where files differ from it; None where there is no git."""
    here = Path(__file__).resolve().parent
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(words, cwd=here, capture_output=True, encoding="utf-8", timeout=10)
        return answer.stdout.strip() or None


# ----- Speed


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # options of glibc's mallopt


def keep_freed_memory():
    """Let glibc keep large freed blocks.

    It gives them back to the system, which is thousands of page faults in a gradient step.
    """
    mallopt = None
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TOP_PAD, 1 << 26)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@functools.cache
def matmul_precision(device, rows, width):
    """The precision of matrix products: "medium" where it is exact and fast, else "highest".

    The answer is the same every time on a kind of processor, so that a seed gives the same numbers
    however busy the machine is. PyTorch hands "medium" to oneDNN. With AVX-512 and no bfloat16
    units its products are true float32 and take 0.65 of the time; with AVX2 they take as long;
    where there are bfloat16 units, or on a GPU, they are rounded.

    MATMUL_PRECISION in the environment decides instead: benchmark/run.py sets it, so that a label
    has one precision. Raises InputError if it is neither "highest" nor "medium".
    """
    if "MATMUL_PRECISION" in os.environ:
        precision = os.environ["MATMUL_PRECISION"]
        if precision not in ("highest", "medium"):
            raise InputError(f"MATMUL_PRECISION is {precision!r}, expected highest or medium")
        return precision
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


EAGER_CALLS = 3  # before a function is recorded, so that libraries have allocated what they need


def compile_step(step):
    """torch.compile of a gradient step, with losses and gradients in one graph.

    In two graphs, as is the default, the first keeps for the second what a frozen network needs of
    its ReLUs, as booleans that it writes one by one; that takes longer than plain code.
    """
    config = torch._dynamo.config
    if hasattr(config, "trace_autograd_ops"):  # new in PyTorch 2.13
        config.trace_autograd_ops = True
    return torch.compile(step)


def cuda_graph(function):
    """On a GPU: a function that is recorded on its fourth call and then replayed.

    One launch takes the place of hundreds. There is a graph for each set of keyword arguments.
    What is recorded keeps the places of its tensors: arguments must be the same objects in every
    call, or what another recorded function returned. Every call overwrites what the one before
    returned. Raises InputError if no graph can be made.
    """
    stream = torch.cuda.Stream()
    calls = {}  # {keyword arguments: how often it was called}
    graphs = {}  # {keyword arguments: graph, what the function returned}

    def call(*arguments, **flags):
        key = tuple(flags.items())
        calls[key] = calls.get(key, 0) + 1
        if calls[key] <= EAGER_CALLS:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a graph is made on a stream of its own
                result = function(*arguments, **flags)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if key not in graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                for argument in arguments:
                    if isinstance(argument, torch.Generator):
                        graph.register_generator_state(argument)
                with torch.cuda.graph(graph):  # records, computes nothing
                    result = function(*arguments, **flags)
            except RuntimeError as error:
                reason = f"no CUDA graph can be made ({error})"
                raise InputError(f"{reason}: --no-cuda-graph goes without") from None
            graphs[key] = graph, result
        graph, result = graphs[key]
        graph.replay()
        return result

    return call
