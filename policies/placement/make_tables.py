"""Make the two shipped service tables: `python -m policies.placement.make_tables` (development only).

Three origins, never mixed in a cell:
- published: accuracy at the highest configuration (COCO box AP and MOT17 half-val MOTA of the public checkpoints,
  see SERVICES), memory and TFLOPs (Huang, Tables II and III).
- measured: size factors (eta). Detection: sample photographs, textures and documents that ship inside
  scikit-image and scikit-learn are resized and encoded as JPEG at every resolution and quality. Tracking: a window
  pans over such photographs for one second at every resolution and frame rate, each frame a JPEG as MOT17 stores
  its clips (H.264 of the same clips shrinks less: 0.86 at 5 fps, because the steps between frames grow). A factor is
  the mean over images of bytes / bytes at the highest configuration.
- modelled: accuracy at every other configuration (`detection_factor`, `tracking_factor`): smooth curves held to the
  paper's statements (range 0.42 to 0.097 for detection; half resolution is comparable for tracking and the range
  0.85 to 0.6 as a ratio; a lower quality weighs more at a lower resolution). Figs. 4 and 5 are not available.
"""

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from numpy.typing import NDArray
from PIL import Image

from policies.placement.tables import TABLES_DIRECTORY

Pixels = NDArray[np.uint8]

RESOLUTIONS = (1.0, 0.75, 0.5, 0.25)
QUALITIES = (100, 90, 80, 70)
FRAME_RATES = (30, 15, 10, 5)
# name, memory MB and TFLOPs (Huang's Tables II and III), published accuracy at the highest configuration.
DETECTION = (
    ("r50_fpn_fp16", 159.48, 0.1747, 0.375),
    ("r50_c4", 129.31, 0.8193, 0.356),
    ("x101_64x4d_fpn", 380.91, 0.3688, 0.421),
    ("r101_fpn", 232.13, 0.2380, 0.394),
)
TRACKING = (
    ("bytetrack_yolox_x", 378.02, 0.3959, 0.786),
    ("sort_r50_fpn", 157.93, 0.1448, 0.620),
    ("qdtrack_r50_fpn", 216.95, 0.1416, 0.682),
)
# Sample images by kind: scenes, things at close range, textures, documents, instruments.
SAMPLES = {
    "scene": ("china", "flower", "rocket", "motorcycle_left"),
    "close range": ("astronaut", "coffee", "chelsea"),
    "texture": ("brick", "grass", "gravel"),
    "document": ("page", "text"),
    "instrument": ("retina", "hubble_deep_field", "immunohistochemistry"),
}


def sample(name: str) -> Pixels:
    """One installed sample image as (height, width, 3) bytes."""
    if name in ("china", "flower"):
        return np.asarray(sklearn.datasets.load_sample_image(f"{name}.jpg"))
    getter = getattr(skimage.data, "stereo_motorcycle" if name == "motorcycle_left" else name)
    pixels = getter()[0] if name == "motorcycle_left" else getter()
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, :3])


def resized(pixels: Pixels, resolution: float) -> Pixels:
    """The image at a resolution factor, both sides even."""
    height, width = (max(2, round(side * resolution) // 2 * 2) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def jpeg_bytes(pixels: Pixels, quality: int) -> int:
    """Size of the image as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.tell()


def pan(pixels: Pixels, frames: int) -> list[Pixels]:
    """A window of three quarters of each side that moves over the image's diagonal."""
    height, width = (side * 3 // 4 for side in pixels.shape[:2])
    steps = np.linspace(0.0, 1.0, frames)
    tops = (steps * (pixels.shape[0] - height)).astype(int)
    lefts = (steps * (pixels.shape[1] - width)).astype(int)
    return [pixels[t : t + height, left : left + width] for t, left in zip(tops, lefts, strict=True)]


def clip_bytes(frames: Iterable[Pixels]) -> int:
    """Size of a clip as MOT17 stores its clips: every frame a JPEG (quality 90)."""
    return sum(jpeg_bytes(frame, 90) for frame in frames)


def measure_detection() -> NDArray[np.float64]:
    """Mean size factors (resolution, quality) over all sample images."""
    tables = []
    for name in (n for kind in SAMPLES.values() for n in kind):
        pixels = sample(name)
        sizes = np.array([[jpeg_bytes(resized(pixels, r), q) for q in QUALITIES] for r in RESOLUTIONS], dtype=float)
        tables.append(sizes / sizes[0, 0])
    return np.asarray(np.mean(tables, axis=0))


def measure_tracking() -> NDArray[np.float64]:
    """Mean size factors (resolution, frame rate) over clips panned across the larger sample images."""
    tables = []
    for name in ("china", "flower", "motorcycle_left", "astronaut", "coffee", "retina"):
        pixels = sample(name)
        sizes = [
            [clip_bytes(resized(f, r) for f in pan(pixels, 30)[:: 30 // rate]) for rate in FRAME_RATES]
            for r in RESOLUTIONS
        ]
        tables.append(np.array(sizes, dtype=float) / sizes[0][0])
    return np.asarray(np.mean(tables, axis=0))


def detection_factor(resolution: float, quality: int) -> float:
    """Share of the full accuracy that is left (modelled): 1 at the highest configuration, 0.272 at the lowest."""
    kept = {1.0: 1.0, 0.75: 0.95, 0.5: 0.80, 0.25: 0.45}[resolution]
    loss = {100: 0.0, 90: 0.03, 80: 0.08, 70: 0.15}[quality]
    return kept * (1.0 - loss * (1.0 + 2.18 * (1.0 - resolution)))


def tracking_factor(resolution: float, rate: int) -> float:
    """Share of the full accuracy that is left (modelled): 1 at the highest configuration, 0.898 at the lowest."""
    return {1.0: 1.0, 0.75: 0.995, 0.5: 0.98, 0.25: 0.945}[resolution] * {30: 1.0, 15: 0.99, 10: 0.975, 5: 0.95}[rate]


HEAD = """# {title}
# Written by `python -m policies.placement.make_tables`; a table of your own needs no code, only this format:
# [[configuration]] one per configuration: name, any settings, size_factor (eta of Eq. 2: request bytes over bytes at
#   the highest configuration, above 0 and at most 1), size_factor_source, inferences (forward passes per request).
# [[variant]] one per DNN: name, memory_mb, tflop per inference, accuracy (one figure per configuration, in order) and
#   accuracy_source; a source is "published", "measured" or "modelled".
# [requests] data_mb = [smallest, largest] at the highest configuration, deadlines_s = what deadlines draw from.
name = "{name}"

[requests]
data_mb = {data}
deadlines_s = {deadlines}
"""


def table_text(name: str) -> str:
    """The whole TOML file of one service."""
    detection = name == "detection"
    seconds = FRAME_RATES if not detection else QUALITIES
    factors = measure_detection() if detection else measure_tracking()
    text = HEAD.format(
        title="Object detection (Huang, Table II)" if detection else "Multiple object tracking (Huang, Table III)",
        name=name,
        data=[1.0, 10.0] if detection else [5.0, 20.0],
        deadlines=[0.5, 1.0, 1.5, 2.0] if detection else [1.0, 5.0, 10.0, 15.0, 20.0, 25.0],
    )
    kept = []
    for r, resolution in enumerate(RESOLUTIONS):
        for s, second in enumerate(seconds):
            kept.append((detection_factor if detection else tracking_factor)(resolution, second))
            setting = "jpeg_quality" if detection else "frame_rate"
            # A request to tracking is a clip of one second (the paper gives no time base): one pass per frame.
            text += (
                f'\n[[configuration]]\nname = "{resolution:g}x_{"q" if detection else "fps"}{second}"\n'
                f"resolution = {resolution}\n{setting} = {second}\nsize_factor = {factors[r, s]:.5f}\n"
                f'size_factor_source = "measured"\ninferences = {1 if detection else second}\n'
            )
    for variant, memory_mb, tflop, accuracy in DETECTION if detection else TRACKING:
        sources = ["published"] + ["modelled"] * (len(kept) - 1)
        text += (
            f'\n[[variant]]\nname = "{variant}"\nmemory_mb = {memory_mb}\ntflop = {tflop}\n'
            f"accuracy = {[round(accuracy * share, 5) for share in kept]}\n"
            f"accuracy_source = {sources}\n".replace("'", '"')
        )
    return text


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=TABLES_DIRECTORY, help="where the .toml files are written")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("detection", "tracking"):
        (directory / f"{name}.toml").write_text(table_text(name))
        print(directory / f"{name}.toml")


if __name__ == "__main__":
    main()
