"""One thread, so that results and running times do not depend on the machine's cores; the scripts can be imported."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """`main` takes over SIGINT and SIGTERM: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
