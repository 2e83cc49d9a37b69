"""Exports: preprocessing equals timm's own, ONNX equals torch, entries say whose weights they carry."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MISSING = [n for n in ("torch", "torchvision", "timm", "onnxscript") if importlib.util.find_spec(n) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

from models import export as exporting  # noqa: E402 - after the skip
from models.architectures import torchvision_operators  # noqa: E402
from models.catalog import Variant, VariantError, load_catalog, variant_from  # noqa: E402
from models.preprocess import prepare  # noqa: E402
from models.runtime import open_runtime  # noqa: E402

torchvision_operators.register(compiled=False)

PHOTOGRAPHS = sorted(Path(str(importlib.util.find_spec("sklearn").origin)).parent.glob("datasets/images/*.jpg"))  # type: ignore[union-attr]


def entry_of(name: str, folder: Path) -> Variant:
    """The entry that an export of `name` would write, without the export."""
    import msgspec
    import timm
    from timm.data.config import resolve_data_config

    source = exporting.SOURCES[name]
    network = timm.create_model(source.architecture, pretrained=False)
    settings = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
    text = exporting.entry_text(name, "model.onnx", source, settings, "random", difference=0.0)
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "labels.txt").write_text("\n".join(exporting._class_names()) + "\n")
    return variant_from(msgspec.toml.decode(text), name, folder)


@pytest.mark.parametrize("name", ["efficientnet_b0", "pnasnet5large", "pnasnet5large_224"])
@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda file: file.stem)
@pytest.mark.parametrize("rotated", [False, True])
def test_preprocessing_equals_timms_own_on_photographs(
    tmp_path: Path, name: str, photograph: Path, rotated: bool
) -> None:
    from timm.data.transforms_factory import create_transform

    body = photograph.read_bytes()
    if rotated:
        buffer = io.BytesIO()
        Image.open(photograph).transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG")
        body = buffer.getvalue()
    variant = entry_of(name, tmp_path)
    pre = variant.preprocess
    crop_pct = {"efficientnet_b0": 0.875, "pnasnet5large": 0.911, "pnasnet5large_224": 0.911}[name]
    transform = create_transform(
        variant.input.shape, interpolation="bicubic", mean=pre.mean, std=pre.std, crop_pct=crop_pct
    )
    expected = transform(Image.open(io.BytesIO(body)).convert("RGB")).numpy()
    got = prepare(body, "image/jpeg", variant).tensor
    assert got is not None
    assert got.shape == expected.shape
    # Every value, and far closer than 1e-3: a level of 255 would show as 0.008 and more.
    assert np.abs(got - expected).max() < 1e-5


def test_class_names_are_imagenets(tmp_path: Path) -> None:
    labels = entry_of("efficientnet_b0", tmp_path).labels
    assert len(labels) == 1000
    assert "tench" in labels[0]
    assert "toilet" in labels[999]


def test_random_weights_have_no_accuracy_and_published_ones_say_so() -> None:
    settings: dict[str, object] = {"crop_pct": 0.875, "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic"}
    source = exporting.SOURCES["efficientnet_b0"]

    def text(chosen: exporting.Source, weights: str) -> str:
        return exporting.entry_text("x", "model.onnx", chosen, settings, weights, difference=0.0)

    random = text(source, "random")
    assert 'source = "none"' in random
    assert "RANDOM" in random
    published = text(source, "timm")
    assert "value = 0.7769" in published
    assert 'source = "published"' in published
    at_224 = text(exporting.SOURCES["pnasnet5large_224"], "timm")
    assert 'source = "none"' in at_224


def test_wrong_names_and_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="choose one of"):
        exporting.export("resnet", tmp_path)
    with pytest.raises(VariantError, match="cannot be used"):
        exporting.export("efficientnet_b0", tmp_path, weights=str(tmp_path / "absent.pth"))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(VariantError, match="cannot be used"):
        exporting.export("efficientnet_b0", tmp_path, weights=str(tmp_path / "bad.safetensors"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's exporter, to itself
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("efficientnet_b0", "onnxruntime"),
        ("efficientnet_b0", "openvino"),
        ("efficientnet_b0", "torch"),
        ("pnasnet5large_224", "onnxruntime"),
        ("pnasnet5large", "onnxruntime"),
    ],
)
def test_the_exported_file_equals_torch_and_serves(tmp_path: Path, name: str, kind: str) -> None:
    import torch
    from safetensors.torch import save_file

    if kind == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("needs openvino: pip install openvino")
    variant = exporting.export(name, tmp_path, weights="random", runtime=kind, seed=3)
    assert load_catalog([tmp_path])[variant.name] == variant
    assert variant.runtime == kind
    if kind != "torch":
        assert b"site-packages" not in Path(variant.path).read_bytes(), "it tells of the machine that made it"
    network, _ = exporting.build(exporting.SOURCES[name], "random", 3)
    runtime = open_runtime(variant)
    batch = [runtime.prepare(file.read_bytes(), "image/jpeg") for file in PHOTOGRAPHS]
    answers = runtime.execute(batch)
    with torch.no_grad():
        images = torch.from_numpy(np.stack([prepared.tensor for prepared in batch if prepared.tensor is not None]))
        expected = torch.softmax(network(images), dim=1).numpy()
    for answer, row in zip(answers, expected, strict=True):
        assert np.abs(answer.scores - row).max() < 1e-3 * row.max()
    # The same weights from a file give the same answers; wrong ones are told apart from right ones.
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    again, _ = exporting.build(exporting.SOURCES[name], str(tmp_path / "mine.safetensors"), 9)
    file = Path(variant.path)
    assert exporting.largest_difference(again, file, variant.input.shape[1]) < exporting.TOLERANCE
    other, _ = exporting.build(exporting.SOURCES[name], "random", 4)
    assert exporting.largest_difference(other, file, variant.input.shape[1]) > 10 * exporting.TOLERANCE
