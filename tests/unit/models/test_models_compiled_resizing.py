"""The compiled passes against Pillow, bit for bit, at their bounds, from many threads; and how it goes without."""

import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import models.compiled_resizing
import models.resizing
from models.catalog import Preprocess
from models.compiled_resizing import LONGEST_SIDE, axis, passes, run_passes
from models.resizing import resized

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
needs_passes = pytest.mark.skipif(passes() is None, reason="needs resize_passes.c compiled: install a C compiler")


@pytest.fixture
def fresh_passes() -> Iterator[Callable[[], object]]:
    """Looks for the compiled part anew, and forgets what was found."""
    passes.cache_clear()
    yield passes
    passes.cache_clear()


def picture(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint8]:
    """Noise; in a third of all pictures nothing but black and white, where the filters overshoot most."""
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(noise > 127, 255, 0).astype(np.uint8) if rng.random() < 1 / 3 else noise


@needs_passes
@pytest.mark.parametrize("longest", [3, 20, 90, 400])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["gray", "rgb"])
def test_any_part_of_any_picture_is_pillows(interpolation: str, channels: tuple[int, ...], longest: int) -> None:
    """Stretched and shrunk to any size; Pillow's whole, of which any part is wanted."""
    rng = np.random.default_rng(longest)
    compared = 0
    while compared < 60:
        height, width, scaled_height, scaled_width = (int(side) for side in rng.integers(1, longest + 1, 4))
        if height - scaled_height > max(0, 2 * (width - scaled_width)):
            continue  # Pillow begins with the columns
        left, top = int(rng.integers(scaled_width)), int(rng.integers(scaled_height))
        across, down = (int(rng.integers(1, whole + 1)) for whole in (scaled_width - left, scaled_height - top))
        pixels = picture(rng, height, width, *channels)
        whole = np.asarray(Image.fromarray(pixels).resize((scaled_width, scaled_height), FILTERS[interpolation]))
        got = run_passes(
            pixels,
            axis(width, scaled_width, interpolation, left, across),
            axis(height, scaled_height, interpolation, top, down),
        )
        where = (height, width, scaled_height, scaled_width, left, top, across, down)
        assert np.array_equal(got, whole[top : top + down, left : left + across]), where
        compared += 1


@needs_passes
def test_both_ways_give_the_same_pixels() -> None:
    rng = np.random.default_rng(5)
    for interpolation in ("bilinear", "bicubic"):
        for how in (Preprocess(resize=40, crop="centre"), Preprocess()):
            asked = msgspec.structs.replace(how, interpolation=interpolation)
            for _ in range(25):
                height, width = (int(side) for side in rng.integers(30, 120, 2))
                pixels = picture(rng, height, width, 3)
                by_pillow = resized(pixels, asked, 40, 36, compiled=False)
                assert np.array_equal(resized(pixels, asked, 40, 36), by_pillow), (height, width)


def test_pillow_itself_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.resizing, "run_passes", lambda *asked: pytest.fail("the compiled part was taken"))
    resized(np.zeros((40, 50, 3), dtype=np.uint8), Preprocess(), 20, 20, compiled=False)


BETWEEN_GUARDS = """
import ctypes, itertools, mmap
import numpy as np
from models.compiled_resizing import axis, passes

# Four pages, of which the outer two may not be touched: whoever does is killed.
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
def guarded():
    area = mmap.mmap(-1, 4 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for outer in (begin, begin + 3 * page):
        assert libc.mprotect(outer, page, 0) == 0
    return area, begin + page, begin + 3 * page
_, source_begin, source_end = source = guarded()
_, target_begin, target_end = target = guarded()
for bytes, (height, width), (down, across) in itertools.product(
    (1, 3), ((1, 1), (9, 7), (40, 60), (8, 341), (45, 2)), ((1, 1), (11, 5), (32, 64), (50, 54), (7, 300))
):
    columns, rows = axis(width, across, "bicubic", 0, across), axis(height, down, "bicubic", 0, down)
    sides = [value for side in (columns, rows)
             for value in (*side.weights.shape, side.first.ctypes.data, side.weights.ctypes.data)]
    for read in (source_begin, source_end - height * width * bytes):
        for write in (target_begin, target_end - down * across * bytes):
            assert passes()(read, width * bytes, bytes, *sides, write) == 0
print("unharmed")
"""


@needs_passes
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mprotect")
def test_nothing_outside_the_picture_is_read_and_nothing_outside_the_cut_written() -> None:
    root = Path(models.compiled_resizing.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", BETWEEN_GUARDS], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "unharmed\n"), done.stderr


@needs_passes
def test_a_part_of_a_larger_array_is_copied_first() -> None:
    pixels = picture(np.random.default_rng(6), 50, 60, 4)
    part = pixels[3:, ::2, :3]
    columns, rows = axis(30, 20, "bicubic", 0, 20), axis(47, 40, "bicubic", 0, 40)
    assert not part.flags.c_contiguous
    assert np.array_equal(run_passes(part, columns, rows), run_passes(part.copy(), columns, rows))


def test_windows_lie_within_the_picture_and_their_sums_within_32_bits() -> None:
    """What the compiled part relies on: it checks nothing itself."""
    rng = np.random.default_rng(7)
    for _ in range(400):
        source, scaled = (int(10 ** rng.uniform(0, exponent)) for exponent in (4.8, 6.0))
        count = int(rng.integers(1, min(scaled, 50) + 1))
        first = int(rng.integers(scaled - count + 1))
        found = axis(source, scaled, str(rng.choice(["bilinear", "bicubic"])), first, count)
        assert found.first.shape == (count,)
        assert found.weights.shape[0] == count
        assert found.first[0] >= 0
        assert (np.diff(found.first) >= 0).all()
        assert found.first[-1] + found.weights.shape[1] <= source
        total = found.weights.astype(np.int64)
        assert np.abs(total.sum(axis=1) - (1 << 22)).max() <= found.weights.shape[1] / 2
        assert 255 * np.abs(total).sum(axis=1).max() + (1 << 21) < 1 << 31
        assert not found.weights.flags.writeable


@pytest.mark.parametrize(
    ("source", "scaled", "first", "count"),
    [(10, 10, -1, 5), (10, 10, 0, 11), (10, 10, 8, 3), (10, 10, 3, 0), (0, 10, 0, 5), (LONGEST_SIDE + 1, 9, 0, 5)],
)
def test_a_part_outside_the_whole_is_refused(source: int, scaled: int, first: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"of {source} scaled to {scaled}"):
        axis(source, scaled, "bilinear", first, count)


@needs_passes
def test_axes_of_another_picture_are_refused() -> None:
    columns, rows = axis(12, 6, "bilinear", 0, 6), axis(10, 5, "bilinear", 0, 5)
    for shape in ((10, 11, 3), (9, 12, 3), (10, 12, 4), (10, 12, 1), (12, 10), (10,)):
        with pytest.raises(ValueError, match="for axes of 10 x 12"):
            run_passes(np.zeros(shape, dtype=np.uint8), columns, rows)
    with pytest.raises(ValueError, match="float32"):
        run_passes(np.zeros((10, 12, 3), dtype=np.float32), columns, rows)


@needs_passes
def test_many_threads_at_once() -> None:
    rng = np.random.default_rng(8)
    how = Preprocess(resize=64, crop="centre", interpolation="bicubic")
    pictures = [picture(rng, 70 + number, 90, 3) for number in range(24)]
    expected = [resized(one, how, 60, 60, compiled=False) for one in pictures]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(lambda one: resized(one, how, 60, 60), pictures), expected, strict=True):
                assert np.array_equal(got, right)


@needs_passes
def test_weights_of_long_sides_are_not_kept() -> None:
    """Hostile sizes, one after the other, must not fill the memory."""
    axis(9000, 300, "bicubic", 30, 224)
    tracemalloc.start()
    for source in range(65_000, 65_030):
        axis(source, 300, "bicubic", 30, 224)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200_000


@needs_passes
def test_a_picture_that_is_longer_than_any_jpeg_goes_to_pillow() -> None:
    pixels = picture(np.random.default_rng(9), 2, LONGEST_SIDE + 9, 3)
    how = Preprocess()
    assert np.array_equal(resized(pixels, how, 8, 8), resized(pixels, how, 8, 8, compiled=False))


def test_without_the_compiled_part_pillow_gives_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_passes: Callable[[], object]
) -> None:
    monkeypatch.setattr(models.compiled_resizing, "_FOLDER", tmp_path)
    how = Preprocess(resize=64, crop="centre", interpolation="bicubic")
    pixels = picture(np.random.default_rng(10), 75, 100, 3)
    whole = Image.fromarray(pixels).resize((85, 64), Image.Resampling.BICUBIC)
    for content in (None, b"", b"not a library"):  # not built, an empty file, one of another machine
        if content is not None:
            (tmp_path / f"resize_passes{EXTENSION_SUFFIXES[0]}").write_bytes(content)
        passes.cache_clear()
        assert fresh_passes() is None
        assert np.array_equal(resized(pixels, how, 56, 56), np.asarray(whole.crop((14, 4, 70, 60))))
    with pytest.raises(RuntimeError, match="install a C compiler"):
        run_passes(pixels, axis(100, 85, "bicubic", 0, 85), axis(75, 64, "bicubic", 0, 64))


def test_a_build_that_older_sources_left_behind_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_passes: Callable[[], object]
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "old.c").write_text("int tidegate_resize_0(void) { return 0; }\n")
    library = tmp_path / f"resize_passes{EXTENSION_SUFFIXES[0]}"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "old.c"], check=True, timeout=60)
    monkeypatch.setattr(models.compiled_resizing, "_FOLDER", tmp_path)
    assert fresh_passes() is None


@pytest.mark.parametrize("compiler", ["works", "fails"])
def test_an_installation_builds_it_and_does_without(tmp_path: Path, compiler: str) -> None:
    pytest.importorskip("setuptools", reason="needs setuptools in this environment")
    if compiler == "works" and not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("needs a C compiler")
    root = Path(models.compiled_resizing.__file__).parents[1]
    (tmp_path / "models").mkdir()
    for name in ("setup.py", "models/resize_passes.c"):
        shutil.copy(root / name, tmp_path / name)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"} | ({"CC": "/bin/false"} if compiler == "fails" else {})
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "models").glob("resize_passes*.so"))
    assert len(built) == (1 if compiler == "works" else 0), done.stderr
