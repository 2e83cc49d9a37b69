"""Export timm's ImageNet models to ONNX, with a catalog entry beside each file.

The result is a Triton-style repository: `FOLDER/NAME/1/model.onnx`, its class names, and `FOLDER/NAME.toml`, the
entry that `--catalog FOLDER` reads. Weights come from timm (downloaded), from a file of yours, or are random;
random ones have no accuracy, and the entry says so. Every
export is checked: the file must equal the network to 1e-3 of the largest output.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.architectures import torchvision_operators
from models.catalog import Variant, VariantError, read_variant

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Source:
    """What timm calls a model, its input side in pixels and the published top-1 accuracy at that side."""

    architecture: str
    side: int
    accuracy: float | None
    memory_mb: float


# Accuracies: timm's results on ImageNet's validation set. At 224 pixels none is published for PNASNet-5.
SOURCES = {
    "efficientnet_b0": Source("efficientnet_b0.ra_in1k", 224, 0.7769, 80.0),
    "pnasnet5large": Source("pnasnet5large.tf_in1k", 331, 0.8278, 700.0),
    "pnasnet5large_224": Source("pnasnet5large.tf_in1k", 224, None, 600.0),
}


def export(
    name: str,
    folder: Path,
    *,
    weights: str = "timm",
    runtime: str = "onnxruntime",
    precision: str = "float32",
    seed: int = 0,
    on_step: Callable[[str], None] = lambda step: None,
) -> Variant:
    """Export `name` into `folder`; gives the variant as the catalog will read it.

    `weights` is "timm", "random" (drawn by `seed`) or the path of a state dict (.safetensors, .pth). `runtime` is
    what the entry asks for: "onnxruntime" and "openvino" read an ONNX file, "torch" a .pt2 program; the latter
    two append their name to the variant's. Raises `VariantError` if the name, the weights or a package is
    missing, or the file differs from torch.
    """
    if name not in SOURCES:
        raise VariantError("export", "name", name, f"choose one of {', '.join(SOURCES)}")
    if runtime not in ("onnxruntime", "openvino", "torch"):
        raise VariantError("export", "runtime", runtime, "choose onnxruntime, openvino or torch")
    source = SOURCES[name]
    called = name if runtime == "onnxruntime" else f"{name}_{runtime}"
    on_step("building the network")
    network, settings = build(source, weights, seed)
    file = folder / called / "1" / ("model.pt2" if runtime == "torch" else "model.onnx")
    file.parent.mkdir(parents=True, exist_ok=True)
    on_step("translating it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own insides
        _write_file(network, source.side, file)
    on_step("comparing the file with the network")
    difference = largest_difference(network, file, source.side)
    if not difference <= TOLERANCE:
        file.unlink()
        raise VariantError("export", name, difference, f"differs from torch by more than {TOLERANCE}")
    on_step("writing its catalog entry")
    (folder / called / "labels.txt").write_text("\n".join(_class_names()) + "\n", encoding="utf-8")
    entry = folder / f"{called}.toml"
    text = entry_text(
        called, file.name, source, settings, weights, runtime=runtime, precision=precision, difference=difference
    )
    entry.write_text(text, encoding="utf-8")
    return read_variant(entry)


def largest_difference(network: Any, file: Path, side: int, batch_sizes: tuple[int, ...] = (1, 2)) -> float:
    """The largest difference between the logits of `network` and those of `file`, on seeded noise.

    Relative to the largest logit, so that it means the same for trained and for random weights.
    """
    import torch

    run = _runner(file)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in batch_sizes:
        images = torch.randn(size, 3, side, side, generator=generator)
        with torch.no_grad():
            expected = network(images).numpy()
        got = run(images)
        largest = max(largest, float(np.abs(got - expected).max() / np.abs(expected).max()))
    return largest


def build(source: Source, weights: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The torch network in evaluation mode, and timm's preprocessing settings for it. Raises `VariantError`."""
    try:
        import torch

        torchvision_operators.register(compiled=False)
        import timm
        from timm.data.config import resolve_data_config
    except ImportError as error:
        remedy = 'pip install -e ".[train]"; then: pip install --no-deps torchvision==0.28.0 timm'
        raise VariantError("export", "package", error.name, remedy) from error
    torch.manual_seed(seed)
    try:
        network = timm.create_model(source.architecture, pretrained=weights == "timm")
    except Exception as error:  # the hub raises many kinds: no network, no such file, no permission
        remedy = f"timm could not fetch them ({error}); give --weights PATH or --weights random"
        raise VariantError("export", "weights", weights, remedy) from error
    if weights == "random":
        _settle(network, source.side)
    elif weights != "timm":
        _load(network, Path(weights))
    settings = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
    return network.eval(), settings


def _settle(network: Any, side: int) -> None:
    """Fit the batch normalisation of a random network to noise.

    Untouched, its activations shrink towards zero layer by layer: outputs could not be compared with anything,
    and numbers too small for the processor's normal range would slow it down.
    """
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # average over all batches seen
            module.reset_running_stats()
    with torch.no_grad():
        network.train()(torch.randn(4, 3, side, side))
    # timm starts some classifiers at (nearly) zero.
    torch.nn.init.normal_(network.get_classifier().weight, std=0.02)


def _load(network: Any, file: Path) -> None:
    """Load a state dict without running any code that the file may carry."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        # Training frameworks often wrap the weights once more.
        network.load_state_dict(state.get("state_dict", state))
    except Exception as error:  # a missing file, a foreign format, other layer names: all the user's to mend
        remedy = f"cannot be used for this network ({str(error)[:300]})"
        raise VariantError("export", "weights", str(file), remedy) from error


def _runner(file: Path) -> Callable[[Any], Any]:
    """A function from a torch tensor to the file's outputs as numpy."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"input": images.numpy()})[0]
    import torch

    module = torch.export.load(str(file)).module()

    def run(images: Any) -> Any:
        with torch.no_grad():
            return module(images).numpy()

    return run


def _write_file(network: Any, side: int, file: Path) -> None:
    """Write one file with a free batch axis (1 to 64), input `input` and output `logits`."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.zeros(2, 3, side, side),), dynamic_shapes=({0: batch},))
    if file.suffix == ".pt2":
        torch.export.save(program, str(file))
        return
    onnx = torch.onnx.export(program, input_names=["input"], output_names=["logits"], dynamo=True, verbose=False)
    write_onnx(onnx, file)


def write_onnx(program: Any, file: Path) -> None:
    """Write what `torch.onnx.export` gave, without its notes: they name the folders of the machine that made it."""
    import onnx

    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")
    onnx.save_model(model, file)


def _class_names() -> list[str]:
    """Names of ImageNet's 1,000 classes in the order of the outputs."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return [str(info.index_to_description(index)) for index in range(info.num_classes())]  # type: ignore[no-untyped-call]


def entry_text(
    name: str,
    file_name: str,
    source: Source,
    settings: dict[str, Any],
    weights: str,
    *,
    runtime: str = "onnxruntime",
    precision: str = "float32",
    difference: float,
) -> str:
    """The variant's TOML, with timm's preprocessing in the catalog's words."""
    resize = math.floor(source.side / settings["crop_pct"])
    accuracy = 'source = "none"'
    if weights == "timm" and source.accuracy is not None:
        accuracy = f'value = {source.accuracy}\nsource = "published"\nnote = "ImageNet top-1, timm"'
    origin = {"timm": f"timm {source.architecture}", "random": "RANDOM: answers mean nothing"}.get(weights, weights)
    return f"""# Written by `tidegate models export` (weights: {weights}).
# Compared with torch: largest difference {difference:.1e} of the largest logit.
name = "{name}"
service = "imagenet"
runtime = "{runtime}"
precision = "{precision}"
path = "{name}/1/{file_name}"
labels = "{name}/labels.txt"
memory_mb = {source.memory_mb}
description = {json.dumps(f"{source.architecture} at {source.side} pixels, weights: {origin}")}

[accuracy]
{accuracy}

[input]
name = "input"
shape = [3, {source.side}, {source.side}]

[preprocess]
resize = {resize}
crop = "centre"
mean = {list(settings["mean"])}
std = {list(settings["std"])}
interpolation = "{settings["interpolation"]}"
"""
