"""pytest runs in the repository root; the five files are imported from there."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


@pytest.fixture
def time_limit(request):
    """A hang is a failure: an alarm ends the test after the module's TIME_LIMIT, or 30 seconds."""
    def ring(number, frame):
        raise TimeoutError("this hangs")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(getattr(request.module, "TIME_LIMIT", 30))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def few_held_out(monkeypatch):
    """Runs in the test's own process are judged on a tenth of the held-out shapes, where figures are not the point."""
    monkeypatch.setattr(data, "HELD_OUT", 48)
    data.held_out_scenes.cache_clear()
    yield
    data.held_out_scenes.cache_clear()
