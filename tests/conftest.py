"""For all tests: what a missing Debian package means, and a free port.

A test marked `redis` needs a redis-server binary. Where there is none it is skipped by name with the remedy; with
CI=true it fails instead, so that nothing is left out in silence.
"""

import os
import shutil
import socket

import pytest

REMEDY = "no redis-server binary on this machine: apt-get install redis-server"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Runs before any fixture of the test."""
    if item.get_closest_marker("redis") is not None and shutil.which("redis-server") is None:
        if os.environ.get("CI", "").lower() in ("", "0", "false"):
            pytest.skip(REMEDY)
        pytest.fail(REMEDY, pytrace=False)


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
