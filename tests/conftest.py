"""One thread, so that results and running times do not depend on the machine's cores; the scripts can be imported."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """`main` takes over SIGINT and SIGTERM: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def drawers():
    """Sawyer's environments of an evaluation, the behaviour being an open bottom drawer: for a policy that hardly moves
    it stays closed in the test task, and open in the training task."""
    scene = dict.fromkeys(envs.TASK_COLUMNS, 0) | dict(side=1, bottom_drawer=1, button=1, object=-1)
    scene["behaviour"] = envs.BEHAVIOURS.index("open_bottom_drawer")
    pairs = {}
    for split, task in (("test", scene), ("train", scene | {"bottom_open": 1})):
        env = envs.make("SawyerManipulation")
        env.unwrapped.set_task(list(task.values()))
        pairs[split] = [(0, env)]
    return pairs
