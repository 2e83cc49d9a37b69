"""Measure every runtime on a GPU: efficientnet_b0 and pnasnet5large, batches of 1, 3, 5 and 8.

    python -m bench.gpu_runtimes --out results/gpu

Networks have random weights (times do not depend on them; answers mean nothing). Times are those of
`Runtime.execute`: a batch of prepared inputs in host memory in, probabilities in host memory out. Beside each
median stands a floor by arithmetic: the larger of multiplications over this device's measured matrix rate and
weights over its measured memory rate. Writes gpu.json, gpu.md and profiles.json; what could not be measured is
listed with the reason. `--device cpu` tries the script out where there is no GPU.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from models import export as exporting
from models.catalog import Variant
from models.preprocess import Prepared
from models.profiles import Profile, ServiceTimes, service_times, write_profiles
from models.runtime import open_runtime

BATCH_SIZES = (1, 3, 5, 8)
MODELS = ("efficientnet_b0", "pnasnet5large_224", "pnasnet5large")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def repeat(work: Callable[[], object], seconds: float, at_least: int = 10) -> list[float]:
    """Times in seconds of `work`, repeated for `seconds`, after up to three runs that are not counted."""
    for _ in range(min(3, at_least)):
        work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def device_rates(device: str) -> dict[str, float]:
    """Measured peaks of this device: matrix TFLOP/s in float32 (TF32 on a GPU) and float16, memory GB/s."""
    rates: dict[str, float] = {}
    side = 8192 if device == "cuda" else 1024

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    torch.backends.cuda.matmul.allow_tf32 = True
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        if device == "cpu" and name == "float16":
            continue
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        best = min(repeat(finished(lambda a=left, b=right: a @ b), 1.0))  # type: ignore[misc]
        rates[f"{name}_tflops"] = 2 * side**3 / best / 1e12
    source = torch.empty((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    best = min(repeat(finished(lambda: target.copy_(source)), 0.5))
    rates["memory_gb_per_s"] = 2 * source.numel() * 4 / best / 1e9  # read and written
    return rates


def work_of(network: Any, side: int) -> tuple[float, float]:
    """(floating point operations of one image, bytes of the weights in float32)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, side, side))
    weights = sum(parameter.numel() for parameter in network.parameters()) * 4
    return float(counter.get_total_flops()), float(weights)


def floor_s(flops: float, weights: float, batch: int, precision: str, rates: dict[str, float]) -> float:
    """A batch's operations at the matrix rate, or its weights at the memory rate, whichever takes longer.

    Nothing that multiplies directly can be quicker; convolutions by transforms (Winograd) may be, a little.
    """
    half = precision == "float16"
    rate = rates.get(f"{precision}_tflops", rates["float32_tflops"])
    compute = batch * flops / (rate * 1e12)
    memory = weights * (0.5 if half else 1.0) / (rates["memory_gb_per_s"] * 1e9)
    return max(compute, memory)


def put_floors(report: dict[str, Any]) -> None:
    """Sets every row's `floor_ms` from the rates as they are known now."""
    for row in report["rows"]:
        model = report["models"][row["model"]]
        flops, weights = model["gflops"] * 1e9, model["weights_mb"] * 1e6
        row["floor_ms"] = 1000 * floor_s(flops, weights, row["batch"], row["precision"], report["rates"])


def eager(network: Any, device: str) -> Callable[[list[Prepared]], np.ndarray[Any, Any]]:
    """What one gets without any of this project's care: the network called as it is."""
    moved = network.to(device)

    def run(batch: list[Prepared]) -> np.ndarray[Any, Any]:
        images = torch.from_numpy(np.stack([item.tensor for item in batch if item.tensor is not None]))
        with torch.inference_mode():
            found: np.ndarray[Any, Any] = torch.softmax(moved(images.to(device)), dim=1).cpu().numpy()
        return found

    return run


def candidates(onnx: Variant | None, program: Variant, device: str) -> list[tuple[str, Variant, str]]:
    """(name, variant, device) of every runtime to try."""
    half = {"precision": "float16"}
    if device == "cpu":
        found = [("torch", program, "cpu")]
        return found if onnx is None else [*found, ("onnxruntime", onnx, "cpu")]
    found = [
        ("torch graphs float32", program, "cuda"),
        ("torch graphs float16", msgspec.structs.replace(program, **half), "cuda"),
    ]
    if onnx is not None:
        found += [
            ("onnxruntime cuda float32", onnx, "cuda"),
            ("tensorrt float32", onnx, "tensorrt"),
            ("tensorrt float16", msgspec.structs.replace(onnx, **half), "tensorrt"),
        ]
    return found


def measure_model(
    name: str,
    folder: Path,
    device: str,
    seconds: float,
    at_least: int,
    report: dict[str, Any],
) -> list[Profile]:
    """Export and measure one model with every runtime; rows and failures go into `report`."""
    source = exporting.SOURCES[name]
    say(f"{name}: exporting")
    program = exporting.export(name, folder, weights="random", runtime="torch")
    onnx: Variant | None = None
    try:
        onnx = exporting.export(name, folder, weights="random")
    except Exception as error:  # a missing exporter must not cost the torch figures
        report["not_measured"].append({"model": name, "runtime": "all that read ONNX", "reason": str(error)[:300]})
    network, _ = exporting.build(source, "random", 0)
    flops, weights = work_of(network, source.side)
    noise = np.random.default_rng(0).standard_normal((8, *program.input.shape)).astype(np.float32)
    inputs = [Prepared(tensor=image) for image in noise]
    with torch.no_grad():
        expected = torch.softmax(network(torch.from_numpy(noise[:1])), dim=1).numpy()[0]
    profiles: list[Profile] = []

    def rows(runtime: str, precision: str, execute: Callable[[list[Prepared]], Any]) -> list[ServiceTimes]:
        found: list[ServiceTimes] = []
        for batch in BATCH_SIZES:
            times = repeat(lambda size=batch: execute(inputs[:size]), seconds, at_least)  # type: ignore[misc]
            found.append(service_times(batch, times))
            median = statistics.median(times)
            report["rows"].append(
                {
                    "model": name,
                    "runtime": runtime,
                    "batch": batch,
                    "samples": len(times),
                    "p50_ms": 1000 * median,
                    "p98_ms": 1000 * float(np.quantile(times, 0.98)),
                    "images_per_s": batch / median,
                    "precision": precision,
                }
            )
            say(f"{name}: {runtime}, batch {batch}: {1000 * median:.2f} ms")
        return found

    report["models"][name] = {"gflops": flops / 1e9, "weights_mb": weights / 1e6, "side": source.side}
    for label, variant, where in candidates(onnx, program, device):
        try:
            opened = time.perf_counter()
            runtime = open_runtime(variant, device=where, threads=torch.get_num_threads())
            runtime.warm_up()
            ready_s = time.perf_counter() - opened
            scores = runtime.execute(inputs[:1])[0].scores
            times = rows(label, variant.precision, runtime.execute)
            runtime.close()
        except Exception as error:  # one missing library must not cost the other figures
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            report["not_measured"].append({"model": name, "runtime": label, "reason": reason})
            say(f"{name}: {label}: not measured: {reason}")
            continue
        difference = float(np.abs(scores - expected).max())
        report["loaded"].append(
            {"model": name, "runtime": label, "ready_s": ready_s, "largest_probability_difference": difference}
        )
        machine = report["device"]
        profiles.append(
            Profile(
                variant=variant.name,
                device=f"{where}, {label}",
                source="measured",
                machine=machine,
                accuracy=variant.accuracy,
                times=tuple(times),
            )
        )
    rows("torch eager float32", "float32", eager(network, device))
    return profiles


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"Device: {report['device']}. torch {report['torch']}, Python {report['python']}, {report['date']}.",
        f"Measured peaks: {', '.join(f'{key} {value:.1f}' for key, value in report['rates'].items())}.",
        "Random weights: times do not depend on them, answers mean nothing.",
        "A floor above a median says that the peaks were measured too low: other programs were using the device.",
        "",
        "| model | runtime | batch | median ms | p98 ms | images/s | floor ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['model']} | {row['runtime']} | {row['batch']} | {row['p50_ms']:.2f} | {row['p98_ms']:.2f} "
            f"| {row['images_per_s']:.0f} | {row['floor_ms']:.2f} |"
        )
    lines += ["", "Not measured:", ""]
    lines += [f"- {item['model']}, {item['runtime']}: {item['reason']}" for item in report["not_measured"]]
    if not report["not_measured"]:
        lines.append("- nothing was left out")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="per runtime and batch size")
    parser.add_argument("--at-least", type=int, default=10, help="runs per runtime and batch size, however long")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is false; --device cpu tries the script out")
    options.out.mkdir(parents=True, exist_ok=True)
    say("measuring the device's peaks")
    rates = device_rates(options.device)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
    report: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rates": rates,
        "models": {},
        "rows": [],
        "loaded": [],
        "not_measured": [],
    }
    profiles: list[Profile] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            profiles += measure_model(name, Path(folder), options.device, options.seconds, options.at_least, report)
            # Again, and the better of both: a neighbour on the machine must not lower the floor's rates.
            again = device_rates(options.device)
            rates.update({key: max(value, again[key]) for key, value in rates.items()})
            put_floors(report)
            # After each model: an interrupted run keeps what it has.
            (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            (options.out / "gpu.md").write_text(markdown(report))
            write_profiles(options.out / "profiles.json", profiles)
    print((options.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
