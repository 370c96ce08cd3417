"""Episodes in several processes: the same as in one, part by part; what becomes of them when something goes wrong."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from plumbing import cores
from plumbing.flags import preset

TINY = dict(policy_hidden=(8,), rl_batch=4, meta_batch=2, eval_every=1_000)
FLAGS = {
    smac: TINY
    | dict(
        offline_steps=2,
        online_iterations=1,
        updates_per_iteration=2,
        prior_steps=9,
        posterior_steps=9,
    ),
    pearl: TINY
    | dict(
        online_iterations=1,
        updates_per_iteration=2,
        initial_steps=9,
        prior_steps=9,
        posterior_steps=9,
    ),
    meta_bc: TINY | dict(offline_steps=2),
    focal: TINY | dict(offline_steps=2),
    macaw: TINY | dict(offline_steps=2, value_hidden=(8,)),
    borel: TINY | dict(vae_steps=1, offline_steps=2, vae_tasks=2, elbo_terms=2),
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are forked on Linux only"
)


@pytest.fixture
def two(monkeypatch):
    """Two threads, which are two processes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def environments(env_id="PointDirection", num=9):
    env_list = [envs.make(env_id) for _ in range(num)]
    for env, task in zip(env_list, envs.sample_tasks(env_id, num)):
        env.unwrapped.set_task(task)
    return env_list


def equal(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted):
            equal(*pair)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            equal(found[name], wanted[name])
    else:
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("script", [smac, meta_bc, pearl])
def test_a_meta_episode_on_two_cores_is_that_of_its_two_halves(script, two, short):
    args, env_list = preset(script.Args, script.PRESETS, "PointDirection"), environments()
    agent = script.Agent(4, 2, args)
    found = buffers.on_cores(script.adapt, env_list, agent, args, torch.Generator().manual_seed(3))
    seeds = torch.randint(2**31 - 1, (2,), generator=torch.Generator().manual_seed(3)).tolist()
    halves = [
        script.adapt(part, agent, args, torch.Generator().manual_seed(seed))
        for part, seed in zip((env_list[:4], env_list[4:]), seeds)
    ]
    equal(found[:2], tuple(first + second for first, second in zip(*(half[:2] for half in halves))))
    equal(found[2:], tuple(torch.cat(parts) for parts in zip(*(half[2:] for half in halves))))
    assert (
        len(found[0]) == 9 and (found[0][0]["obs"][0] != found[0][4]["obs"][0]).any()
    )  # the halves' noise differs


class Blank:
    """Number i of some environments that are not played."""

    def __init__(self, i, one_process=False):
        self.i, self.one_process, self.unwrapped = i, one_process, self


def blanks(num, **kind):
    return [Blank(i, **kind) for i in range(num)]


def test_tensors_are_cut_as_the_environments_are(two):
    def what_it_gets(env_list, module, rows, lists, number, rng, flag):
        values = number + flag * torch.ones(len(env_list))
        return [env.i for env in env_list], rows, lists[0], values, module.weight

    module, rows = nn.Linear(1, 1), torch.arange(8)[:, None]
    result = buffers.on_cores(
        what_it_gets, blanks(8), module, rows, [rows + 1], 5, torch.Generator(), flag=2
    )
    equal(result[:4], ([*range(8)], rows, rows + 1, torch.full((8,), 7.0)))
    assert (result[4] == module.weight.item()).all() and len(result[4]) == 2  # of both


def test_an_environment_that_draws_from_the_common_generators_gets_other_numbers_in_each_process(
    two,
):
    def draw(env_list, rng):
        return [
            (
                random.random(),
                np.random.rand(),
                torch.rand(1).item(),
                torch.rand(1, generator=rng).item(),
            )
        ]

    rng, before = torch.Generator().manual_seed(0), (random.getstate(), torch.get_rng_state())
    first, again = (buffers.on_cores(draw, blanks(8), rng) for _ in range(2))
    assert len(set(np.ravel(first + again))) == 4 * 3  # a process's torch generators have one seed
    assert buffers.on_cores(draw, blanks(8), torch.Generator().manual_seed(0)) == first
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("script", FLAGS)
def test_a_run_on_two_cores_trains_as_on_one_and_evaluates_the_same_tasks(
    script, short, tmp_path, monkeypatch
):
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        agent = buffers.train(
            script, env_id="PointDirection", run_dir=str(tmp_path / str(threads)), **FLAGS[script]
        )
        with open(
            tmp_path / str(threads) / f"PointDirection__{script.__name__}__1" / "eval.csv",
            newline="",
        ) as file:
            found.append((agent.state_dict(), [list(row.values()) for row in csv.DictReader(file)]))
    (weights, lines), (other_weights, other_lines) = found
    equal(dict(other_weights), dict(weights))
    assert [line[:5] for line in other_lines] == [line[:5] for line in lines] and len(lines) > 20
    explored, other = (np.array([float(line[6]) for line in rows]) for rows in (lines, other_lines))
    assert (explored != other).mean() > 0.9  # each process has noise of its own


@pytest.mark.parametrize(
    "threads, num, kind, daemon",
    [
        (1, 100, {}, False),
        (8, 7, {}, False),
        (8, 100, {"one_process": True}, False),
        (8, 100, {}, True),
    ],
)
def test_where_one_process_plays_all(threads, num, kind, daemon, monkeypatch):
    """One thread; few environments; environments that can't be forked; in a worker of a pool, which may start none."""
    monkeypatch.setattr(cores.multiprocessing, "get_context", None)  # a call of it would raise
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(
        cores.multiprocessing, "current_process", lambda: types.SimpleNamespace(daemon=daemon)
    )
    env_list, rng = blanks(num, **kind), torch.Generator()
    assert buffers.on_cores(lambda env_list, rng: (env_list, rng), env_list, rng) == (env_list, rng)


def test_a_process_that_is_killed_gives_one_sentence(two):
    def fall(env_list, rng):
        if env_list[0].i == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    before = time.time()
    words = "^no processes to play episodes in, one died: is memory short. OMP_NUM_THREADS=1 goes without$"
    with pytest.raises(buffers.InputError, match=words):
        buffers.on_cores(fall, blanks(8), torch.Generator())
    assert time.time() - before < 30  # the other one did not sleep to its end


def test_an_environment_that_fails_is_shown_once(two, capfd):
    def fail(env_list, rng):
        raise ValueError("the environment broke")

    def refuse(env_list, rng):
        raise buffers.InputError("it wants other actions")

    with pytest.raises(
        RuntimeError, match=r"episodes: the environment broke\n(.|\n)*in fail\n(.|\n)*broke"
    ):
        buffers.on_cores(fail, blanks(8), torch.Generator())
    with pytest.raises(buffers.InputError, match="^it wants other actions$"):
        buffers.on_cores(refuse, blanks(8), torch.Generator())
    assert capfd.readouterr().err == ""


def test_no_process_can_be_started(two, monkeypatch):
    def fork():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(buffers.InputError, match="Cannot allocate memory: is memory short"):
        buffers.on_cores(lambda *_: [], blanks(8), torch.Generator())


def test_what_an_environment_starts_can_be_ended(two):
    def restart(env_list, rng):
        simulator = subprocess.Popen(["sleep", "60"])
        simulator.terminate()
        return [simulator.wait(30)] * len(env_list)

    assert buffers.on_cores(restart, blanks(8), torch.Generator()) == [-signal.SIGTERM] * 8


SLEEP = """
import os, time, types, torch, buffers
blank = types.SimpleNamespace(unwrapped=None)
torch.set_num_threads(2)
def sleep(env_list, rng):
    time.sleep(0.5)  # until the run waits: an interrupt in os.fork's hooks is dropped by Python
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)
buffers.on_cores(sleep, 8 * [blank], torch.Generator())
"""


def is_alive(pid):
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )  # zombies: not reaped yet
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_run(number):
    run = subprocess.Popen(
        [sys.executable, "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(run.stdout.readline()) for _ in range(2)]
    assert all(is_alive(pid) for pid in pids)
    run.send_signal(number)
    assert run.wait(20) != 0
    deadline = time.time() + 10
    while any(is_alive(pid) for pid in pids) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)
    run.communicate()


# ----- What environments leave behind


class Starts(Blank):
    """Starts a program in its first reset and ends it in close()."""

    def __init__(self, i, folder):
        super().__init__(i)
        self.folder, self.program = folder, None

    def reset(self):
        self.program = self.program or subprocess.Popen(["sleep", "60"])
        (self.folder / str(self.program.pid)).touch()

    def close(self):
        self.program.terminate()
        self.program.wait()


@pytest.mark.parametrize("way", ["answer", "raise", "refuse", "exit", "another dies"])
def test_environments_are_closed_in_the_processes_that_played_them(way, two, tmp_path):
    """Also in those that are not waited for any more."""

    def play(env_list, rng):
        for env in env_list:
            env.reset()
        if way == "raise":
            raise ValueError
        if way == "refuse":
            raise buffers.InputError("no")
        if way == "exit":
            sys.exit(0)
        if way == "another dies":
            if env_list[0].i:  # the second process
                time.sleep(60)
            while len(list(tmp_path.iterdir())) < 8:
                time.sleep(0.01)
            for env in env_list:
                env.close()
            os.kill(os.getpid(), signal.SIGKILL)
        return [0] * len(env_list)

    before = time.time()
    try:
        buffers.on_cores(play, [Starts(i, tmp_path) for i in range(8)], torch.Generator())
    except (buffers.InputError, RuntimeError):
        assert way != "answer"
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 8 and not any(is_alive(pid) for pid in pids)
    assert time.time() - before < 20


def test_an_environment_that_does_not_close_is_not_waited_for(two, monkeypatch):
    monkeypatch.setattr(cores, "MOMENT", 0.2)
    monkeypatch.setattr(Blank, "close", lambda env: time.sleep(60), raising=False)
    before = time.time()
    assert buffers.on_cores(lambda env_list, rng: [1], blanks(8), torch.Generator()) == [1, 1]
    assert time.time() - before < 20


@pytest.mark.parametrize("end, words", [
    (lambda: sys.exit(0), r"test_cores.py, line \d+, called sys.exit\(0\), so that the run did not end"),
    (lambda: os._exit(0), "before they did, with exit code 0, as after a call of os._exit"),
    (lambda: os._exit(3), "with exit code 3, as after a call of os._exit"),
])  # fmt: skip
def test_an_environment_that_ends_its_process(end, words, two):
    with pytest.raises(buffers.InputError, match=words):
        buffers.on_cores(lambda *_: end(), blanks(8), torch.Generator())


def test_processes_that_neither_answer_nor_work(two, monkeypatch, capsys):
    """As one that needs a lock of the run. Said once; of those that work nothing is said."""
    monkeypatch.setattr(cores, "PATIENCE", 0.3)

    def wait(env_list, rng):
        time.sleep(1)
        return [1]

    for work, lines in ([0] * 20, 1), (range(20), 0):
        numbers = iter(work)
        monkeypatch.setattr(cores, "seconds_of_work", lambda _, numbers=numbers: next(numbers))
        assert buffers.on_cores(wait, blanks(8), torch.Generator()) == [1, 1]
        told = capsys.readouterr().err
        assert told.count("\n") == lines
        if lines:
            assert "2 processes" in told and "OMP_NUM_THREADS=1" in told and "one_process" in told


def test_the_processor_time_of_processes_is_measured():
    own = types.SimpleNamespace(pid=os.getpid())
    ended = types.SimpleNamespace(pid=2**22 + 1)
    before = cores.seconds_of_work([own, ended])
    assert abs(before - time.process_time()) < 0.1
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert 0.1 < cores.seconds_of_work([own, ended]) - before < 0.3


def test_what_processes_return_is_put_together_on_the_device():
    """ "meta" is a device that a machine without a GPU has."""
    parts = [
        ([1], torch.ones(1, 2), (torch.ones(1),)),
        ([2, 3], torch.ones(2, 2), (torch.ones(2),)),
    ]
    numbers, rows, (nested,) = cores.joined(parts, torch.device("meta"))
    assert numbers == [1, 2, 3]
    assert rows.device.type == nested.device.type == "meta"
    assert rows.shape == (3, 2) and nested.shape == (3,)


def test_results_come_back_to_where_the_agent_is(two, monkeypatch):
    """An agent on another device: here "meta", whose copy in the processes has numbers."""
    module = nn.Linear(1, 1, device="meta")
    monkeypatch.setattr(cores, "on_cpu", lambda x: nn.Linear(1, 1) if x is module else x)

    def play(env_list, module, rng):
        return [env.i for env in env_list], module.weight.detach()

    numbers, weights = buffers.on_cores(play, blanks(8), module, torch.Generator())
    assert numbers == [*range(8)] and weights.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_agent_on_cuda_plays_on_the_cpu(two, short):
    args, env_list, found = preset(smac.Args, smac.PRESETS, "PointDirection"), environments(), []
    agent = smac.Agent(4, 2, args)
    for device in ("cpu", "cuda"):
        found.append(
            buffers.on_cores(
                smac.adapt, env_list, agent.to(device), args, torch.Generator().manual_seed(3)
            )
        )
    assert found[1][2].is_cuda
    equal((*found[1][:2], *(part.cpu() for part in found[1][2:])), found[0])
