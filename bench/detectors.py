"""Service times of exported detectors beside torch's own: one image of 640 x 480, one thread.

    tidegate models export faster_rcnn_r50_fpn --weights random --precision float32 -o model_repository
    python bench/detectors.py faster_rcnn_r50_fpn --catalog model_repository --eager

Wall time is what a client waits for; processor time is what is left of it where other programs use the cores, too. The
comparison with torch draws random weights anew (their values do not matter to the time, the number of boxes hardly).
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from models.detection import Image, fit, open_detector
from models.edge_catalog import EdgeVariant, load_edge_catalog


def main() -> None:
    """Command line: measure the named variants one after the other and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="variants of the edge catalog")
    parser.add_argument("--catalog", type=Path, action="append", default=[], help="folder that an export wrote")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each variant, after one run to warm up")
    parser.add_argument("--eager", action="store_true", help="torch beside onnxruntime (Faster R-CNN only)")
    asked = parser.parse_args()
    variants = load_edge_catalog(asked.catalog)
    blocks = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = np.kron(blocks, np.ones((16, 16, 1), dtype=np.uint8))
    print(f"{'variant':32}{'engine':14}{'wall s':>8}{'least':>8}{'cpu s':>8}{'runs':>6}{'peak MB':>9}")
    for name in asked.names:
        began = time.perf_counter()
        detector = open_detector(variants[name])
        loaded_s = time.perf_counter() - began
        _measure(name, "onnxruntime", partial(detector.detect, image), asked.seconds)
        print(f"{'':32}loading {loaded_s:.1f} s, fitting the image {_fit_ms(image, variants[name]):.0f} ms")
        detector.close()
        if asked.eager:
            _measure(name, "torch", _eager(name, image, variants[name]), asked.seconds)


def _measure(name: str, engine: str, run: Callable[[], object], seconds: float) -> None:
    run()
    wall: list[float] = []
    cpu: list[float] = []
    end = time.perf_counter() + seconds
    while not wall or time.perf_counter() < end:
        began, used = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the process so far
    figures = f"{np.median(wall):8.2f}{min(wall):8.2f}{np.median(cpu):8.2f}{len(wall):6}{peak_mb:9.0f}"
    print(f"{name:32}{engine:14}{figures}", flush=True)


def _fit_ms(image: Image, variant: EdgeVariant) -> float:
    began = time.perf_counter()
    fit(image, variant)
    return 1000 * (time.perf_counter() - began)


def _eager(name: str, image: Image, variant: EdgeVariant) -> Callable[[], object]:
    import torch

    from models.edge_weights import build_faster_rcnn

    torch.set_num_threads(1)
    served = build_faster_rcnn(name, "random").in_precision("float32")
    tensor = torch.from_numpy(fit(image, variant).tensor)

    def run() -> object:
        with torch.no_grad():
            return served(tensor)

    return run


if __name__ == "__main__":
    main()
