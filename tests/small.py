"""Small runs of the six scripts on PointDirection, and what tests do with them.

The fixtures `small`, `dataset` and `whole` are in conftest.py.
"""

import functools
import os
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark.robustness import kill
from buffers import InputError
from plumbing.flags import parse_args

HUGE = 10**400
ROOT = Path(smac.__file__).parent
SPEC = envs.SPECS["PointDirection"]
SHORT = dict(
    env_id="PointDirection",
    policy_hidden=(16,),
    rl_batch=16,
    meta_batch=4,
    eval_every=5,
    device="cpu",
)
ENCODER = dict(encoder_hidden=(16,), context_batch=8, latent_dim=3)
ONLINE = dict(q_hidden=(16,), tasks_per_iteration=1, prior_steps=50, posterior_steps=50)
RUNS = {  # short runs of 13 to 16 gradient steps
    smac: SHORT | ENCODER | ONLINE | dict(offline_steps=8, online_iterations=2, updates_per_iteration=4),
    pearl: SHORT | ENCODER | ONLINE | dict(online_iterations=3, updates_per_iteration=5, initial_steps=50),
    meta_bc: SHORT | ENCODER | dict(offline_steps=13),
    focal: SHORT | ENCODER | dict(q_hidden=(16,), offline_steps=13),
    macaw: SHORT | dict(value_hidden=(16,), context_batch=8, weight_transform=False, offline_steps=13),
    borel: SHORT | dict(q_hidden=(16,), latent_dim=3, vae_steps=6, vae_tasks=2, elbo_terms=8, offline_steps=8),
}  # fmt: skip
SCRIPTS = pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)


def make_dataset(file, scale=1.0):
    """Random numbers: 4 training tasks with two trajectories each, 2 test tasks."""
    rng, entries = np.random.default_rng(0), []
    for task in np.repeat(range(4), 2):
        path = {"obs": rng.normal(size=(9, 4)), "actions": rng.uniform(-1, 1, (8, 2))}
        path |= {"rewards": scale * rng.normal(size=8), "terminals": np.zeros(8)}
        entries.append((task, path))
    tasks = envs.sample_tasks("PointDirection", 6)
    buffers.save_dataset(
        file, "PointDirection", tasks[:4], tasks[4:], entries, entries[::2], "python test"
    )
    return file


def start(script, dataset, folder, **flags):
    """A short run in `folder`: its directory."""
    data = {} if script is pearl else {"dataset": str(dataset)}
    buffers.train(script, **RUNS[script] | data | {"run_dir": str(folder)} | flags)
    return directory(script, folder)


def directory(script, folder):
    return Path(folder) / f"PointDirection__{script.__name__}__1"


def resume(script, dataset, run, *flags):
    data = [] if script is pearl else ["--dataset", str(dataset)]
    return script.main(
        parse_args(script.Args, script.PRESETS, ["--resume", str(run), *data, *flags])
    )


def read(run, name="step"):
    with np.load(run / "checkpoint.npz") as file:
        return file[name]


def assert_equal_runs(one, other):
    """Checkpoint, points of the curves and eval.csv, bit for bit."""
    a, b = kill.content(one), kill.content(other)
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []


def snapshot(folder):
    """Names, contents and times of all files."""
    return {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(folder).iterdir()
    }


def refusal(function, *args):
    """The sentence with which something is refused; None if it is taken."""
    try:
        function(*args)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) <= 1000
        return str(error)


def sentence(monkeypatch, capsys, script, *words):
    """What a script prints, started with these words, before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        buffers.launch(script.main, script.Args, script.PRESETS)
    out, err = capsys.readouterr()
    assert (
        ended.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    ), err
    return err.strip()


def forked(function):
    """What a function raised in a process of its own, which then ends, and its memory in MB; nothing is printed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            function()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode(errors="replace"))
        os._exit(0)
    os.close(write_end)
    usage = os.wait4(pid, 0)[2]
    with os.fdopen(read_end) as file:
        return file.read(), usage.ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)


def call_at(monkeypatch, name, step, function):
    """Call a function when `Run.name` is called at this step (steps made so far), before it."""
    method = getattr(buffers.Run, name)

    def call(run, *args, **kwargs):
        if run.step == step:
            function()
        return method(run, *args, **kwargs)

    monkeypatch.setattr(buffers.Run, name, call)


def stopped(script, dataset, folder, monkeypatch, **flags):
    """A run that was stopped after step 7."""
    with monkeypatch.context() as patch:
        call_at(patch, "log", 6, functools.partial(send, signal.SIGTERM))
        with pytest.raises(SystemExit, match="stopped after step 7; continue with: python"):
            start(script, dataset, folder, **flags)
    return directory(script, folder)


def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)


def pasted(message):
    """The script and the words behind it in the command of a sentence."""
    python, script, *words = shlex.split(message.split("continue with: ")[1])
    assert python == "python" and Path(script).is_absolute()
    return Path(script), words


class Unexpected(Exception):
    pass
