"""Boards to run whole systems over."""

import pytest


@pytest.fixture(
    scope="module", params=[pytest.param("embedded"), pytest.param("redis-server", marks=pytest.mark.redis)]
)
def embedded(request: pytest.FixtureRequest) -> bool:
    """True: over the embedded board; False: over a private redis-server."""
    return bool(request.param == "embedded")
