"""Where the time goes from a JPEG of 500 x 375 pixels to the input of a 224-pixel model, on one thread.

    python -m bench.image_preparing

Each step in a loop by itself (caches warm), least and median of `--rounds` in ms, as JSON. `whole`: Pillow's resize of
the whole picture, from which torchvision and timm take the cut. The others give the same pixels in less: `compiled` by
this project's passes, `pillow` as it goes without them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import simplejpeg
from PIL import Image

from bench.imagenet_serving import photograph
from models.catalog import Preprocess
from models.compiled_resizing import Pixels, passes
from models.preprocess import decode, to_input
from models.resizing import resized

HOW = Preprocess(
    resize=256, crop="centre", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic"
)
CUT = msgspec.structs.replace(HOW, resize=0, crop="none")
SHAPE = (3, 224, 224)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Least and median time of every step in ms."""
    body = photograph()
    pixels = simplejpeg.decode_jpeg(body)
    cut = resized(pixels, HOW, *SHAPE[1:])
    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(body, "image/jpeg", "rgb"),
        "whole": lambda: np.asarray(Image.fromarray(pixels).resize((341, 256), Image.Resampling.BICUBIC)),
        "normalise": lambda: to_input(cut, CUT, SHAPE),
    }
    for way in ("compiled", "pillow") if passes() is not None else ("pillow",):
        resize = partial(resized, how=HOW, height=SHAPE[1], width=SHAPE[2], compiled=way == "compiled")
        steps[f"resize_{way}"] = partial(resize, pixels)
        steps[f"all_{way}"] = partial(_all, body, resize)
    return {name: timed(step, rounds) for name, step in steps.items()}


def _all(body: bytes, resize: Callable[[Pixels], Pixels]) -> object:
    return to_input(resize(decode(body, "image/jpeg", "rgb")), CUT, SHAPE)


def timed(step: Callable[[], object], rounds: int) -> dict[str, float]:
    """Least and median of `rounds` calls, in ms, after five that do not count."""
    times_ms: list[float] = []
    for _ in range(rounds + 5):
        started_s = time.perf_counter()
        step()
        times_ms.append(1e3 * (time.perf_counter() - started_s))
    return {"least": round(min(times_ms[5:]), 3), "median": round(statistics.median(times_ms[5:]), 3)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    print(json.dumps(measure(parser.parse_args().rounds), indent=1))


if __name__ == "__main__":
    main()
