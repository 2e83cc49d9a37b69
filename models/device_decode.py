"""JPEG decoding on an NVIDIA GPU by nvImageCodec (nvJPEG, and the decoder engine where the card has one).

Chosen by `preprocess.decoder = "device"` of an entry; the default is the processor. Only the decoding moves: pixels
come back to the host and are resized there, as in `resizing.py`. That pays for large photographs (6 ms on a CPU at
1080p) and not for small ones. nvJPEG's arithmetic is its own: pixels may differ from libjpeg's by a few levels.

The package is `nvidia-nvimgcodec-cu13` (or -cu12, as onnxruntime's CUDA). **Never run on a GPU by this project**: the
tests run the library's own CPU back end through this file, and the GPU's part with a stand-in that records calls.
"""

import os
import threading
from typing import Any

import numpy as np

from models.catalog import Variant, VariantError, kind_and_index
from models.compiled_resizing import Pixels


class DeviceDecoder:
    """Decodes JPEGs on GPU `device_id`; -1: by the library's CPU back end. May be called from many threads."""

    def __init__(self, codec: Any, device_id: int) -> None:
        self._codec = codec
        self._device_id = device_id
        self._own = threading.local()  # decoders keep buffers: one for each thread
        self._decoder()  # a device that is missing is noticed now

    def decode(self, payload: bytes, colour: str) -> Pixels | None:
        """[height, width, 3], or [height, width] when `colour` is "gray"; None if it cannot: try the processor."""
        codec = self._codec
        params = codec.DecodeParams(
            apply_exif_orientation=False,  # as the other decoders here
            color_spec=codec.ColorSpec.GRAY if colour == "gray" else codec.ColorSpec.SRGB,
        )
        image = self._decoder().decode(payload, params=params)
        host = None if image is None else image.cpu()
        if host is None:
            return None
        pixels = np.asarray(host)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != (1 if colour == "gray" else 3):
            return None
        return pixels[:, :, 0] if colour == "gray" else pixels

    def _decoder(self) -> Any:
        found = getattr(self._own, "decoder", None)
        if found is None:
            codec = self._codec
            kinds = (codec.CPU_ONLY,) if self._device_id < 0 else (codec.HW_GPU_ONLY, codec.GPU_ONLY)
            found = self._own.decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY if self._device_id < 0 else self._device_id,
                max_num_cpu_threads=1,
                backends=[codec.Backend(kind) for kind in kinds],
                options=":fancy_upsampling=1",  # as libjpeg: smooth chroma
            )
        return found


def open_decoder(variant: Variant, device: str) -> DeviceDecoder | None:
    """What the entry asks for: None for the processor. Raises `VariantError` without package or GPU."""
    if variant.preprocess.decoder == "cpu":
        return None
    kind, index = kind_and_index(device)
    if kind == "cpu":
        remedy = 'the worker\'s device is "cpu": leave it out, or give the worker a GPU (device = "cuda")'
        raise VariantError(variant.name, "preprocess.decoder", "device", remedy)
    # A broken picture is an answer to the client, not a line in the log.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        remedy = 'pip install "nvidia-nvimgcodec-cu13[nvjpeg]" (-cu12 with CUDA 12), or leave it out'
        raise VariantError(variant.name, "preprocess.decoder", "device", remedy) from error
    try:
        return DeviceDecoder(nvimgcodec, index)
    except RuntimeError as error:
        remedy = f"nvImageCodec finds no GPU ({str(error)[:200]}): check the driver, or leave it out"
        raise VariantError(variant.name, "preprocess.decoder", "device", remedy) from error
