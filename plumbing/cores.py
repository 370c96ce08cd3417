"""Episodes on several cores: a function of environments in processes, each with some of them."""

import copy
import ctypes
import gc
import multiprocessing
import pickle
import signal
import sys

import torch
from torch import nn

from envs import InputError


def on_cores(function, env_list, *arguments, **flags):
    """`function(env_list, *arguments, **flags)`, the environments dealt out to as many processes as PyTorch may use
    threads. They are forked, so on Linux only; elsewhere, and with one thread, the function is just called.

    Args:
        arguments: modules and tensors, also in a list, act on the CPU, and tensors are cut as env_list is. In place of
            the generator each process has its own, so that what is drawn depends on the number of threads.
    Returns what the function does: a list of E, a tensor (E, .), or a tuple of such; what it changes in environments is
    lost. Raises InputError: a process died, on the screen is why.
    """
    workers = min(torch.get_num_threads(), max(1, len(env_list) // 4)) if sys.platform == "linux" else 1
    if workers == 1:
        return function(env_list, *arguments, **flags)
    device = next((p.device for x in arguments if isinstance(x, nn.Module) for p in x.parameters()), "cpu")
    arguments = [change(x, on_cpu) for x in arguments]  # before they are forked: then there is no GPU any more
    (rng,) = (x for x in arguments if isinstance(x, torch.Generator))
    seeds = torch.randint(2**31 - 1, (workers,), generator=rng).tolist()
    fork, processes, pipes = multiprocessing.get_context("fork"), [], []
    try:
        for k, seed in enumerate(seeds):
            part = slice(*(len(env_list) * end // workers for end in (k, k + 1)))
            pipe, end = fork.Pipe(duplex=False)
            process = fork.Process(target=work, args=(end, part, seed, function, env_list, arguments, flags))
            process.start()
            end.close()
            pipes.append(pipe)
            processes.append(process)
        results = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
    except EOFError:
        raise InputError("a process that played episodes died; OMP_NUM_THREADS=1 goes without such") from None
    finally:
        for process, pipe in zip(processes, pipes):
            process.kill()
            process.join()
            pipe.close()
    return joined(results, device)


def work(pipe, part, seed, function, env_list, arguments, flags):
    """In a process: play a part of the episodes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it is the run that stops, and then kills this
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a run that is killed
    torch.set_num_threads(1)
    gc.freeze()  # what the run has is not looked at: pages stay shared, and tensors on a GPU alone
    rng = torch.Generator().manual_seed(seed)

    def share(x):
        return rng if isinstance(x, torch.Generator) else x[part] if torch.is_tensor(x) else x

    result = function(env_list[part], *(change(x, share) for x in arguments), **flags)
    pipe.send_bytes(pickle.dumps(result))  # not `send`: PyTorch would make files of the tensors


def change(x, by):
    return [change(y, by) for y in x] if isinstance(x, list) else by(x)


def on_cpu(x):
    return copy.deepcopy(x).cpu() if isinstance(x, nn.Module) else x.cpu() if torch.is_tensor(x) else x


def joined(results, device):
    """What the processes returned, as one."""
    if isinstance(results[0], tuple):
        return tuple(joined(parts, device) for parts in zip(*results))
    return torch.cat(results).to(device) if torch.is_tensor(results[0]) else [path for part in results for path in part]
