"""Profiles: how long a variant takes on a device, per batch size, and how often it is right.

One JSON format, written by `tidegate models profile` and read by routers, simulators and emulation. Service
times are kept as a grid of 101 quantiles (0%, 1%, ... 100%), so that no shape is assumed. Measured figures say
what ran beside them: instances that share a machine slow each other down.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from models.catalog import Accuracy, Variant, VariantError
from models.runtime import EmulatedRuntime

GRID_POINTS = 101

FloatArray = npt.NDArray[np.float64]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Grid = Annotated[tuple[float, ...], msgspec.Meta(min_length=GRID_POINTS, max_length=GRID_POINTS)]


class ServiceTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Service time of one batch size: the quantiles 0%, 1%, ... 100% in seconds, rising."""

    batch_size: _Positive
    samples: _Positive
    quantiles_s: _Grid


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variant on one device."""

    variant: str
    device: str
    source: Literal["measured", "modelled"]  # of the service times
    co_located: tuple[str, ...] = ()  # variants kept busy beside it while measuring
    machine: str = ""
    accuracy: Accuracy = Accuracy()
    times: tuple[ServiceTimes, ...]  # by rising batch size

    @property
    def id(self) -> str:
        """Short hash of the content: equal profiles have equal ids on every machine."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]

    def grid_s(self, batch_size: int) -> FloatArray:
        """Quantile grid [101] in seconds; between two measured batch sizes, point by point on a line.

        Raises `ValueError` outside the measured batch sizes: a line would have to be guessed there.
        """
        sizes = [times.batch_size for times in self.times]
        if not sizes[0] <= batch_size <= sizes[-1]:
            raise ValueError(
                f"profile of {self.variant}: batch size {batch_size} is outside {sizes}; measure it with "
                f"`tidegate models profile {self.variant} --batch {batch_size}`"
            )
        grids = np.array([times.quantiles_s for times in self.times])
        upper = int(np.searchsorted(sizes, batch_size))
        if sizes[upper] == batch_size:
            return np.asarray(grids[upper])
        share = (batch_size - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
        return np.asarray((1.0 - share) * grids[upper - 1] + share * grids[upper])

    def quantile_s(self, batch_size: int, probability: float) -> float:
        """Service time in seconds that a share `probability` (0..1) of services stays within."""
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability = {probability}: give a fraction from 0 to 1")
        return float(np.interp(probability, np.linspace(0.0, 1.0, GRID_POINTS), self.grid_s(batch_size)))

    def mean_s(self, batch_size: int) -> float:
        """Mean service time in seconds: the area under the quantile function (trapezoids)."""
        return float(np.trapezoid(self.grid_s(batch_size), dx=1.0 / (GRID_POINTS - 1)))


class _ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    profiles: tuple[Profile, ...]
    format: Literal[1] = 1


def service_times(batch_size: int, samples_s: Sequence[float] | FloatArray) -> ServiceTimes:
    """The record of measured or drawn service times (at least one, in seconds)."""
    grid = np.quantile(np.asarray(samples_s, dtype=np.float64), np.linspace(0.0, 1.0, GRID_POINTS))
    rounded = tuple(round(value, 9) for value in grid.tolist())
    return ServiceTimes(batch_size=batch_size, samples=len(samples_s), quantiles_s=rounded)


def modelled_profile(variant: Variant, batch_sizes: Iterable[int], *, draws: int = 20_000, seed: int = 0) -> Profile:
    """Profile of an emulated variant, from draws of its law. Raises `VariantError` for any other."""
    if variant.emulated is None:
        raise VariantError(variant.name, "runtime", variant.runtime, "only emulated variants have a law")
    runtime = EmulatedRuntime(variant, seed=seed)
    if variant.emulated.distribution == "deterministic":
        draws = 1
    times = tuple(
        service_times(size, [runtime.duration_s(size) for _ in range(draws)]) for size in sorted(set(batch_sizes))
    )
    return Profile(variant=variant.name, device="emulated", source="modelled", accuracy=variant.accuracy, times=times)


def write_profiles(file: Path, profiles: Iterable[Profile]) -> None:
    """Write `profiles` as JSON, whole or not at all: a reader never sees half a file."""
    text = msgspec.json.format(msgspec.json.encode(_ProfileFile(tuple(profiles))), indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_bytes(text + b"\n")
    unfinished.replace(file)


def read_profiles(file: Path) -> tuple[Profile, ...]:
    """Read and check a profile file. Raises `VariantError` that names key, value and remedy."""
    where = str(file)
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_ProfileFile).profiles
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); `tidegate models profile` writes one"
        raise VariantError(where, "file", file.name, remedy) from error
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        raise VariantError(where, path.strip("`") or "file", "...", f"{reason}; measure it again") from error
    except msgspec.DecodeError as error:
        raise VariantError(where, "file", file.name, f"is not valid JSON ({error})") from error
    for profile in found:
        _check(profile, where)
    return found


def _check(profile: Profile, where: str) -> None:
    sizes = [times.batch_size for times in profile.times]
    if not sizes or sizes != sorted(set(sizes)):
        raise VariantError(where, f"{profile.variant}.times", sizes, "give each batch size once, rising")
    for times in profile.times:
        grid = np.array(times.quantiles_s)
        if not (np.isfinite(grid).all() and (grid >= 0.0).all() and (np.diff(grid) >= 0.0).all()):
            key = f"{profile.variant}.times[batch {times.batch_size}].quantiles_s"
            raise VariantError(where, key, "...", "quantiles are finite, not negative and rising: measure again")
    known = profile.accuracy.value is not None
    if known != (profile.accuracy.source != "none"):
        key = f"{profile.variant}.accuracy.source"
        raise VariantError(where, key, profile.accuracy.source, 'give a value, or source "none" without one')
