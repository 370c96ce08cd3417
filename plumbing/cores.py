"""Episodes on several cores: a function of environments in processes, each with some of them."""

import copy
import ctypes
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import traceback

import numpy as np
import torch
from torch import nn

from envs import InputError


def on_cores(function, env_list, *arguments, **flags):
    """`function(env_list, *arguments, **flags)`, the environments dealt out to as many processes as PyTorch may use
    threads. They are forked, so on Linux only; elsewhere, with one thread, in a process that may start none, and for
    environments with `one_process = True`, the function is just called.

    Args:
        arguments: modules and tensors, also in a list, act on the CPU, and tensors are cut as env_list is. In place of
            the generator each process has its own, so that what is drawn depends on the number of threads.
    Returns what the function does: a list of E, a tensor (E, .), or a tuple of such; what it changes in environments is
    lost. Raises InputError: a process died, or can not be started; RuntimeError: with the traceback of what failed.
    """
    workers = min(torch.get_num_threads(), max(1, len(env_list) // 4))
    may_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if workers == 1 or not may_fork or getattr(env_list[0].unwrapped, "one_process", False):
        return function(env_list, *arguments, **flags)
    device = next(
        (p.device for x in arguments if isinstance(x, nn.Module) for p in x.parameters()), "cpu"
    )
    arguments = [change(x, on_cpu) for x in arguments]  # before the fork: after it there is no GPU
    (rng,) = (x for x in arguments if isinstance(x, torch.Generator))
    seeds = torch.randint(2**31 - 1, (workers,), generator=rng).tolist()
    fork, processes = multiprocessing.get_context("fork"), []
    pipes = [
        fork.Pipe(duplex=False) for _ in seeds
    ]  # (what the parent reads, what the process writes)
    try:
        for k, seed in enumerate(seeds):
            part = slice(*(len(env_list) * end // workers for end in (k, k + 1)))
            job = function, env_list, arguments, flags
            processes.append(
                fork.Process(target=work, args=(k, pipes, os.getpid(), seed, part, *job))
            )
            processes[-1].start()
        for _, writer in pipes:
            writer.close()
        results = [pickle.loads(reader.recv_bytes()) for reader, _ in pipes]
    except (EOFError, OSError) as error:
        reason = f"no processes to play episodes in, {str(error) or 'one died'}"
        raise InputError(f"{reason}: is memory short? OMP_NUM_THREADS=1 goes without") from None
    finally:
        started = [process for process in processes if process.pid]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for pipe in pipes:
            for end in pipe:
                end.close()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return joined(results, device)


def work(k, pipes, parent, seed, part, function, env_list, arguments, flags):
    """In process number k: play a part of the episodes."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # it is the run that stops, and then kills this
        signal.signal(
            number, lambda *_: None
        )  # not SIG_IGN, which programs that an environment starts would inherit
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: not to outlive a run that is killed
    if os.getppid() != parent:
        return
    for i, (reader, writer) in enumerate(pipes):
        reader.close()
        if i != k:
            writer.close()
    torch.set_num_threads(1)
    gc.freeze()  # what the run has is not looked at: pages stay shared, and tensors on a GPU alone
    rng = torch.Generator().manual_seed(seed)
    for seeded in (
        random.seed,
        np.random.seed,
        torch.default_generator.manual_seed,
    ):  # if an environment draws there
        seeded(seed)

    def share(x):
        return rng if isinstance(x, torch.Generator) else x[part] if torch.is_tensor(x) else x

    try:
        result = function(env_list[part], *(change(x, share) for x in arguments), **flags)
    except InputError as error:
        result = error
    except Exception:
        result = RuntimeError(f"in a process that played episodes\n{traceback.format_exc()}")
    pipes[k][1].send_bytes(
        pickle.dumps(result)
    )  # not `send`: PyTorch would make files of the tensors


def change(x, by):
    return [change(y, by) for y in x] if isinstance(x, list) else by(x)


def on_cpu(x):
    return (
        copy.deepcopy(x).cpu() if isinstance(x, nn.Module) else x.cpu() if torch.is_tensor(x) else x
    )


def joined(results, device):
    """What the processes returned, as one."""
    if isinstance(results[0], tuple):
        return tuple(joined(parts, device) for parts in zip(*results))
    return (
        torch.cat(results).to(device)
        if torch.is_tensor(results[0])
        else [path for part in results for path in part]
    )
