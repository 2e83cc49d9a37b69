"""Payloads: real digits with true labels, bodies that carry their label, folders of images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loadgen.payloads import Payload, PayloadError, PayloadSet, encode_image, parse_payloads


def pixels(body: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(body)))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"seed": 3, "held_out": [5, 17, 1796]}))
    return path


def test_digits_are_the_held_out_images_with_their_labels(split: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    payloads = parse_payloads("digits", split).payloads
    assert [payload.content_type for payload in payloads] == ["image/png", "image/jpeg"] * 3
    for place, index in enumerate([5, 17, 1796]):
        png, jpeg = payloads[2 * place], payloads[2 * place + 1]
        assert png.label == jpeg.label == int(data.target[index])
        assert np.array_equal(np.rint(pixels(png.body) * 16.0 / 255.0), data.images[index])
        assert np.abs(pixels(jpeg.body) * 16.0 / 255.0 - data.images[index]).mean() < 0.3


def test_one_format_only(split: Path) -> None:
    assert {p.content_type for p in parse_payloads("digits:jpeg", split).payloads} == {"image/jpeg"}


def test_digits_need_a_readable_split(tmp_path: Path) -> None:
    with pytest.raises(PayloadError, match="give --split FILE"):
        parse_payloads("digits")
    with pytest.raises(PayloadError, match="cannot be read"):
        parse_payloads("digits", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"test": []}')
    with pytest.raises(PayloadError, match="held_out"):
        parse_payloads("digits", tmp_path / "bad.json")
    (tmp_path / "far.json").write_text('{"held_out": [1797]}')
    with pytest.raises(PayloadError, match=r"0\.\.1796"):
        parse_payloads("digits", tmp_path / "far.json")


def test_emulated_bodies_carry_their_label_and_have_the_asked_size() -> None:
    payloads = parse_payloads("emulated:40000").payloads
    assert {len(payload.body) for payload in payloads} == {40_000}
    assert [payload.label for payload in payloads] == list(range(1000))
    assert payloads[123].body.startswith(b"tidegate-label:123\n\0\0")
    with pytest.raises(PayloadError, match="too small"):
        parse_payloads("emulated:10")


def test_raw_bytes_have_no_label() -> None:
    (payload,) = parse_payloads("raw:77").payloads
    assert len(payload.body) == 77
    assert payload.label is None
    with pytest.raises(PayloadError, match="raw:BYTES"):
        parse_payloads("raw:big")


def test_a_folder_labels_images_by_sub_folder(tmp_path: Path) -> None:
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for name in ("cat/1.png", "7/2.jpg", "plain.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode_image(image, "jpeg" if name.endswith("jpg") else "png"))
    (tmp_path / "notes.txt").write_text("not an image")
    found = {p.name: (p.label, p.label_name, p.content_type) for p in parse_payloads(str(tmp_path)).payloads}
    assert found == {
        "cat/1.png": (None, "cat", "image/png"),
        "7/2.jpg": (7, None, "image/jpeg"),
        "plain.PNG": (None, None, "image/png"),
    }


def test_one_file_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"abc")
    (payload,) = parse_payloads(str(tmp_path / "clip.mp4")).payloads
    assert (payload.body, payload.content_type) == (b"abc", "video/mp4")
    with pytest.raises(PayloadError, match="no payload: write digits"):
        parse_payloads("pictures")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PayloadError, match="holds no payload"):
        parse_payloads(str(tmp_path / "empty"))


def labelled() -> PayloadSet:
    return PayloadSet("ten", tuple(Payload(b"", "", label % 5, name=str(label)) for label in range(10)))


def test_every_payload_is_used_equally_often() -> None:
    chosen = labelled().choose(np.random.default_rng(0), 25)
    assert len(chosen) == 25
    assert sorted(chosen[:10]) == sorted(chosen[10:20]) == list(range(10))
    assert chosen[:10] != chosen[10:20]


def test_a_trace_may_say_which_payload_or_label() -> None:
    rng = np.random.default_rng(0)
    assert labelled().choose(rng, 3, names=["4", "9", "4"]) == [4, 9, 4]
    named = labelled().choose(rng, 40, names=["4", ""] * 20, labels=[3] * 40)
    assert set(named[::2]) == {4}, "a name says more than a label"
    assert {labelled().payloads[index].label for index in named[1::2]} == {3}
    chosen = labelled().choose(rng, 300, labels=[2, -1, 4] * 100)
    assert {i % 5 for i in chosen[0::3]} == {2}
    assert {i % 5 for i in chosen[2::3]} == {4}
    assert set(chosen[0::3]) == {2, 7}  # either of the payloads that have the label
    with pytest.raises(PayloadError, match="label 8: there is none"):
        labelled().choose(rng, 1, labels=[8])
    with pytest.raises(PayloadError, match="named 'x': there is none"):
        labelled().choose(rng, 1, names=["x"])
