"""Traces: which requests come when, read from a file or drawn from an arrival process.

Three CSV layouts are read, told apart by their header: this project's own (`time_s`, optional `phase`,
`label`, `payload`), counts per interval (`count`, optional `time_s`), and the Azure public data set's
(`TIMESTAMP`, further columns ignored). A first line `# end_s=SECONDS` states the end; without one a trace ends
with its last request (of counts: with the last interval).
"""

import csv
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from policies.routing.workload import (
    ArrivalProcess,
    Arrivals,
    Constant,
    PeriodicProcess,
    Poisson,
    paper_process,
)

DEFAULT_DURATION_S = 60.0
DEFAULT_INTERVAL_S = 60.0
NO_LABEL = -1
_END_MARK = "end_s="


class TraceError(ValueError):
    """A trace that cannot be read or a workload that is none; says where and what would be right."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival. labels: int64[N], NO_LABEL where open; payloads: names, "" where open."""

    description: str
    arrivals: Arrivals
    labels: NDArray[np.int64] | None = None
    payloads: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.arrivals)


def parse_workload(
    spec: str,
    *,
    seed: int = 0,
    duration_s: float | None = None,
    rate_scale: float = 1.0,
    time_scale: float = 1.0,
    interval_s: float = DEFAULT_INTERVAL_S,
) -> Trace:
    """Draw or read a workload: "paper", "periodic", "poisson:RATE", "constant:RATE" or a CSV file.

    rate_scale multiplies the requests per second, time_scale every span of time (holding times, a trace's
    length), each without touching the other. To replay a file faster with every request kept, use
    time_scale = 1/k and rate_scale = k. duration_s: length after scaling (60 s for processes; a file's own).
    interval_s: width of the intervals of a file of counts that has no times. Raises TraceError.
    """
    for name, value in (("rate_scale", rate_scale), ("time_scale", time_scale), ("duration_s", duration_s)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise TraceError(f"{name} must be a positive number, not {value}")
    rng = np.random.default_rng(seed)
    kind, _, detail = spec.partition(":")
    process: ArrivalProcess
    if kind == "paper" and not detail:
        process, what = paper_process(rate_scale, time_scale), "bursty Markovian workload (Tan, Eq. 12)"
    elif kind == "periodic" and not detail:
        plain = PeriodicProcess()
        process = PeriodicProcess(
            plain.normal_rate * rate_scale,
            plain.bursty_rate * rate_scale,
            plain.normal_s * time_scale,
            plain.bursty_s * time_scale,
        )
        what = "periodic bursts (Tan, Section 5.2.3)"
    elif kind in ("poisson", "constant"):
        rate = _rate(spec, detail) * rate_scale
        process = Poisson(rate) if kind == "poisson" else Constant(rate)
        what = f"{'Poisson' if kind == 'poisson' else 'constant'} arrivals, {rate:g}/s"
    elif Path(spec).is_file():
        trace = scale_trace(read_trace(Path(spec), rng, interval_s), rng, rate_scale, time_scale)
        return trace if duration_s is None else cut_trace(trace, duration_s)
    else:
        known = "paper, periodic, poisson:RATE, constant:RATE, or a CSV file"
        if "/" in spec or Path(spec).suffix:
            found = "a folder" if Path(spec).is_dir() else "no such file"
            raise TraceError(f"{spec}: {found}; a workload is {known}")
        raise TraceError(f"{spec!r} is no workload: write {known}")
    if kind in ("paper", "periodic") and (rate_scale, time_scale) != (1.0, 1.0):
        what += f", rates x {rate_scale:g}, holding times x {time_scale:g}"
    return Trace(what, process.generate(rng, DEFAULT_DURATION_S if duration_s is None else duration_s))


def read_trace(path: Path, rng: np.random.Generator | None = None, interval_s: float = DEFAULT_INTERVAL_S) -> Trace:
    """Read one CSV file in any of the three layouts (see the top of this file). Raises TraceError.

    rng: where in its interval each request of a file of counts lies (seed 0 if none is given).
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            end_s, rows = _rows(path, file)
            header = next(rows, (0, []))[1]
            columns = {name.strip(): i for i, name in enumerate(header)}
            if "TIMESTAMP" in columns:
                times = _timestamps(path, rows, columns["TIMESTAMP"])
                return Trace(f"{path.name} (Azure layout)", _arrivals(path, times, end_s))
            if "count" in columns:
                drawn, last_s = _counts(path, rows, columns, rng or np.random.default_rng(0), interval_s)
                return Trace(f"{path.name} (counts)", Arrivals(drawn, None, last_s if end_s is None else end_s))
            if "time_s" in columns:
                return _own(path, rows, columns, end_s)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read ({error})") from error
    raise TraceError(f"{path}: the header must name time_s, count or TIMESTAMP, not {','.join(header)!r}")


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace in this project's layout, with its stated end, so that `read_trace` gives it back."""
    arrivals = trace.arrivals
    columns: list[Sequence[object]] = [[repr(time) for time in arrivals.time_s.tolist()]]
    header = ["time_s"]
    if arrivals.phase is not None:
        header.append("phase")
        columns.append([arrivals.phase_names[phase] for phase in arrivals.phase.tolist()])
    if trace.labels is not None:
        header.append("label")
        columns.append(["" if label == NO_LABEL else label for label in trace.labels.tolist()])
    if trace.payloads is not None:
        header.append("payload")
        columns.append(trace.payloads)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {_END_MARK}{arrivals.end_s!r}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))


def scale_trace(trace: Trace, rng: np.random.Generator, rate_scale: float = 1.0, time_scale: float = 1.0) -> Trace:
    """Multiply the requests per second and, apart from that, all times.

    Fewer requests: each stays with equal probability. More: each is repeated, and the copies lie anywhere in
    the gap up to the next request, so that bursts keep their shape.
    """
    arrivals = trace.arrivals
    factor = rate_scale * time_scale  # of the number of requests
    times = arrivals.time_s * time_scale
    copies = np.full(len(times), int(factor)) + (rng.random(len(times)) < factor - int(factor))
    keep = np.repeat(np.arange(len(times)), copies)
    first = np.append(True, keep[1:] != keep[:-1])[: len(keep)]
    gaps = np.diff(np.append(times, arrivals.end_s * time_scale))
    moved = times[keep] + np.where(first, 0.0, rng.random(len(keep)) * gaps[keep])
    order = np.argsort(moved, kind="stable")
    end_s = max(arrivals.end_s * time_scale, float(moved.max(initial=0.0)))
    return _select(trace, keep[order], moved[order], end_s)


def cut_trace(trace: Trace, duration_s: float) -> Trace:
    """Return the part before duration_s, which becomes the stated end."""
    keep = np.flatnonzero(trace.arrivals.time_s < duration_s)
    return _select(trace, keep, trace.arrivals.time_s[keep], duration_s)


def _select(trace: Trace, keep: NDArray[np.int64], times: NDArray[np.float64], end_s: float) -> Trace:
    phase = trace.arrivals.phase
    arrivals = Arrivals(times, None if phase is None else phase[keep], end_s, trace.arrivals.phase_names)
    payloads = None if trace.payloads is None else tuple(trace.payloads[i] for i in keep.tolist())
    labels = None if trace.labels is None else trace.labels[keep]
    return replace(trace, arrivals=arrivals, labels=labels, payloads=payloads)


Row = tuple[int, list[str]]  # line number in the file, fields


def _rows(path: Path, file: TextIO) -> tuple[float | None, Iterator[Row]]:
    """Return the stated end, if a first comment line gives one, and the other lines with their numbers."""
    first = file.readline()
    end_s = None
    if first.startswith("#"):
        text = first[1:].strip()
        if text.startswith(_END_MARK):
            end_s = _number(path, 1, "end_s", text.removeprefix(_END_MARK))
        skipped = 1
    else:
        file.seek(0)
        skipped = 0

    def rows() -> Iterator[Row]:
        reader = csv.reader(file)
        for fields in reader:
            if fields and not fields[0].startswith("#"):
                yield reader.line_num + skipped, fields

    return end_s, rows()


def _own(path: Path, rows: Iterator[Row], columns: dict[str, int], end_s: float | None) -> Trace:
    times: list[tuple[int, float]] = []
    phases: list[int] = []
    names: dict[str, int] = {}
    labels: list[int] = []
    payloads: list[str] = []
    for line, fields in rows:
        times.append((line, _number(path, line, "time_s", _field(path, line, fields, columns, "time_s"))))
        if "phase" in columns:
            phases.append(names.setdefault(_field(path, line, fields, columns, "phase"), len(names)))
        if "label" in columns:
            text = _field(path, line, fields, columns, "label")
            labels.append(int(_number(path, line, "label", text)) if text else NO_LABEL)
        if "payload" in columns:
            payloads.append(_field(path, line, fields, columns, "payload"))
    arrivals = _arrivals(path, times, end_s)
    if "phase" in columns:
        arrivals = replace(arrivals, phase=np.array(phases, dtype=np.int16), phase_names=tuple(names))
    return Trace(
        path.name,
        arrivals,
        np.array(labels, dtype=np.int64) if "label" in columns else None,
        tuple(payloads) if "payload" in columns else None,
    )


def _timestamps(path: Path, rows: Iterator[Row], column: int) -> list[tuple[int, float]]:
    """Return (line, seconds since the first request) of an Azure file; fractions of 100 ns are kept."""
    origin: datetime.datetime | None = None
    times = []
    for line, fields in rows:
        text = fields[column].strip() if column < len(fields) else ""
        whole, _, fraction = text.rstrip("Z").removesuffix("+00:00").partition(".")
        try:
            moment = datetime.datetime.fromisoformat(whole)
            below_s = float("0." + (fraction or "0"))
        except ValueError:
            raise TraceError(f"{path} line {line}: TIMESTAMP {text!r} is no time; write YYYY-MM-DD HH:MM:SS") from None
        if origin is None:
            origin, origin_below_s = moment, below_s
        times.append((line, (moment - origin).total_seconds() + below_s - origin_below_s))
    return times


def _counts(
    path: Path, rows: Iterator[Row], columns: dict[str, int], rng: np.random.Generator, interval_s: float
) -> tuple[NDArray[np.float64], float]:
    """Spread each interval's count evenly at random over it; return the times and the last interval's end."""
    starts: list[tuple[int, float]] = []
    counts: list[int] = []
    for line, fields in rows:
        text = _field(path, line, fields, columns, "count")
        if not text.isdecimal():
            raise TraceError(f"{path} line {line}: count {text!r} must be a whole number, 0 or more")
        counts.append(int(text))
        start_s = len(starts) * interval_s
        if "time_s" in columns:
            start_s = _number(path, line, "time_s", _field(path, line, fields, columns, "time_s"))
        starts.append((line, start_s))
    checked = _ordered(path, starts)
    widths = np.diff(checked)
    widths = np.append(widths, widths[-1] if len(widths) else interval_s)  # the last is as wide as the one before
    places = np.repeat(np.arange(len(counts)), counts)
    drawn = np.sort(checked[places] + rng.random(len(places)) * widths[places])
    return drawn, float(checked[-1] + widths[-1]) if len(counts) else 0.0


def _arrivals(path: Path, times: list[tuple[int, float]], end_s: float | None) -> Arrivals:
    checked = _ordered(path, times)
    last_s = float(checked[-1]) if len(checked) else 0.0
    if end_s is not None and end_s < last_s:
        raise TraceError(f"{path}: the stated end {end_s:g} s lies before the last request at {last_s:g} s")
    return Arrivals(checked, None, last_s if end_s is None else end_s)


def _ordered(path: Path, times: list[tuple[int, float]]) -> NDArray[np.float64]:
    values = np.array([time for _, time in times], dtype=np.float64)
    if len(values) and values[0] < 0:
        raise TraceError(f"{path} line {times[0][0]}: time_s {values[0]:g} is negative; times start at 0")
    falls = np.flatnonzero(np.diff(values) < 0)
    if len(falls):
        at = int(falls[0])
        raise TraceError(
            f"{path} line {times[at + 1][0]}: the time falls from {values[at]:g} to {values[at + 1]:g} s; "
            "sort the file by time"
        )
    return values


def _field(path: Path, line: int, fields: list[str], columns: dict[str, int], name: str) -> str:
    if columns[name] >= len(fields):
        raise TraceError(f"{path} line {line}: {name} is missing; each line needs {len(columns)} fields")
    return fields[columns[name]].strip()


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        found = f"{text!r} is no number" if text else "is missing"
        raise TraceError(f"{path} line {line}: {name} {found}; write seconds as in 12.5")
    return value


def _rate(spec: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not (np.isfinite(rate) and rate > 0):
        raise TraceError(f"{spec!r}: needs a positive rate in requests per second, as in poisson:100")
    return rate
