"""Service tables: what each configuration and variant of an edge service costs and how accurate it is.

One TOML (or JSON) file per service, so that another service is added without code. Every accuracy and
size-factor cell says where it comes from: `published`, `measured` (by this project) or `modelled`. The two tables
that ship (`tables/detection.toml`, `tables/tracking.toml`) are Huang's Tables II and III with the cells of
Figs. 4 to 6 rebuilt by `make_tables.py`; the file format is described at the head of each file.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.placement.contract import FloatArray, IntArray

SOURCES = ("published", "measured", "modelled")
TABLES_DIRECTORY = Path(__file__).parent / "tables"


class TableError(ValueError):
    """A service table is wrong; the message names the file, the key, the value and what would be right."""


@dataclass(frozen=True)
class ServiceTable:
    """One edge service: C configurations, M variants and the range of its requests."""

    name: str
    configurations: tuple[str, ...]
    settings: tuple[Mapping[str, float], ...]  # per configuration: resolution, jpeg_quality, frame_rate, ...
    size_factor: FloatArray  # (C,) eta of Eq. 2, in (0, 1]
    size_factor_source: tuple[str, ...]  # (C,)
    inferences: IntArray  # (C,) I of Eq. 5: forward passes per request
    variants: tuple[str, ...]
    memory_mb: FloatArray  # (M,) B_j
    tflop: FloatArray  # (M,) A_j, per inference
    accuracy: FloatArray  # (C, M) Phi of Eq. 1
    accuracy_source: tuple[tuple[str, ...], ...]  # (C, M)
    data_mb: tuple[float, float]  # the smallest and the largest request
    deadlines_s: tuple[float, ...]  # the deadlines that requests draw from

    @property
    def standard_accuracy(self) -> FloatArray:
        """Accuracy scaled to 0..1 over the whole table (Eq. 19), shape (C, M); all ones if it is constant."""
        low, high = float(self.accuracy.min()), float(self.accuracy.max())
        if high == low:
            return np.ones_like(self.accuracy)
        return (self.accuracy - low) / (high - low)


def read_table(path: Path) -> ServiceTable:
    """Read and check one service table (`.toml` or `.json`). Raises TableError."""
    try:
        raw = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from error
    return parse_table(raw, str(path))


def shipped_tables() -> tuple[ServiceTable, ...]:
    """Huang's two services: detection and tracking, in this order."""
    return tuple(read_table(TABLES_DIRECTORY / f"{name}.toml") for name in ("detection", "tracking"))


def parse_table(raw: Mapping[str, Any], where: str) -> ServiceTable:
    """Check a decoded table and return it. Raises TableError."""
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        raise TableError(f"{where}: name is {name!r}; give the service a name")
    configurations = _entries(raw, "configuration", where)
    variants = _entries(raw, "variant", where)
    requests = raw.get("requests")
    if not isinstance(requests, Mapping):
        raise TableError(f"{where}: [requests] is missing; give data_mb = [low, high] and deadlines_s = [...]")
    low, high = _numbers(requests.get("data_mb"), 2, "requests.data_mb", where)
    if low > high:
        raise TableError(f"{where}: requests.data_mb is [{low}, {high}]; the smaller figure comes first")
    deadlines = _numbers(requests.get("deadlines_s"), None, "requests.deadlines_s", where)
    factors = [
        _number(c.get("size_factor"), f"configuration[{i}].size_factor", where, 1.0)
        for i, c in enumerate(configurations)
    ]
    passes = [c.get("inferences", 1) for c in configurations]
    for i, count in enumerate(passes):
        if not isinstance(count, int) or count < 1:
            raise TableError(f"{where}: configuration[{i}].inferences is {count!r}; an integer of at least 1")
    accuracy, sources = [], []
    for j, variant in enumerate(variants):
        accuracy.append(_numbers(variant.get("accuracy"), len(configurations), f"variant[{j}].accuracy", where))
        sources.append(
            _sources(variant.get("accuracy_source"), len(configurations), f"variant[{j}].accuracy_source", where)
        )
    fixed = {"name", "size_factor", "size_factor_source", "inferences"}
    return ServiceTable(
        name=name,
        configurations=tuple(str(c.get("name", i)) for i, c in enumerate(configurations)),
        settings=tuple({k: float(v) for k, v in c.items() if k not in fixed} for c in configurations),
        size_factor=np.array(factors),
        size_factor_source=_sources(
            [c.get("size_factor_source") for c in configurations],
            len(configurations),
            "configuration.size_factor_source",
            where,
        ),
        inferences=np.array(passes, dtype=np.int64),
        variants=tuple(str(v.get("name", j)) for j, v in enumerate(variants)),
        memory_mb=np.array(
            [_number(v.get("memory_mb"), f"variant[{j}].memory_mb", where) for j, v in enumerate(variants)]
        ),
        tflop=np.array([_number(v.get("tflop"), f"variant[{j}].tflop", where) for j, v in enumerate(variants)]),
        accuracy=np.array(accuracy).T,
        accuracy_source=tuple(zip(*sources, strict=True)),
        data_mb=(low, high),
        deadlines_s=tuple(deadlines),
    )


def _entries(raw: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    entries = raw.get(key)
    if not isinstance(entries, list) or not entries:
        raise TableError(f"{where}: the table has no [[{key}]]; a service needs at least one")
    return entries


def _number(value: Any, key: str, where: str, most: float = math.inf) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 < value <= most
        or not math.isfinite(value)
    ):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise TableError(f"{where}: {key} is {value!r}; it must be a finite number above 0{limit}")
    return float(value)


def _numbers(values: Any, count: int | None, key: str, where: str) -> list[float]:
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or not values
        or (count is not None and len(values) != count)
    ):
        wanted = "numbers" if count is None else f"{count} numbers"
        raise TableError(f"{where}: {key} is {values!r}; it must be a list of {wanted}")
    return [_number(value, f"{key}[{i}]", where) for i, value in enumerate(values)]


def _sources(values: Any, count: int, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) != count or any(v not in SOURCES for v in values):
        raise TableError(f"{where}: {key} is {values!r}; it must be {count} of {', '.join(SOURCES)}")
    return tuple(values)
