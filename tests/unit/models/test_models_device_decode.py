"""Device decode: the library's own CPU back end gives libjpeg's pixels; what a GPU would be asked, by a stand-in."""

import importlib.util
import io
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.catalog import Input, Preprocess, Variant, VariantError
from models.device_decode import DeviceDecoder, open_decoder
from models.preprocess import InvalidInput, decode, prepare

PIXELS = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def encoded(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


def variant(decoder: str = "device", colour: str = "rgb") -> Variant:
    return Variant(
        name="v",
        service="s",
        runtime="onnxruntime",
        path="x",
        labels=("a",),
        input=Input(shape=(3, 40, 50)),
        preprocess=Preprocess(decoder="device" if decoder == "device" else "cpu"),
    )


class Codec(types.ModuleType):
    """nvImageCodec as far as it is used, on a machine with one GPU. `gives`: what decoding gives."""

    CPU_ONLY, GPU_ONLY, HW_GPU_ONLY, NVIMGCODEC_DEVICE_CPU_ONLY = "cpu", "gpu", "hw", -99999

    class ColorSpec:
        GRAY, SRGB = "gray", "rgb"

    def __init__(self, gives: Any = PIXELS, gpus: int = 1) -> None:
        super().__init__("nvimgcodec")
        self.calls: list[tuple[str, Any]] = []
        self.gives = gives
        codec = self

        class Decoder:
            def __init__(self, **settings: Any) -> None:
                if settings["device_id"] >= gpus:
                    raise RuntimeError("CUDA Runtime failure: no such device")
                codec.calls.append(("decoder", settings))

            def decode(self, payload: bytes, params: Any) -> Any:
                codec.calls.append(("decode", params))
                return None if codec.gives is None else types.SimpleNamespace(cpu=lambda: codec.gives)

        self.Decoder = Decoder

    def Backend(self, kind: str) -> str:  # noqa: N802 - the library's name
        return kind

    def DecodeParams(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings


def installed(monkeypatch: pytest.MonkeyPatch, codec: Codec | None) -> None:
    parent = types.ModuleType("nvidia")
    if codec is not None:
        parent.nvimgcodec = codec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia", parent)


def test_the_gpu_of_the_worker_decodes_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(gpus=3)
    installed(monkeypatch, codec)
    decoder = open_decoder(variant(), "cuda:2")
    assert decoder is not None
    assert np.array_equal(decode(encoded(), "image/jpeg", "rgb", decoder=decoder), PIXELS)
    (_, opened), (_, asked) = codec.calls
    assert opened["device_id"] == 2
    assert opened["backends"] == ["hw", "gpu"]
    assert asked == {"apply_exif_orientation": False, "color_spec": "rgb"}
    # PNGs stay on the processor.
    assert np.array_equal(decode(encoded("PNG"), "image/png", "rgb", decoder=decoder), PIXELS)
    assert len(codec.calls) == 2


def test_each_thread_has_a_decoder_of_its_own() -> None:
    codec = Codec()
    decoder = DeviceDecoder(codec, 0)
    for _ in range(2):
        worker = threading.Thread(target=lambda: [decoder.decode(b"x", "rgb") for _ in range(3)])
        worker.start()
        worker.join()
    assert [what for what, _ in codec.calls].count("decoder") == 3


@pytest.mark.parametrize("gives", [None, PIXELS[:, :, 0], PIXELS.astype(np.uint16), np.dstack([PIXELS, PIXELS])])
def test_what_the_gpu_cannot_decode_the_processor_does(gives: Any) -> None:
    decoder = DeviceDecoder(Codec(gives), 0)
    by_processor = decode(encoded(), "image/jpeg", "rgb")
    assert np.array_equal(decode(encoded(), "image/jpeg", "rgb", decoder=decoder), by_processor)


def test_a_damaged_picture_is_refused_with_the_processors_reason() -> None:
    with pytest.raises(InvalidInput, match="cut short"):
        decode(encoded()[:900], "image/jpeg", "rgb", decoder=DeviceDecoder(Codec(None), 0))


def test_gray_comes_without_a_channel_axis() -> None:
    codec = Codec(PIXELS[:, :, :1])
    assert decode(encoded(), "image/jpeg", "gray", decoder=DeviceDecoder(codec, 0)).shape == (40, 50)
    assert codec.calls[-1][1]["color_spec"] == "gray"


def test_prepare_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    white = np.full_like(PIXELS, 255)
    tensor = prepare(encoded(), "image/jpeg", variant(), decoder=DeviceDecoder(Codec(white), 0)).tensor
    assert tensor is not None
    assert tensor.tolist() == np.ones((3, 40, 50)).tolist()


def test_missing_package_gpu_and_sense_are_start_up_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_decoder(variant("cpu"), "cuda") is None
    with pytest.raises(VariantError, match='device is "cpu"'):
        open_decoder(variant(), "cpu")
    installed(monkeypatch, None)
    with pytest.raises(VariantError, match="pip install"):
        open_decoder(variant(), "cuda")
    installed(monkeypatch, Codec(gpus=1))
    with pytest.raises(VariantError, match="finds no GPU"):
        open_decoder(variant(), "cuda:1")


@pytest.mark.slow  # not slow, but NVIDIA's licence is not for everybody to accept by make test
@pytest.mark.parametrize("colour", ["rgb", "gray"])
def test_the_library_itself_on_its_cpu_back_end(monkeypatch: pytest.MonkeyPatch, colour: str) -> None:
    if importlib.util.find_spec("nvidia") is None:
        pytest.skip('needs nvidia-nvimgcodec-cu13: pip install -e ".[slow]"')
    monkeypatch.setenv("PYNVIMGCODEC_VERBOSITY", "0")
    nvimgcodec = pytest.importorskip("nvidia.nvimgcodec", reason="needs nvidia-nvimgcodec-cu13")
    decoder = DeviceDecoder(nvimgcodec, -1)
    found = decoder.decode(encoded(), colour)
    assert found is not None
    assert np.array_equal(found, decode(encoded(), "image/jpeg", colour))
    assert decoder.decode(b"\xff\xd8\xff damaged", colour) is None
