"""One thread, so that results and running times do not depend on the machine's cores; the scripts can be imported."""

import dataclasses
import functools
import importlib.metadata
import os
import signal
import sys
import threading
from pathlib import Path

# Before PyTorch is imported; programs that tests start have it, too.
os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium as gym
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import small as small_runs

import envs
import plumbing.run
import sawyer
from plumbing import pictures

torch.set_num_threads(1)

# A shell that starts the tests in the background lets them ignore Ctrl-C, and nohup the end of the terminal: not here.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_configure(config):
    """The summary says what was skipped, and why."""
    config.option.reportchars += "s"


@pytest.fixture(autouse=True)
def leave_no_trace():
    """After every test, so after every run: signals, the hook of threads and precision are what they were."""

    def found():
        handlers = [
            signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ]
        return (
            handlers,
            threading.excepthook,
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
        )

    before = found()
    yield
    assert found() == before


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch, request):
    """`--device auto` is the CPU, also where there is a GPU, on which not all is equal bit for bit that is here."""
    if "cuda" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


DRAWING = {
    (pictures, "draw_summary"): pictures.draw_summary,
    (pictures, "tasks_figure"): pictures.tasks_figure,
    (pictures, "paths_figure"): pictures.paths_figure,
    (SummaryWriter, "add_figure"): SummaryWriter.add_figure,
}


class Blank:
    """In place of the figure of summary.png."""

    def savefig(self, file, **style):
        file.write(b"a picture")


@pytest.fixture(scope="session", autouse=True)
def cheap_runs():
    """Runs do without what takes most of a small one's time: pictures, git, versions, waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in DRAWING:
            patch.setattr(module, name, lambda *_: None)
        patch.setattr(pictures, "draw_summary", lambda *_: Blank())
        patch.setattr(plumbing.run, "commit", functools.cache(plumbing.run.commit))
        patch.setattr(importlib.metadata, "version", functools.cache(importlib.metadata.version))
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def with_pictures(monkeypatch):
    """Runs draw their pictures, after all."""
    for (module, name), function in DRAWING.items():
        monkeypatch.setattr(module, name, function)


@pytest.fixture
def quick(monkeypatch):
    """Small evaluations, and a point of the loss curves every 5 steps."""
    small = functools.partial(envs.make_evaluation, num_train=3, repeats=1)
    monkeypatch.setattr(envs, "make_evaluation", small)
    monkeypatch.setattr("plumbing.run.LOG_EVERY", 5)


@pytest.fixture
def short(quick, monkeypatch):
    """The same, and episodes of PointDirection have 10 steps."""
    set_sizes(monkeypatch, "PointDirection", horizon=10)


@pytest.fixture
def small(quick, monkeypatch):
    """PointDirection with four training tasks and two test tasks, for the runs of small.py."""
    spec = envs.SPECS["PointDirection"]
    monkeypatch.setattr(
        envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=2, repeats=1)
    )
    monkeypatch.setitem(
        envs.SPECS, "PointDirection", dataclasses.replace(spec, num_train_tasks=4, num_test_tasks=2)
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The dataset of the runs of small.py."""
    return small_runs.make_dataset(tmp_path_factory.mktemp("data") / "small.npz")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A function that gives a run of a script that nothing stopped; each is made once."""
    made = {}

    def make(script):
        if script not in made:
            made[script] = small_runs.start(script, dataset, tmp_path_factory.mktemp("whole"))
        return made[script]

    return make


def set_sizes(monkeypatch, env_id, **sizes):
    """Change the row of a family."""
    spec, name = dataclasses.replace(envs.SPECS[env_id], **sizes), f"smac/{env_id}-v0"
    monkeypatch.setitem(envs.SPECS, env_id, spec)
    entry = dataclasses.replace(gym.registry[name], max_episode_steps=spec.horizon)
    monkeypatch.setitem(gym.registry, name, entry)


@pytest.fixture
def drawers():
    """Sawyer's environments of an evaluation, the behaviour being an open bottom drawer: for a policy that hardly moves
    it stays closed in the test task, and open in the training task."""
    pytest.importorskip(
        "pybullet", reason="PyBullet is missing, which is ready to install for Python 3.11 only"
    )
    scene = dict.fromkeys(sawyer.TASK_COLUMNS, 0) | dict(
        side=1, bottom_drawer=1, button=1, object=-1
    )
    scene["behaviour"] = sawyer.BEHAVIOURS.index("open_bottom_drawer")
    eval_envs = {}
    for split, task in (("test", scene), ("train", scene | {"bottom_open": 1})):
        env = envs.make("SawyerManipulation")
        env.unwrapped.set_task(list(task.values()))
        eval_envs[split] = [0], [env]
    return eval_envs
