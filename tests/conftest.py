"""Fixtures of all tests."""

import signal

import pytest
import torch
from common import shapes

torch.set_num_threads(1)  # which is faster for models as small as these


@pytest.fixture(autouse=True)
def time_limit(request):
    """A hang is a failure: an alarm ends each test after five minutes, or its mark's seconds."""

    def ring(number, frame):
        raise TimeoutError("this hangs")

    mark = request.node.get_closest_marker("seconds")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(mark.args[0] if mark else 300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Indices of shards are stored in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def few_held_out(monkeypatch):
    """Runs in the test's own process are evaluated on a tenth of the held-out shapes."""
    monkeypatch.setattr(shapes, "HELD_OUT", 48)
    shapes.held_out_scenes.cache_clear()
    yield
    shapes.held_out_scenes.cache_clear()


def pytest_configure(config):
    config.addinivalue_line("markers", "seconds(n): the time limit of a test that takes long")
