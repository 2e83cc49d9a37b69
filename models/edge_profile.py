"""Measure what every configuration and variant of an edge service costs and how accurate it is: a placement table.

Each picture or clip goes through every configuration as a local node would send it (`adapt.py`) and through every
variant as a node would run it (`edge_runtime.py`). Written down are accuracy (mAP, MOTA), the bytes relative to those
of the highest configuration, and the time of a forward pass: all of it measured, nothing modelled. The table is read
by `policies/placement/tables.py` and described there.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from models.adapt import Adapted, Configuration, adapt, read_adapted
from models.associations import Seen
from models.clip_limits import Frame
from models.detection import Detections
from models.edge_items import Clip, Still
from models.edge_runtime import DetectorRuntime
from models.edge_scores import TrackingScores, detection_scores, interpolated, tracking_scores
from models.tracking import Tracker, follow, in_the_original

FloatArray = npt.NDArray[np.float64]
OnStep = Callable[[int], None]
"""Told how many items are done."""

MEGABYTE = 1e6
LEAST_ACCURACY = 1e-4  # what a table can hold: an accuracy there is above 0


class Setting(msgspec.Struct, frozen=True):
    """One configuration with its name and those of its settings that vary within the service."""

    name: str
    configuration: Configuration
    varied: tuple[str, ...]


class VariantFigures(msgspec.Struct, frozen=True):
    """What was measured of one variant; a figure per configuration in each tuple."""

    name: str
    memory_mb: float
    tflop: float  # of one forward pass
    accuracy: tuple[float, ...]
    service_ms: tuple[float, ...]  # median time of a forward pass (a tracker: with its share of the association)
    further: dict[str, tuple[float, ...]]  # other scores by name


class ServiceFigures(msgspec.Struct, frozen=True):
    """What was measured of a service."""

    service: str  # "detection" | "tracking"
    settings: tuple[Setting, ...]
    size_factor: tuple[float, ...]
    inferences: tuple[int, ...]  # forward passes per request, rounded mean
    variants: tuple[VariantFigures, ...]
    data_mb: tuple[float, float]  # smallest and largest request at the highest configuration
    requests: int


def detection_settings(resolutions: Sequence[float], qualities: Sequence[int]) -> tuple[Setting, ...]:
    """Every resolution with every JPEG quality, highest first."""
    return tuple(
        Setting(f"{r:g}x_q{q}", Configuration(resolution=r, jpeg_quality=q), ("resolution", "jpeg_quality"))
        for r in sorted(resolutions, reverse=True)
        for q in sorted(qualities, reverse=True)
    )


def tracking_settings(resolutions: Sequence[float], frame_rates: Sequence[float]) -> tuple[Setting, ...]:
    """Every resolution with every frame rate, highest first, at one JPEG quality."""
    return tuple(
        Setting(f"{r:g}x_fps{f:g}", Configuration(resolution=r, frame_rate=f), ("resolution", "frame_rate"))
        for r in sorted(resolutions, reverse=True)
        for f in sorted(frame_rates, reverse=True)
    )


def profile_detection(
    runtimes: Sequence[DetectorRuntime],
    items: Iterable[Still],
    settings: Sequence[Setting],
    labels: Sequence[str],
    on_step: OnStep,
) -> ServiceFigures:
    """Measure detectors on pictures whose classes are `labels`; a variant's classes are matched by their names.

    Raises `ValueError` if there are no pictures, or a variant has none of the classes.
    """
    kinds = [_classes(runtime.variant.labels, labels, runtime.variant.name) for runtime in runtimes]
    found: dict[tuple[int, int], list[Detections]] = {}
    times_s: dict[tuple[int, int], list[float]] = {}
    sizes: list[list[int]] = []
    truth = []
    for done, item in enumerate(items, 1):
        truth.append(item.truth)
        sizes.append([])
        for place, setting in enumerate(settings):
            adapted = adapt(item.media, setting.configuration)
            sizes[-1].append(len(adapted.payload))
            frames = read_adapted(adapted.payload)
            for number, runtime in enumerate(runtimes):
                started = time.perf_counter()
                answer = runtime.run(frames)
                times_s.setdefault((number, place), []).append(time.perf_counter() - started)
                boxes = answer.boxes / np.float32(adapted.scale)
                found.setdefault((number, place), []).append(
                    _known(Detections(boxes=boxes, scores=answer.scores, classes=kinds[number][answer.classes]))
                )
        on_step(done)
    if not sizes:
        raise ValueError("there are no pictures to measure with")
    variants = []
    for number, runtime in enumerate(runtimes):
        scores = [detection_scores(truth, found[number, place], labels) for place in range(len(settings))]
        variants.append(
            VariantFigures(
                runtime.variant.name,
                runtime.variant.memory_mb,
                runtime.variant.tflop,
                tuple(score.m_ap for score in scores),
                tuple(1000 * statistics.median(times_s[number, place]) for place in range(len(settings))),
                {"ap50": tuple(score.ap50 for score in scores)},
            )
        )
    return _figures("detection", settings, sizes, [1] * len(settings), variants)


def profile_tracking(
    trackers: Sequence[Tracker], items: Iterable[Clip], settings: Sequence[Setting], on_step: OnStep
) -> ServiceFigures:
    """Measure trackers on clips. Raises `ValueError` if there are none.

    Frame rates of one resolution see the same frames, each kept one coded alike; so a frame is looked at once per
    variant and resolution, and only the association runs for every frame rate.
    """
    for tracker in trackers:
        tracker.association()  # the first imports a package: outside of what is timed
    found: dict[tuple[int, int], list[FloatArray]] = {}
    times_s: dict[tuple[int, int], list[float]] = {}
    sizes: list[list[int]] = []
    passes: list[list[int]] = []
    truth = []
    for done, item in enumerate(items, 1):
        truth.append(item.truth)
        adapted = [adapt(item.media, setting.configuration) for setting in settings]
        sizes.append([len(one.payload) for one in adapted])
        passes.append([len(one.frame_numbers) for one in adapted])
        for number, tracker in enumerate(trackers):
            looked: dict[tuple[float, int], tuple[list[Seen], list[float]]] = {}
            for place, setting in enumerate(settings):
                how = setting.configuration
                key = (how.resolution, how.jpeg_quality)
                if key not in looked:
                    whole = adapt(item.media, Configuration(resolution=how.resolution, jpeg_quality=how.jpeg_quality))
                    looked[key] = _look(tracker, read_adapted(whole.payload))
                rows, spent_s = _follow(tracker, adapted[place], *looked[key])
                found.setdefault((number, place), []).append(rows)
                times_s.setdefault((number, place), []).append(spent_s / len(adapted[place].frame_numbers))
        on_step(done)
    if not sizes:
        raise ValueError("there are no clips to measure with")
    variants = []
    for number, tracker in enumerate(trackers):
        scores: list[TrackingScores] = [tracking_scores(truth, found[number, place]) for place in range(len(settings))]
        variants.append(
            VariantFigures(
                tracker.variant.name,
                tracker.variant.memory_mb,
                tracker.variant.tflop,
                tuple(score.mota for score in scores),
                tuple(1000 * statistics.median(times_s[number, place]) for place in range(len(settings))),
                {"hota": tuple(s.hota for s in scores), "idf1": tuple(s.idf1 for s in scores)},
            )
        )
    inferences = [max(1, round(float(count))) for count in np.mean(passes, axis=0)]
    return _figures("tracking", settings, sizes, inferences, variants)


def table_of(figures: ServiceFigures, *, name: str, notes: Sequence[str], deadlines_s: Sequence[float]) -> str:
    """The placement table as TOML. `notes`: how it was made, one comment line each.

    Accuracies at or below 0 (a bad tracker's MOTA) are written as the least that a table can hold.
    """
    lines = [f"# {note}" for note in notes]
    lines += [
        "# size_factor: bytes over those at the highest configuration; inferences: forward passes per request; both",
        "# are means over the requests. service_ms: median time of a forward pass on the machine that measured.",
        f"# An accuracy of 0 or below is written as {LEAST_ACCURACY}.",
        f'name = "{name}"',
        "",
        "[requests]",
        f"data_mb = [{figures.data_mb[0]:.5f}, {figures.data_mb[1]:.5f}]",
        f"deadlines_s = {_list(deadlines_s, 'g')}",
    ]
    for setting, factor, passes in zip(figures.settings, figures.size_factor, figures.inferences, strict=True):
        lines += ["", "[[configuration]]", f'name = "{setting.name}"']
        lines += [f"{key} = {getattr(setting.configuration, key):g}" for key in setting.varied]
        lines += [f"size_factor = {factor:.5f}", 'size_factor_source = "measured"', f"inferences = {passes}"]
    for variant in figures.variants:
        sources = ", ".join(['"measured"'] * len(figures.settings))
        lines += ["", "[[variant]]", f'name = "{variant.name}"']
        lines += [f"memory_mb = {variant.memory_mb:.2f}", f"tflop = {variant.tflop:.7g}"]
        lines += [f"accuracy = {_list([max(LEAST_ACCURACY, value) for value in variant.accuracy], '.5f')}"]
        lines += [f"accuracy_source = [{sources}]", f"service_ms = {_list(variant.service_ms, '.2f')}"]
        lines += [f"{key} = {_list(values, '.5f')}" for key, values in variant.further.items()]
    return "\n".join(lines) + "\n"


def _look(tracker: Tracker, frames: Sequence[Frame]) -> tuple[list[Seen], list[float]]:
    """What the network sees in each frame, and the time that took (s)."""
    seen, spent_s = [], []
    for frame in frames:
        started = time.perf_counter()
        seen.append(tracker.look(frame))
        spent_s.append(time.perf_counter() - started)
    return seen, spent_s


def _follow(
    tracker: Tracker, adapted: Adapted, seen: Sequence[Seen], look_s: Sequence[float]
) -> tuple[FloatArray, float]:
    """Tracks of the kept frames in the original's coordinates with the gaps filled, and the whole time (s)."""
    kept = [number - 1 for number in adapted.frame_numbers]
    started = time.perf_counter()
    tracks = follow([seen[index] for index in kept], tracker.association())
    spent_s = time.perf_counter() - started + sum(look_s[index] for index in kept)
    rows = in_the_original(tracks, adapted.scale, adapted.frame_numbers).rows
    return interpolated(rows, adapted.frame_numbers, adapted.frame_count), spent_s


def _classes(own: Sequence[str], labels: Sequence[str], name: str) -> npt.NDArray[np.int64]:
    """Class number in `labels` of each of a variant's own classes; -1 where the data set lacks it."""
    place = {label: number for number, label in enumerate(labels)}
    found = np.array([place.get(label, -1) for label in own], dtype=np.int64)
    if (found < 0).all():
        raise ValueError(f"{name} knows none of the data set's classes ({', '.join(labels[:5])}, ...): choose another")
    return found


def _known(found: Detections) -> Detections:
    """Without boxes of classes that the data set does not have."""
    kept = found.classes >= 0
    return Detections(boxes=found.boxes[kept], scores=found.scores[kept], classes=found.classes[kept])


def _figures(
    service: str,
    settings: Sequence[Setting],
    sizes: Sequence[Sequence[int]],
    inferences: Sequence[int],
    variants: Sequence[VariantFigures],
) -> ServiceFigures:
    every = np.array(sizes, dtype=np.float64)
    highest = every[:, 0]
    factor = np.minimum(1.0, (every / highest[:, None]).mean(axis=0))
    return ServiceFigures(
        service,
        tuple(settings),
        tuple(factor.tolist()),
        tuple(inferences),
        tuple(variants),
        (float(highest.min()) / MEGABYTE, float(highest.max()) / MEGABYTE),
        len(every),
    )


def _list(values: Iterable[float], how: str) -> str:
    return "[" + ", ".join(format(value, how) for value in values) + "]"
