"""An emulated device for the other servers: time only, one request after the other, on the clock that Tidegate uses.

In Tidegate an emulated service ends at an exact time and the next one that waits starts at that very time, however late
a timer fires or a message comes. The same is granted here: a service that begins within `HANDOVER_S` of the previous
one's end began when that ended. So no server loses capacity to timers, nor to a request's way to the device.
"""

import time

SERVICE_S = {"heavy": 0.043, "light": 0.0115}
"""Tan's PNASNet-5-Large and EfficientNet-B0 on an NVIDIA T4: inferred, as in models/catalog."""
RANKS = {"heavy": 0, "light": 1}
REQUIREMENT_S = 0.3
SLACK = 0.95
"""Share of the requirement that a full queue may take; the rest is for HTTP and for timers."""
HANDOVER_S = 0.010


class EmulatedDevice:
    """One device: `next_end_s` tells when a service that begins now will end."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self._free_s = 0.0

    def next_end_s(self) -> float:
        """Take the device for one request; gives back the end, in `time.monotonic()`."""
        now_s = time.monotonic()
        start_s = self._free_s if now_s - self._free_s < HANDOVER_S else now_s
        self._free_s = start_s + self._service_s
        return self._free_s
