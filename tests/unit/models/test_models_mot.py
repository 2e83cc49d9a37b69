"""MOT17 folders: what was written is read back, the real layout is read, and broken ones are explained."""

import configparser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.datasets.coco import DatasetError
from models.datasets.mot import read_mot, read_sequence, write_sequence
from models.datasets.scenes import LABELS, RenderedClip, SceneSettings, plan_scene, render


@pytest.fixture(scope="module")
def clip() -> RenderedClip:
    return render(plan_scene(1, SceneSettings(width=96, height=64, frames=4, fps=12.5)))


def write(folder: Path, clip: RenderedClip) -> Path:
    return write_sequence(folder, list(clip.frames), clip.truth, clip.fps, LABELS)


def test_what_was_written_is_read_back(tmp_path: Path, clip: RenderedClip) -> None:
    sequence = read_sequence(write(tmp_path / "SCENE-1", clip))
    assert (sequence.name, sequence.fps, sequence.width, sequence.height) == ("SCENE-1", 12.5, 96, 64)
    assert len(sequence.frames) == 4
    for number, truth in enumerate(clip.truth, start=1):
        rows = sequence.truth[sequence.truth[:, 0] == number]
        assert rows[:, 1].tolist() == truth.tracks.tolist()
        corners = np.concatenate([rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6]], axis=1)
        assert np.abs(corners - truth.boxes).max() <= 0.011
        assert rows[:, 6].tolist() == (truth.visibility >= 0.1).tolist()
        assert np.abs(rows[:, 8] - truth.visibility).max() <= 0.0006
        assert [sequence.labels[track] for track in truth.tracks] == [LABELS[label] for label in truth.classes]
        with Image.open(sequence.frames[number - 1]) as frame:
            assert np.abs(np.asarray(frame).astype(int) - clip.frames[number - 1]).mean() < 4


def test_files_are_as_other_tools_read_them(tmp_path: Path, clip: RenderedClip) -> None:
    """The evaluation kits' own way: configparser for seqinfo.ini, numpy for gt.txt, class 1 counts."""
    folder = write(tmp_path / "SCENE-1", clip)
    info = configparser.ConfigParser()
    info.read(folder / "seqinfo.ini")
    assert dict(info["Sequence"])["seqlength"] == "4"
    rows = np.loadtxt(folder / "gt" / "gt.txt", delimiter=",")
    assert rows.shape[1] == 9
    assert set(rows[:, 7]) == {1}
    assert (folder / "img1" / "000001.jpg").is_file()


def test_the_real_layout_is_read_once_per_sequence(tmp_path: Path, clip: RenderedClip) -> None:
    for detector in ("DPM", "FRCNN", "SDP"):
        for name in ("MOT17-02", "MOT17-04"):
            folder = write(tmp_path / "train" / f"{name}-{detector}", clip)
            (folder / "gt" / "labels.txt").unlink()
            (folder / "det").mkdir()
            (folder / "det" / "det.txt").write_text("1,-1,1359.1,413.27,120.26,362.77,2.3092,-1,-1,-1\n")
    assert [one.name for one in read_mot(tmp_path)] == ["MOT17-02-FRCNN", "MOT17-04-FRCNN"]
    [first, _] = read_mot(tmp_path, detector="SDP")
    assert first.name == "MOT17-02-SDP"
    assert first.detections.tolist() == [[1, -1, 1359.1, 413.27, 120.26, 362.77, 2.3092]]
    assert first.labels == {}
    assert len(read_mot(tmp_path / "train")) == 2
    assert len(read_mot(tmp_path / "train" / "MOT17-02-DPM")) == 1


def test_a_sequence_without_truth_has_no_rows(tmp_path: Path, clip: RenderedClip) -> None:
    folder = write(tmp_path / "one", clip)
    (folder / "gt" / "gt.txt").unlink()
    assert read_sequence(folder).truth.shape == (0, 9)


def test_a_written_sequence_is_not_written_over(tmp_path: Path, clip: RenderedClip) -> None:
    write(tmp_path / "one", clip)
    with pytest.raises(DatasetError, match="holds a sequence already"):
        write(tmp_path / "one", clip)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("seqinfo.ini", "name=x", "needs \\[Sequence\\]"),
        ("seqinfo.ini", "[Sequence]\nname=x\nframeRate=30\nimWidth=9\nimHeight=9\n", "seqLength"),
        ("seqinfo.ini", "[Sequence]\nname=x\nframeRate=?\nseqLength=1\nimWidth=9\nimHeight=9\n", "could not convert"),
        ("seqinfo.ini", "[Sequence]\nname=x\nframeRate=30\nseqLength=5\nimWidth=9\nimHeight=9\n", "000005.jpg"),
        ("gt/gt.txt", "1,1,2,3,4,5,1,1\n", "line 1 is '1,1,2,3,4,5,1,1'; needs 9 numbers"),
        ("gt/gt.txt", "\n1,1,2,x,4,5,1,1,1\n", "line 2"),
        ("gt/gt.txt", "1,1,2,nan,4,5,1,1,1\n", "needs 9 numbers"),
        ("gt/gt.txt", "5,1,2,3,4,5,1,1,1\n", "frame 5; seqinfo.ini promises 1 to 4"),
        ("gt/labels.txt", "ball\n", "needs a track's number"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, clip: RenderedClip, file: str, text: str, told: str) -> None:
    folder = write(tmp_path / "one", clip)
    (folder / file).write_text(text)
    with pytest.raises(DatasetError, match=told) as raised:
        read_sequence(folder)
    assert str(folder / file) in str(raised.value)


def test_folders_without_sequences_are_named(tmp_path: Path, clip: RenderedClip) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        read_mot(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no folder with a seqinfo\.ini"):
        read_mot(tmp_path)
    with pytest.raises(DatasetError, match="4 frames and truth of 3"):
        write_sequence(tmp_path / "x", list(clip.frames), clip.truth[:3], 15, LABELS)
