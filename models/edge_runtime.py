"""One door to detectors and trackers: open a variant, run frames, close it."""

from collections.abc import Sequence
from typing import Protocol

from models.catalog import VariantError
from models.detection import Detections, Detector, Image, open_detector
from models.edge_catalog import EdgeVariant
from models.tracking import Tracker, Tracks, open_tracker


class EdgeRuntime(Protocol):
    """A loaded variant of an edge service. One call at a time; every call blocks."""

    @property
    def variant(self) -> EdgeVariant:
        """What was loaded."""
        ...

    def run(self, frames: Sequence[Image]) -> Detections | Tracks:
        """Detections of the one frame, or tracks over all of them; frames are RGB, uint8 [height, width, 3].

        Boxes are in pixels of the frames given. Raises `ValueError` where frames are no images, or a detector gets
        more or less than one.
        """
        ...

    def warm_up(self) -> None:
        """Run once on a grey image: the first run plans memory."""
        ...

    def close(self) -> None:
        """Give memory back. Nothing may run any more."""
        ...


class DetectorRuntime:
    """A detector behind the door."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    @property
    def variant(self) -> EdgeVariant:
        """See `EdgeRuntime`."""
        return self._detector.variant

    def run(self, frames: Sequence[Image]) -> Detections:
        """See `EdgeRuntime`."""
        if len(frames) != 1:
            raise ValueError(f"a detector takes one image, not {len(frames)} frames: ask a tracker")
        return self._detector.detect(frames[0])

    def warm_up(self) -> None:
        """See `EdgeRuntime`."""
        self._detector.warm_up()

    def close(self) -> None:
        """See `EdgeRuntime`."""
        self._detector.close()


class TrackerRuntime:
    """A tracker behind the door."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @property
    def variant(self) -> EdgeVariant:
        """See `EdgeRuntime`."""
        return self._tracker.variant

    def run(self, frames: Sequence[Image]) -> Tracks:
        """See `EdgeRuntime`."""
        return self._tracker.track(frames)

    def warm_up(self) -> None:
        """See `EdgeRuntime`."""
        self._tracker.warm_up()

    def close(self) -> None:
        """See `EdgeRuntime`."""
        self._tracker.close()


def open_edge_runtime(variant: EdgeVariant, device: str = "cpu", threads: int = 1) -> EdgeRuntime:
    """Load `variant` on `device`, `threads` wide. Raises `VariantError`: file, device or package missing."""
    if variant.service == "detection":
        return DetectorRuntime(open_detector(variant, device=device, threads=threads))
    if variant.service == "tracking":
        return TrackerRuntime(open_tracker(variant, device=device, threads=threads))
    raise VariantError(variant.name, "service", variant.service, "detection or tracking")
