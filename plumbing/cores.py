"""Episodes on several cores: a function of environments in processes, each with some of them."""

import contextlib
import copy
import ctypes
import gc
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn

from plumbing.errors import InputError, called_exit

PATIENCE = 30  # seconds without an answer and without work, after which a line says so
MOMENT = 3  # seconds that processes have to close their environments before they are killed
GOES_WITHOUT = "OMP_NUM_THREADS=1 goes without"
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent has died


def on_cores(function, env_list, *arguments, **flags):
    """`function(env_list, *arguments, **flags)`, in as many processes as PyTorch may use threads.

    Each process plays a part of the environments, four of them at least. They are forked, so on
    Linux only; elsewhere, with one thread, in a process that may start none, and for environments
    with `one_process = True`, the function is just called. A process closes its environments when
    it has played, so one that starts a program does that in its first reset, not before.

    Args:
        arguments: modules and tensors, also in a list, act on the CPU, and tensors are cut as
            env_list is. In place of the generator each process has its own, so that what is drawn
            depends on the number of threads.
    Returns:
        what the function does: a list of E, a tensor (E, .), or a tuple of such; what it changes
        in environments is lost.
    Raises:
        InputError: a process died, ended itself, or cannot be started.
        RuntimeError: with the traceback of what failed in a process.
    """
    workers = min(torch.get_num_threads(), max(1, len(env_list) // 4))
    may_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    one_process = getattr(env_list[0].unwrapped, "one_process", False)
    if workers == 1 or not may_fork or one_process:
        return function(env_list, *arguments, **flags)

    modules = [x for x in arguments if isinstance(x, nn.Module)]
    devices = [parameter.device for module in modules for parameter in module.parameters()]
    arguments = [map_nested(on_cpu, x) for x in arguments]  # before the fork: after it is no GPU
    (rng,) = [x for x in arguments if isinstance(x, torch.Generator)]
    seeds = torch.randint(2**31 - 1, (workers,), generator=rng).tolist()
    cuts = [len(env_list) * k // workers for k in range(workers + 1)]
    parts = [slice(cuts[k], cuts[k + 1]) for k in range(workers)]
    results = in_processes(seeds, parts, (function, env_list, arguments, flags))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return joined(results, devices[0] if devices else "cpu")


# ----- The run's side


def in_processes(seeds, parts, job):
    """Play each part in a process of its own. Returns what each answered, in order."""
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in seeds]  # (the run reads, the process writes)
    over = mmap.mmap(-1, 1)  # a byte of shared memory: nobody waits for answers any more
    processes = []
    try:
        for k, (seed, part) in enumerate(zip(seeds, parts)):
            own = (k, pipes, os.getpid(), over, seed, part)
            processes.append(fork.Process(target=play_part, args=(*own, *job)))
            processes[-1].start()
        for _, writer in pipes:
            writer.close()
        return receive([reader for reader, _ in pipes], processes)
    except OSError as error:
        reason = f"no processes to play episodes in, {error or 'one died'}"
        raise InputError(f"{reason}: is memory short? {GOES_WITHOUT}") from None
    finally:
        over[0] = 1
        end(processes, [connection for pipe in pipes for connection in pipe])


def receive(readers, processes):
    """The answers of all processes, in order. Raises InputError: one ended without an answer."""
    answers = {}
    told = False
    while len(answers) < len(readers):
        waiting = [reader for reader in readers if reader not in answers]
        work = seconds_of_work(processes)
        ready = multiprocessing.connection.wait(waiting, PATIENCE)
        idle = seconds_of_work(processes) - work < 0.01 * PATIENCE
        if not ready and idle and not told:
            tell_who_waits(len(waiting))
            told = True
        for reader in ready:
            try:
                answers[reader] = pickle.loads(reader.recv_bytes())
            except EOFError:
                process = processes[readers.index(reader)]
                raise InputError(how_it_ended(process)) from None
    return [answers[reader] for reader in readers]


def seconds_of_work(processes):
    """The processor time that processes have had, in seconds."""
    ticks = 0
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            # after the name, which may hold blanks: user and system time are fields 14 and 15
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def tell_who_waits(number):
    """Say that processes neither answer nor work, and how to go without them."""
    words = f"for {PATIENCE} s {number} processes that play episodes have not answered nor worked"
    why = "an environment may wait for what a forked process lacks, as a lock or a thread"
    without = f"{GOES_WITHOUT} them, and so does `one_process = True` in the environment's class"
    with contextlib.suppress(OSError, ValueError):
        print(f"{words}: {why}; {without}", file=sys.stderr, flush=True)


def how_it_ended(process):
    """A sentence about a process that ended without an answer."""
    process.join(1)
    if process.exitcode is None or process.exitcode < 0:  # killed, by the system as a rule
        return f"no processes to play episodes in, one died: is memory short? {GOES_WITHOUT}"
    words = "a process that played episodes ended before they did"
    return f"{words}, with exit code {process.exitcode}, as after a call of os._exit"


def end(processes, connections):
    """Let processes close their environments, and kill those that take too long."""
    started = [process for process in processes if process.pid]
    try:
        for process in started:
            process.terminate()  # where it has answered already this changes nothing
        for connection in connections:
            connection.close()
        deadline = time.monotonic() + MOMENT
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


def joined(results, device):
    """What the processes returned, as one."""
    if isinstance(results[0], tuple):
        return tuple(joined(parts, device) for parts in zip(*results))
    if torch.is_tensor(results[0]):
        return torch.cat(results).to(device)
    return [path for part in results for path in part]


# ----- The side of a process


def play_part(k, pipes, parent, over, seed, part, function, env_list, arguments, flags):
    """In process number k: play a part of the episodes, answer, close the environments."""

    def stop(*_):
        """Signals of a terminal reach all processes: it is the run that stops, and says so here."""
        if over[0]:
            raise SystemExit

    # Not SIG_IGN, which programs that an environment starts would inherit
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed run is not outlived
    if os.getppid() != parent:
        return
    writer = pipes[k][1]
    for reader, other in pipes:
        reader.close()
        if other is not writer:
            other.close()

    torch.set_num_threads(1)
    gc.freeze()  # what the run has is not looked at: pages stay shared, tensors on a GPU alone
    rng = torch.Generator().manual_seed(seed)
    for set_seed in (random.seed, np.random.seed, torch.default_generator.manual_seed):
        set_seed(seed)  # for environments that draw there

    def share(x):
        """What this process gets of an argument."""
        if isinstance(x, torch.Generator):
            return rng
        return x[part] if torch.is_tensor(x) else x

    try:
        try:
            shares = [map_nested(share, x) for x in arguments]
            # not `send`: PyTorch would make files of the tensors
            answer = pickle.dumps(function(env_list[part], *shares, **flags))
        except InputError as error:
            answer = pickle.dumps(error)
        except SystemExit as error:
            answer = pickle.dumps(InputError(called_exit(error)))
        except Exception as error:
            words = f"{type(error).__name__} in a process that played episodes: {error}"
            answer = pickle.dumps(RuntimeError(f"{words}\n{traceback.format_exc()}"))
        ignore_signals()  # from here on it ends by itself
        writer.send_bytes(answer)
    except (OSError, SystemExit):  # nobody waits for it any more
        pass
    finally:
        ignore_signals()
        for env in env_list[part]:
            with contextlib.suppress(Exception):
                env.close()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(0)  # at once: no thread of an environment is waited for


def ignore_signals():
    """Do nothing at a signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def map_nested(function, x):
    """A function of something, or of each thing in a list, at any depth."""
    if isinstance(x, list):
        return [map_nested(function, y) for y in x]
    return function(x)


def on_cpu(x):
    """A copy of a module or tensor on the CPU; anything else as it is."""
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).cpu()
    return x.cpu() if torch.is_tensor(x) else x
