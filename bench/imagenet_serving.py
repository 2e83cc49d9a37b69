"""What serving adds to EfficientNet-B0 on one CPU thread, through a real gateway and worker over HTTP.

    python bench/imagenet_serving.py --catalog model_repository

Every round times, one after the other on the same machine: onnxruntime's bare `run` in this process (one thread, the
worker's options); a request with the input tensor; the same bytes to an emulated instance that answers at once (so
what transfer and gateway cost by themselves); a request with a JPEG of 500 x 375 pixels; decoding and resizing that
JPEG here; the same file in OpenVINO, if that is installed. Medians are printed as JSON. End to end less transfer is
the tensor request less the instant one.
Weights do not matter for times: `tidegate models export efficientnet_b0 --weights random` will do.
"""

import argparse
import contextlib
import http.client
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from models.catalog import TENSOR_CONTENT_TYPE, load_catalog
from models.preprocess import Prepared, prepare
from models.runtime import open_runtime
from tidegate.supervisor import free_port

DEPLOYMENT = """
name = "bench"
catalog = ["{catalog}"]
[services.imagenet]
variants = ["{variant}"]
requirement_ms = 60000
[services.null]
variants = ["null"]
requirement_ms = 60000
[[workers]]
name = "a"
instances = [{{ variant = "{variant}" }}]
[[workers]]
name = "b"
instances = [{{ variant = "null" }}]
"""


@contextlib.contextmanager
def serving(text: str) -> Iterator[int]:
    """`tidegate up` with this deployment, ready; gives the port."""
    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.toml"
        file.write_text(text)
        command = [sys.executable, "-m", "tidegate.main", "up", "-f", str(file), "--port", str(port)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            ends_s = time.monotonic() + 120.0
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1.0)
                    break
                if process.poll() is not None or time.monotonic() > ends_s:
                    sys.exit("tidegate up did not become ready: try it by hand with this catalog")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(30.0)


def photograph() -> bytes:
    """One of scikit-learn's photographs as a JPEG of 500 x 375 pixels, quality 90."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        sys.exit("scikit-learn's photographs are needed: pip install -e '.[demo]'")
    data = io.BytesIO()
    file = Path(found.origin).parent / "datasets" / "images" / "china.jpg"
    Image.open(file).resize((500, 375), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def measure(catalog: Path, name: str, rounds: int) -> dict[str, object]:
    """Medians in ms of every step, from `rounds` rounds."""
    variant = load_catalog([catalog])[name]
    runtime = open_runtime(variant, threads=1)
    jpeg = photograph()
    tensor = np.random.default_rng(0).standard_normal(variant.input.shape).astype(np.float32)
    answers: list[dict[str, float]] = []
    with serving(DEPLOYMENT.format(catalog=catalog.resolve(), variant=name)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)

        def ask(service: str, body: bytes, kind: str) -> None:
            connection.request("POST", f"/v1/{service}", body, {"Content-Type": kind})
            answer = json.loads(connection.getresponse().read())
            if service == "imagenet":
                answers.append(answer["timings_ms"])

        raw = tensor.tobytes()
        steps: dict[str, Callable[[], object]] = {
            "bare": lambda: runtime.execute([Prepared(tensor=tensor)]),
            "tensor": lambda: ask("imagenet", raw, TENSOR_CONTENT_TYPE),
            "instant_tensor": lambda: ask("null", raw, TENSOR_CONTENT_TYPE),
            "jpeg": lambda: ask("imagenet", jpeg, "image/jpeg"),
            "instant_jpeg": lambda: ask("null", jpeg, "image/jpeg"),
            "prepare": lambda: prepare(jpeg, "image/jpeg", variant),
        }
        if importlib.util.find_spec("openvino") is not None:
            other = open_runtime(msgspec.structs.replace(variant, runtime="openvino"), threads=1)
            steps["bare_openvino"] = lambda: other.execute([Prepared(tensor=tensor)])
        times: dict[str, list[float]] = {step: [] for step in steps}
        for number in range(rounds + 5):
            for step, work in steps.items():
                started = time.perf_counter()
                work()
                if number >= 5:
                    times[step].append(1e3 * (time.perf_counter() - started))
    runtime.close()
    medians = {step: round(statistics.median(found), 3) for step, found in times.items()}
    less_transfer = statistics.median(
        tensor_ms - instant_ms for tensor_ms, instant_ms in zip(times["tensor"], times["instant_tensor"], strict=True)
    )
    return {
        "variant": name,
        "rounds": rounds,
        "median_ms": medians,
        "least_ms": {step: round(min(found), 3) for step, found in times.items()},
        "worker_service_ms": round(statistics.median(one["service"] for one in answers), 3),
        "end_to_end_less_transfer_ms": round(less_transfer, 3),
        "ratio_to_bare": round(less_transfer / medians["bare"], 3),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path, default=Path("model_repository"))
    parser.add_argument("--variant", default="efficientnet_b0")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    print(json.dumps(measure(options.catalog, options.variant, options.rounds), indent=1))


if __name__ == "__main__":
    main()
