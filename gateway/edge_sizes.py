"""How large a body is at the highest configuration (D of Huang's Eq. 2), which need not be what a client sent.

A node re-encodes whatever comes as JPEGs: an H.264 clip grows, a PNG shrinks. The ratio is learned from answers, by
service and content type, and is one before there are any.
"""

from typing import Final

WEIGHT: Final = 0.2


class Sizes:
    """Learned ratios of highest-configuration size over sent size, by (service, content type)."""

    def __init__(self) -> None:
        self._ratio: dict[tuple[str, str], float] = {}

    def learn(self, service: str, content_type: str, sent_mb: float, adapted_mb: float, size_factor: float) -> None:
        """A body of `sent_mb` became `adapted_mb` under a configuration that keeps `size_factor` of the highest."""
        if not (sent_mb > 0.0 and adapted_mb > 0.0):
            return
        key, seen = (service, _kind(content_type)), adapted_mb / size_factor / sent_mb
        self._ratio[key] = (1 - WEIGHT) * self._ratio[key] + WEIGHT * seen if key in self._ratio else seen

    def data_mb(self, service: str, content_type: str, sent_mb: float) -> float:
        """Megabytes at the highest configuration, as far as is known."""
        return sent_mb * self._ratio.get((service, _kind(content_type)), 1.0)


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
