"""Train `digits_light` and `digits_heavy` and export them to ONNX, with the record of how.

    python -m models.train_digits all        minutes on two cores; seeded

The data are scikit-learn's 1,797 handwritten digits (8x8, 17 gray levels). Half of them, chosen by seed and
written to `models/pretrained/digits_split.json`, are held out: never trained on, used for accuracy and as the
load generator's payloads. Sizes of the networks were chosen on a quarter of the *training* half
(`--validate`), never on the held-out one. Accuracy is measured through the serving path: a 64x64 PNG or JPEG
is decoded, resized and run by onnxruntime.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from models.architectures.digits import DigitsHeavy, DigitsLight, DigitsViews
from models.catalog import load_catalog
from models.export import write_onnx
from models.runtime import open_runtime

PRETRAINED = Path(__file__).parent / "pretrained"
SPLIT_SEED = 20240229
PAYLOAD_SIDE = 64  # pixels; what the load generator sends
BATCH = 32

Images = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

# variant -> (network, input side in pixels, epochs, shifted views averaged when serving)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "digits_light": (lambda: DigitsLight(width=40, depth=4), 36, 20, 8),
    "digits_heavy": (lambda: DigitsHeavy(width=64, blocks=2), 40, 20, 9),
}


def split() -> tuple[Indices, Indices]:
    """Indices of the training half and of the held-out half, each class divided evenly. Sorted."""
    labels = load_digits().target
    rng = np.random.default_rng(SPLIT_SEED)
    train: list[int] = []
    held_out: list[int] = []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        half = len(members) // 2
        train += members[:half].tolist()
        held_out += members[half:].tolist()
    return np.array(sorted(train)), np.array(sorted(held_out))


def payload_image(
    digit: npt.NDArray[np.float64], side: int = PAYLOAD_SIDE, filter_name: str = "NEAREST"
) -> Image.Image:
    """An 8x8 digit of levels 0..16 as a gray picture of `side` x `side` pixels."""
    small = Image.fromarray(np.rint(digit * 255.0 / 16.0).astype(np.uint8))
    return small.resize((side, side), Image.Resampling[filter_name])


def payload(digit: npt.NDArray[np.float64], image_format: str) -> bytes:
    """The picture's file, "PNG" or "JPEG" (quality 90)."""
    buffer = io.BytesIO()
    payload_image(digit).save(buffer, image_format, quality=90)
    return buffer.getvalue()


def training_images(digits: npt.NDArray[np.float64], side: int) -> Tensor:
    """[3, n, 1, side, side] in 0..1: each digit enlarged by three filters and resized as serving resizes."""

    def one(digit: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float32]:
        picture = payload_image(digit, filter_name=name).resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(picture, dtype=np.float32) / 255.0

    filters = ("NEAREST", "BILINEAR", "BICUBIC")
    stacked = np.stack([[one(digit, name) for digit in digits] for name in filters])
    return torch.from_numpy(stacked)[:, :, None]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 10%, move by up to 8% of the side, at random."""
    count = len(images)

    def uniform(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, scale = uniform(0.21), 1 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, uniform(0.16)], 1), torch.stack([sin, cos, uniform(0.16)], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(name: str, chosen: Indices, seed: int, progress: Progress, epochs: int | None = None) -> nn.Module:
    """A trained network for variant `name` from the digits at `chosen`, in evaluation mode."""
    build, side, planned, _ = NETWORKS[name]
    epochs = epochs or planned
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = load_digits()
    images = training_images(data.images[chosen], side)
    labels = torch.from_numpy(data.target[chosen])
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    steps = epochs * (len(chosen) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    task = progress.add_task(name, total=epochs)
    for _ in range(epochs):
        order = torch.randperm(len(chosen), generator=generator)
        for start in range(0, len(chosen) - BATCH + 1, BATCH):
            some = order[start : start + BATCH]
            kind = torch.randint(3, (len(some),), generator=generator)
            minibatch = augment(images[kind, some], generator) * 2 - 1
            # Half precision: a third of the time on CPUs that have it, and no loss on a task this small.
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(minibatch)
            loss = functional.cross_entropy(logits.float(), labels[some], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        progress.advance(task)
    return network.eval()


def accuracy_in_torch(name: str, network: nn.Module, chosen: Indices) -> float:
    """Share of the digits at `chosen` that the network names rightly, without the serving path."""
    data = load_digits()
    images = training_images(data.images[chosen], NETWORKS[name][1])[0] * 2 - 1
    served = as_served(name, network)
    with torch.no_grad():
        named = torch.cat([served(part).argmax(1) for part in torch.split(images, 64)])
    return float((named.numpy() == data.target[chosen]).mean())


def as_served(name: str, network: nn.Module) -> nn.Module:
    """The network with the moved views that its variant averages."""
    return DigitsViews(network, NETWORKS[name][3]).eval()


def export(name: str, network: nn.Module) -> Path:
    """Write `network` (with its serving views) to `models/pretrained/NAME/1/model.onnx`, batch axis free."""
    side = NETWORKS[name][1]
    served = as_served(name, network)
    file = PRETRAINED / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, 1, side, side)
    batch = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.onnx.export(
        served,
        (example,),
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=(batch["input"],),
        dynamo=True,
        verbose=False,
    )
    write_onnx(program, file)
    return file


def held_out_answers(name: str, image_format: str, held_out: Indices) -> npt.NDArray[np.bool_]:
    """Per held-out digit: does the catalog's variant name it rightly, from an encoded image?"""
    data = load_digits()
    runtime = open_runtime(load_catalog()[name])
    content_type = f"image/{image_format.lower()}"
    right = []
    for index in held_out:
        answer = runtime.execute([runtime.prepare(payload(data.images[index], image_format), content_type)])[0]
        right.append(answer.top_k(1)[0][0] == data.target[index])
    runtime.close()
    return np.array(right)


def main() -> None:
    """Command line: train, export and score one variant or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=[*NETWORKS, "all"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="instead of the planned number")
    parser.add_argument(
        "--validate", action="store_true", help="score on a quarter of the training half; write nothing"
    )
    parser.add_argument("--score-only", action="store_true", help="score the files that are there")
    options = parser.parse_args()
    names = list(NETWORKS) if options.variant == "all" else [options.variant]
    train_half, held_out = split()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in names:
            started = time.monotonic()
            if options.validate:
                rng = np.random.default_rng(options.seed)
                order = rng.permutation(train_half)
                network = train(name, order[len(order) // 4 :], options.seed, progress, options.epochs)
                score = accuracy_in_torch(name, network, order[: len(order) // 4])
                print(json.dumps({"variant": name, "validation_accuracy": round(score, 4)}))
                continue
            if not options.score_only:
                export(name, train(name, train_half, options.seed, progress, options.epochs))
            _record(name, options.seed, options.epochs or NETWORKS[name][2], time.monotonic() - started, held_out)
    if not options.validate:
        text = json.dumps({"seed": SPLIT_SEED, "train": train_half.tolist(), "held_out": held_out.tolist()})
        (PRETRAINED / "digits_split.json").write_text(text + "\n")


def _record(name: str, seed: int, epochs: int, train_s: float, held_out: Indices) -> None:
    """Score the exported file on the held-out half and write the training record beside it."""
    png, jpeg = (float(held_out_answers(name, kind, held_out).mean()) for kind in ("PNG", "JPEG"))
    record = {
        "command": f"python -m models.train_digits {name} --seed {seed} --epochs {epochs}",
        "data": "scikit-learn digits, half held out (digits_split.json)",
        "torch": torch.__version__,
        "train_s": round(train_s, 1),
        "held_out_images": len(held_out),
        "held_out_accuracy": {"png": round(png, 4), "jpeg_quality_90": round(jpeg, 4)},
    }
    (PRETRAINED / name / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({"variant": name, **record}))


if __name__ == "__main__":
    main()
