"""Bodies to frames: every accepted kind, every limit, every way to be broken."""

import io
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.clip_limits import Frame, Limits
from models.clips import DEFAULT_FPS, Clip, encode_jpeg, open_clip, split_jpegs, write_mjpeg
from models.preprocess import InvalidInput

av = pytest.importorskip("av", reason='pip install -e ".[edge]"')
from models.mp4 import write_mp4  # noqa: E402

LIMITS = Limits(max_frames=40, max_pixels=100_000, max_seconds=10.0)


def moving(count: int = 6, height: int = 48, width: int = 64) -> list[Frame]:
    """A bright square that moves over a smooth ground, so that coding keeps it recognisable."""
    ground = np.linspace(40, 90, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    frames = []
    for number in range(count):
        frame = ground.copy()
        frame[10:26, 4 + 3 * number : 20 + 3 * number] = (220, 160, 60)
        frames.append(frame)
    return frames


def refused(payload: bytes | list[bytes], content_type: str, limits: Limits = LIMITS) -> InvalidInput:
    """The refusal that comes while opening or while decoding."""
    with pytest.raises(InvalidInput) as caught:
        list(open_clip(payload, content_type, limits).frames())
    return caught.value


def png(frame: Frame) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def multipart(parts: list[tuple[str, bytes]], boundary: str = "xYz") -> tuple[bytes, str]:
    body = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="f%d"; filename="f"\r\nContent-Type: %s\r\n\r\n%s\r\n'
        % (boundary.encode(), number, kind.encode(), data)
        for number, (kind, data) in enumerate(parts)
    )
    return body + f"--{boundary}--\r\n".encode(), f'multipart/form-data; boundary="{boundary}"'


def test_an_mp4_gives_its_frames_its_rate_and_its_count() -> None:
    frames = moving()
    clip = open_clip(write_mp4(frames, 15), "video/mp4", LIMITS)
    decoded = list(clip.frames())
    assert (clip.fps, clip.frame_count, len(decoded)) == (15.0, 6, 6)
    for shown, found in zip(frames, decoded, strict=True):
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - shown).mean() < 4


def test_jpegs_one_after_another_are_taken_apart_where_they_were_joined() -> None:
    pieces = [encode_jpeg(frame, 90) for frame in moving()]
    assert split_jpegs(b"".join(pieces), LIMITS) == tuple(pieces)
    clip = open_clip(b"".join(pieces), "video/x-motion-jpeg; fps=12.5", LIMITS)
    assert clip.fps == 12.5
    for found, piece in zip(clip.frames(), pieces, strict=True):
        assert np.array_equal(found, simplejpeg.decode_jpeg(piece))
    assert open_clip(b"".join(pieces), "video/mjpeg", LIMITS).fps == DEFAULT_FPS


def test_a_thumbnail_inside_a_jpeg_header_ends_no_frame() -> None:
    whole, small = encode_jpeg(moving()[0], 90), encode_jpeg(moving()[0][:16, :16], 50)
    with_thumbnail = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(small) + 2) + small + whole[2:]
    assert split_jpegs(with_thumbnail + whole, LIMITS) == (with_thumbnail, whole)


def test_a_camera_stream_has_headers_between_its_jpegs() -> None:
    pieces = [encode_jpeg(frame, 90) for frame in moving()]
    body = b"".join(b"--cam\r\nContent-Type: image/jpeg\r\n\r\n" + piece + b"\r\n" for piece in pieces)
    clip = open_clip(body, "multipart/x-mixed-replace; boundary=cam", LIMITS)
    assert clip.parts == tuple(pieces)


@pytest.mark.parametrize("kind", ["image/jpeg", "image/png"])
def test_forms_and_lists_carry_frames_in_order(kind: str) -> None:
    frames = moving(3)
    encoded = [png(frame) if kind == "image/png" else encode_jpeg(frame, 95) for frame in frames]
    body, content_type = multipart([(kind, piece) for piece in encoded])
    assert open_clip(body, content_type, LIMITS).parts == tuple(encoded)
    clip = open_clip(encoded, "", LIMITS)
    for found, frame in zip(clip.frames(), frames, strict=True):
        assert np.abs(found.astype(int) - frame).mean() < (1e-9 if kind == "image/png" else 3)


def test_a_form_may_carry_one_clip() -> None:
    clip = write_mp4(moving(), 15)
    body, content_type = multipart([("video/mp4", clip)])
    assert open_clip(body, content_type, LIMITS).parts == (clip,)
    body, content_type = multipart([("video/x-motion-jpeg; fps=5", write_mjpeg(moving()))])
    assert open_clip(body, content_type, LIMITS).fps == 5.0


def test_an_image_is_one_frame() -> None:
    clip = open_clip(encode_jpeg(moving()[0], 95), "image/jpeg", LIMITS)
    assert (clip.kind, clip.fps, clip.frame_count) == ("image", 0.0, 1)
    assert next(clip.frames()).shape == (48, 64, 3)
    assert next(open_clip(encode_jpeg(moving()[0][:1, :1], 95), "", LIMITS).frames()).shape == (1, 1, 3)


def test_every_cut_of_an_mp4_is_refused_with_a_reason() -> None:
    clip = write_mp4(moving(), 15)
    for end in range(0, len(clip) - 1, 37):
        error = refused(clip[:end], "video/mp4")
        assert error.status == 400
        assert error.reason


def test_every_cut_of_a_motion_jpeg_is_refused_or_has_whole_frames_only() -> None:
    pieces = [encode_jpeg(frame, 60) for frame in moving(3, 16, 16)]
    ends = {0, *np.cumsum([len(piece) for piece in pieces]).tolist()}
    body = b"".join(pieces)
    for end in range(len(body)):
        tail = end - max(edge for edge in ends if edge <= end)
        if end in ends - {0}:
            assert len(open_clip(body[:end], "video/x-mjpeg", LIMITS).parts) == sorted(ends).index(end)
        elif tail > 2:  # two bytes of a further frame are not told from padding
            assert refused(body[:end], "video/x-mjpeg").status == 400


def test_noise_in_a_clip_is_refused_and_never_anything_else() -> None:
    rng = np.random.default_rng(5)
    clip = np.frombuffer(write_mp4(moving(12, 96, 128), 15), dtype=np.uint8)
    statuses: list[int] = []
    for _ in range(60):
        damaged = clip.copy()
        place = int(rng.integers(0, len(clip) - 64))
        damaged[place : place + 64] = rng.integers(0, 256, 64)
        try:
            list(open_clip(damaged.tobytes(), "video/mp4", LIMITS).frames())
        except InvalidInput as error:
            statuses.append(error.status)
    assert len(statuses) > 30
    assert set(statuses) <= {400, 413}


def test_damage_that_a_decoder_would_paint_over_is_refused() -> None:
    """A few bytes within the coded pictures, headers whole: guessed frames must not pass for seen ones."""
    rng = np.random.default_rng(8)
    clip = np.frombuffer(write_mp4(moving(12, 96, 128), 15), dtype=np.uint8)
    start, statuses = clip.tobytes().index(b"mdat") + 800, []
    end = clip.tobytes().index(b"moov") - 12
    for _ in range(20):
        damaged = clip.copy()
        damaged[int(rng.integers(start, end - 4)) :][:4] = 255
        try:
            list(open_clip(damaged.tobytes(), "video/mp4", LIMITS).frames())
        except InvalidInput as error:
            statuses.append(error.status)
    assert statuses == [400] * 20


KINDS = ["", "image/png", "video/mp4", "video/x-mjpeg", "multipart/x-mixed-replace", "multipart/form-data; boundary=b"]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(
        st.sampled_from([b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda\x00\x08", b"\xff\xe0\x00\x10", b"\x89PNG\r\n\x1a\n"])
        | st.sampled_from([b"--b\r\n\r\n", b"\r\n--b--", b"\x00\x00\x00\x08moov", b"\x00\x00\x00\x10ftypisom", b"mdat"])
        | st.binary(max_size=12),
        max_size=12,
    ),
)
def test_any_bytes_are_frames_or_a_refusal(content_type: str, pieces: list[bytes]) -> None:
    try:
        frames = list(open_clip(b"".join(pieces), content_type, LIMITS).frames())
    except InvalidInput as error:
        refusal = error
    else:
        assert frames
        return
    assert refusal.status in (400, 413)
    assert refusal.reason


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "video/mp4", 400),
        (b"", "", 400),
        (b"hello", "video/mp4", 400),
        (b"hello" * 3000, "video/x-mjpeg", 400),
        (b"\xff\xd8\xff", "video/x-mjpeg", 400),
        (b"hello", "text/plain", 415),
        (b"hello", "video/webm", 415),
        (b"hello", "multipart/form-data", 400),
        (b"hello", "multipart/form-data; boundary=a", 400),
        (b"--a\r\n\r\nhello\r\n--a--", "multipart/form-data; boundary=a", 400),
        (b"--a\r\nContent-Disposition: x; filename=y\r\n\r\nhello\r\n--a--", "multipart/form-data; boundary=a", 400),
        (b"\xff\xd8\xff\xd9" * 3, "video/mjpeg; fps=-1", 400),
        (b"\xff\xd8\xff\xd9" * 3, "video/mjpeg; fps=many", 400),
        ([], "", 400),
    ],
)
def test_bodies_that_are_no_clip(body: bytes | list[bytes], content_type: str, status: int) -> None:
    error = refused(body, content_type)
    assert error.status == status
    assert error.reason


def test_an_mp4_without_frames_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    assert refused(file.getvalue(), "video/mp4").status == 400


def test_limits_on_frames_hold_for_every_kind() -> None:
    frames = moving(6)
    few = Limits(max_frames=5, max_pixels=100_000, max_seconds=10.0)
    pieces = [encode_jpeg(frame, 90) for frame in frames]
    body, content_type = multipart([("image/jpeg", piece) for piece in pieces])
    for payload, kind in (
        (write_mp4(frames, 15), "video/mp4"),
        (b"".join(pieces), "video/x-mjpeg"),
        (pieces, ""),
        (body, content_type),
    ):
        error = refused(payload, kind, few)
        assert error.status == 413
        assert "raise the limit" in error.reason


def test_limits_on_seconds_and_pixels_hold() -> None:
    frames = moving(6)
    short = Limits(max_seconds=1.0)
    for payload, kind in ((write_mp4(frames, 2), "video/mp4"), (write_mjpeg(frames), "video/x-mjpeg; fps=2")):
        assert refused(payload, kind, short).status == 413
    small = Limits(max_pixels=48 * 64 - 1)
    for payload, kind in ((write_mp4(frames, 15), "video/mp4"), (write_mjpeg(frames), "video/x-mjpeg")):
        assert refused(payload, kind, small).status == 413


def test_a_clip_that_lies_about_its_length_stops_while_decoding() -> None:
    """Its headers promise one second; the frames go on for four hours (as their times say)."""
    frames = moving(6)
    clip = bytearray(write_mp4(frames, 1))
    # stts: one entry (count, delta). Frames 3,600 s apart instead of 1 s; header durations stay as they were.
    place = clip.index(b"stts") + 4 + 4 + 4
    count, delta = struct.unpack_from(">II", clip, place)
    assert count == 6
    struct.pack_into(">II", clip, place, count, delta * 3600)
    edits = clip.index(b"edts")  # an edit list would leave out what comes after the promised end
    clip[edits : edits + 4] = b"free"
    error = refused(bytes(clip), "video/mp4", Limits())
    assert error.status == 413
    assert "lasts" in error.reason


def test_frames_stop_at_the_limit_and_not_after_it() -> None:
    """Headers that promise fewer samples than come: the count while decoding decides."""
    clip = open_clip(write_mp4(moving(6), 15), "video/mp4", Limits())
    frames = Clip(clip.kind, clip.parts, clip.fps, 0, Limits(max_frames=4)).frames()
    assert len([next(frames) for _ in range(4)]) == 4
    with pytest.raises(InvalidInput) as caught:
        next(frames)
    assert caught.value.status == 413


def box(kind: bytes, *parts: bytes) -> bytes:
    """One box of an MP4."""
    return struct.pack(">I", 8 + sum(map(len, parts))) + kind + b"".join(parts)


def test_an_index_that_promises_millions_of_samples_is_refused_before_the_reader_makes_them() -> None:
    """24 kB took 4 GB and 18 s in the reader, where no limit and no cancellation reaches."""
    whole = write_mp4(moving(), 10.0)
    claims = bytearray(whole)
    for kind, offset, value in (
        (b"stsz", 8, 1),
        (b"stsz", 12, 60_000_000),
        (b"stsc", 16, 60_000_000),
        (b"stts", 12, 60_000_000),
    ):
        place = whole.index(kind) + offset
        claims[place : place + 4] = struct.pack(">I", value)
    run = box(b"trun", bytes(4), struct.pack(">I", 60_000_000))
    fragment = box(b"moof", box(b"traf", box(b"tfhd", bytes(8)), run))
    for body in (bytes(claims), whole + fragment):
        refusal = refused(body, "video/mp4")
        assert refusal.status == 413
        assert "samples" in refusal.reason
    hidden = refused(whole.replace(b"udta", b"cmov"), "video/mp4")
    assert (hidden.status, "cmov" in hidden.reason) == (415, True)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("video/x-motion-jpeg", b"\xff\xd8" + b"\xff\xe0\x00\x02" * 250_000),
        ("video/x-motion-jpeg", b"\xff\xd8" + b"\xff\xda\x00\x02" * 250_000),
        ("video/mp4", b"\x00\x00\x00\x08ftyp" + b"\x00\x00\x00\x08free" * 250_000),
    ],
)
def test_a_body_of_nothing_but_markers_is_not_read_to_its_end(kind: str, body: bytes) -> None:
    refusal = refused(body, kind)
    assert "nothing but markers" in refusal.reason or "boxes" in refusal.reason


def test_any_padding_may_stand_before_a_marker() -> None:
    one = encode_jpeg(moving(1)[0], 80)
    padded = one[:2] + b"\xff" * 1_000_000 + one[2:]
    assert split_jpegs(padded + one, LIMITS) == (padded, one)


def test_many_threads_decode_the_same_clip_alike() -> None:
    payload = write_mp4(moving(), 15)
    expected = [frame.sum() for frame in open_clip(payload, "video/mp4", LIMITS).frames()]
    found: list[list[int]] = []

    def decode() -> None:
        found.append([frame.sum() for frame in open_clip(payload, "video/mp4", LIMITS).frames()])

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_pyav_is_not_imported_before_an_mp4_comes() -> None:
    program = (
        "import sys, models.adapt; from models.clips import open_clip; "
        "from models.clip_limits import Limits; open_clip(b'\\xff\\xd8\\xff\\xd9', 'video/x-mjpeg', Limits()); "
        "assert not {'av', 'cv2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_follows_the_last_jpeg_is_padding_or_damage() -> None:
    body = write_mjpeg(moving(2))
    assert len(split_jpegs(body + bytes(4096), LIMITS)) == 2
    assert refused(body + bytes(4097), "video/x-motion-jpeg").reason.startswith("after frame 2")
