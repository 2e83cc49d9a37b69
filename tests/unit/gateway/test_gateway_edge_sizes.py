"""Sizes at the highest configuration: what was sent until answers teach otherwise, by service and type."""

import pytest

from gateway.edge_sizes import Sizes


def test_the_ratio_is_that_of_answers_whatever_their_configuration() -> None:
    sizes = Sizes()
    assert sizes.data_mb("tracking", "video/mp4", 0.2) == 0.2
    sizes.learn("tracking", "video/mp4", 0.2, 0.5, 0.5)  # 1 MB at the highest: five times what was sent
    assert sizes.data_mb("tracking", "video/mp4; x=1", 0.3) == pytest.approx(1.5)
    for _ in range(60):
        sizes.learn("tracking", "VIDEO/MP4", 1.0, 0.3, 0.1)
    assert sizes.data_mb("tracking", "video/mp4", 1.0) == pytest.approx(3.0, rel=1e-4)
    assert sizes.data_mb("tracking", "video/x-motion-jpeg", 1.0) == 1.0
    assert sizes.data_mb("detection", "video/mp4", 1.0) == 1.0


def test_nothing_is_learned_from_nothing() -> None:
    sizes = Sizes()
    sizes.learn("detection", "image/jpeg", 1.0, 0.0, 0.5)
    assert sizes.data_mb("detection", "image/jpeg", 1.0) == 1.0
