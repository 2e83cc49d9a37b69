"""How much of a clip is decoded at most, and the refusals (413) that say so.

Asked by whoever reads clips: with what the headers promise before anything is decoded, and again frame by frame, since
headers may lie.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from models.preprocess import MAX_PIXELS, InvalidInput

Frame = npt.NDArray[np.uint8]
"""[height, width, 3], RGB."""

_TIME_SLACK_S = 1e-6
_REMEDY = "send a shorter or smaller one, or raise the limit where the node starts (--clip-frames, --clip-s)"


class Limits(msgspec.Struct, frozen=True):
    """Limits of one request's clip. Each check raises `InvalidInput` with status 413 where its limit is passed."""

    max_frames: int = 3_600  # two minutes at 30 frames per second
    max_pixels: int = MAX_PIXELS  # of one frame
    max_seconds: float = 120.0
    max_held_pixels: int = 400_000_000  # of all frames together where they are held at once (1.2 GB)

    def check_frames(self, count: int) -> None:
        """`count`: frames up to now, or as a header promises."""
        if count > self.max_frames:
            raise InvalidInput(f"the clip has {count} or more frames: at most {self.max_frames}; {_REMEDY}", 413)

    def check_seconds(self, seconds: float) -> None:
        """`seconds`: a frame's time, or the length that a header promises."""
        if seconds > self.max_seconds + _TIME_SLACK_S:
            raise InvalidInput(f"the clip lasts {seconds:.1f} s: at most {self.max_seconds:g} s; {_REMEDY}", 413)

    def check_size(self, width: int, height: int) -> None:
        """Size of one frame, in pixels."""
        if width * height > self.max_pixels:
            reason = f"the clip's frames are {width} x {height} pixels: at most {self.max_pixels}"
            raise InvalidInput(f"{reason}; {_REMEDY}", 413)

    def check_held(self, pixels: int) -> None:
        """`pixels`: of all frames decoded up to now."""
        if pixels > self.max_held_pixels:
            raise InvalidInput(f"the clip has more than {self.max_held_pixels} pixels in all; {_REMEDY}", 413)
