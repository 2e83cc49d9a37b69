"""What an arrival process is: the request times, and the hidden phases behind them, of a workload.

The simulator and the load generator draw their requests from here, so that a policy is trained on and
judged by the same processes. Numpy only; randomness is an argument. Sources: Tan, Section 3.1 (Markovian
arrival processes), Eq. 12 (the main workload) and Section 5.2.3 (the periodic workload).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

BURSTY = 0
NORMAL = 1
PHASE_NAMES = ("bursty", "normal")
"""The two phases of the paper's workloads, in the order of Eq. 12's rows."""

_ROW_SUM_TOLERANCE = 1e-9  # relative to the row's largest rate
_DRAW_BLOCK = 4096  # random numbers drawn at once while walking through the phases


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Requests in order of arrival; `len()` is their number.

    time_s: float64[N], non-decreasing, from 0 on. phase: int16[N], the phase in which each request arrived
    (an index into `phase_names`), or None where a process has no phases. end_s: the stated end, from which
    on nothing arrives: it is part of the workload, since the silence after the last request counts too.
    """

    time_s: NDArray[np.float64]
    phase: NDArray[np.int16] | None
    end_s: float
    phase_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        times = self.time_s
        if times.ndim != 1 or times.dtype != np.float64:
            raise ValueError(f"time_s must be a float64 vector, not {times.dtype}{list(times.shape)}")
        if not np.all(np.isfinite(times)):
            raise ValueError("time_s holds a value that is not finite")
        if len(times) and (times[0] < 0 or np.any(np.diff(times) < 0)):
            raise ValueError("time_s must start at 0 or later and never decrease")
        if not np.isfinite(self.end_s) or self.end_s < (times[-1] if len(times) else 0.0):
            raise ValueError(f"end_s = {self.end_s} lies before the last request")
        if self.phase is None:
            return
        if self.phase.shape != times.shape or self.phase.dtype != np.int16:
            raise ValueError("phase must be an int16 vector as long as time_s")
        if len(times) and not 0 <= self.phase.min() <= self.phase.max() < len(self.phase_names):
            raise ValueError(f"phase must index phase_names, which has {len(self.phase_names)} entries")

    def __len__(self) -> int:
        return len(self.time_s)

    def phase_spans(self) -> list[tuple[float, float, str]]:
        """Return (start_s, end_s, phase name) of each run of requests in one phase; empty without phases.

        A phase change is only seen by the next request, so borders are late by one gap between requests.
        """
        if self.phase is None or not len(self):
            return []
        starts = np.concatenate(([0], np.flatnonzero(np.diff(self.phase)) + 1))
        borders = [0.0, *(float(t) for t in self.time_s[starts[1:]]), self.end_s]
        names = [self.phase_names[int(p)] for p in self.phase[starts]]
        return list(zip(borders[:-1], borders[1:], names, strict=True))


class ArrivalProcess(Protocol):
    """Anything that can draw arrivals for a length of time."""

    def generate(self, rng: np.random.Generator, duration_s: float) -> Arrivals:
        """Return the arrivals of [0, duration_s)."""


class MarkovianArrivalProcess:
    """A Markovian arrival process (D0, D1) of any number of phases (Tan, Section 3.1; Lucantoni).

    d0: rates of phase changes without an arrival (negative diagonal); d1: rates of those with one; both
    [m, m], per second. Raises ValueError when they are not square and equal in shape, a sign is wrong, a row
    of D0 + D1 does not sum to zero, nothing ever arrives, or some phase cannot be reached from another.
    """

    def __init__(self, d0: ArrayLike, d1: ArrayLike, phase_names: Sequence[str] | None = None) -> None:
        self.d0 = np.array(d0, dtype=np.float64)
        self.d1 = np.array(d1, dtype=np.float64)
        _check_matrices(self.d0, self.d1)
        self.phases = len(self.d0)
        self.phase_names = tuple(f"phase{i}" for i in range(self.phases)) if phase_names is None else tuple(phase_names)
        if len(self.phase_names) != self.phases or len(set(self.phase_names)) != self.phases:
            raise ValueError(f"{self.phases} phases need as many different names, not {self.phase_names}")

    def stationary(self) -> NDArray[np.float64]:
        """Return the long-run share of time in each phase: pi (D0 + D1) = 0, sum 1; float64[m]."""
        generator = self.d0 + self.d1
        system = np.vstack((generator.T, np.ones(self.phases)))
        target = np.zeros(self.phases + 1)
        target[-1] = 1.0
        solution = np.linalg.lstsq(system, target, rcond=None)[0]
        return np.asarray(solution, dtype=np.float64)

    def phase_rates(self) -> NDArray[np.float64]:
        """Return the arrivals per second while in each phase: the row sums of D1; float64[m]."""
        rates: NDArray[np.float64] = self.d1.sum(axis=1)
        return rates

    def rate(self) -> float:
        """Return the long-run arrivals per second: pi D1 1."""
        return float(self.stationary() @ self.phase_rates())

    def generate(
        self,
        rng: np.random.Generator,
        duration_s: float | None = None,
        count: int | None = None,
        initial_phase: int | None = None,
    ) -> Arrivals:
        """Draw the arrivals of [0, duration_s), or the first `count` (the end is then the last of them).

        Exact: the phases are walked through change by change; within a stay, the arrivals that change no
        phase are a Poisson process of rate D1[i, i], drawn for all stays at once. An arrival that changes
        the phase counts as one of the phase it leaves. Without `initial_phase` the first phase is drawn from
        the stationary distribution, as in Tan's experiments.
        """
        if (duration_s is None) == (count is None):
            raise ValueError("give either duration_s or count")
        phase = self._first_phase(rng, initial_phase)
        if duration_s is not None:
            if not (np.isfinite(duration_s) and duration_s >= 0):
                raise ValueError(f"duration_s must be 0 or more, not {duration_s}")
            times, phases, _ = self._draw(rng, duration_s, phase)
            return Arrivals(times, phases, float(duration_s), self.phase_names)
        assert count is not None
        if count < 0:
            raise ValueError(f"count must be 0 or more, not {count}")
        # The process has no memory beyond its phase, so pieces drawn one after the other are exact too.
        piece_s = 1.05 * max(count, 100) / self.rate()
        time_parts = [np.empty(0)]
        phase_parts = [np.empty(0, dtype=np.int16)]
        drawn, offset_s = 0, 0.0
        while drawn < count:
            times, phases, phase = self._draw(rng, piece_s, phase)
            time_parts.append(times + offset_s)
            phase_parts.append(phases)
            drawn += len(times)
            offset_s += piece_s
        all_times = np.concatenate(time_parts)[:count]
        end_s = float(all_times[-1]) if count else 0.0
        return Arrivals(all_times, np.concatenate(phase_parts)[:count], end_s, self.phase_names)

    def _first_phase(self, rng: np.random.Generator, initial_phase: int | None) -> int:
        if initial_phase is None:
            shares = np.clip(self.stationary(), 0.0, None)
            return int(rng.choice(self.phases, p=shares / shares.sum()))
        if not 0 <= initial_phase < self.phases:
            raise ValueError(f"initial_phase must lie in 0..{self.phases - 1}, not {initial_phase}")
        return initial_phase

    def _draw(
        self, rng: np.random.Generator, duration_s: float, phase: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int16], int]:
        """Return times, phases and the phase at the end of one piece that starts in `phase`."""
        starts, stays, marked, last_phase = self._walk(rng, duration_s, phase)
        lengths = np.diff(np.append(starts, duration_s))
        counts = rng.poisson(np.diag(self.d1)[stays] * lengths)
        inner = np.repeat(starts, counts) + rng.random(int(counts.sum())) * np.repeat(lengths, counts)
        # Rounding may carry start + u * length onto the next stay's start; the order of phases must hold.
        ends = np.nextafter(starts + lengths, -np.inf)
        inner = np.minimum(inner, np.repeat(np.maximum(ends, starts), counts))
        changes = np.flatnonzero(marked)
        times = np.concatenate((inner, starts[changes + 1]))
        phases = np.concatenate((np.repeat(stays, counts), stays[changes])).astype(np.int16)
        order = np.argsort(times, kind="stable")
        return times[order], phases[order], last_phase

    def _walk(
        self, rng: np.random.Generator, duration_s: float, phase: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_], int]:
        """Walk through the phases: when each stay starts, its phase, and whether an arrival ends it."""
        m = self.phases
        leave = np.concatenate((self.d0, self.d1), axis=1)  # columns 0..m-1 without, m..2m-1 with an arrival
        diagonal = np.arange(m)
        leave[diagonal, diagonal] = 0.0
        leave[diagonal, m + diagonal] = 0.0
        cumulative = np.cumsum(leave, axis=1)
        leave_rates = cumulative[:, -1].tolist()
        ladders = cumulative.tolist()
        starts, stays, marked = [0.0], [phase], []
        now = 0.0
        # One phase alone never changes; irreducibility gives every phase of several a way out.
        while m > 1:
            for wait, draw in zip(
                rng.standard_exponential(_DRAW_BLOCK).tolist(), rng.random(_DRAW_BLOCK).tolist(), strict=True
            ):
                rate = leave_rates[phase]
                now += wait / rate
                if now >= duration_s:
                    marked.append(False)
                    return np.array(starts), np.array(stays), np.array(marked), phase
                column = bisect_right(ladders[phase], draw * rate)
                marked.append(column >= m)
                phase = column % m
                starts.append(now)
                stays.append(phase)
        return np.array(starts), np.array(stays), np.array([False]), phase


def paper_process(rate_scale: float = 1.0, time_scale: float = 1.0) -> MarkovianArrivalProcess:
    """Return Tan's main workload (Eq. 12): 180 requests/s for 27.8 s on average, 10/s for 500 s.

    rate_scale multiplies both arrival rates, time_scale both mean holding times, each on its own. D0[2, 1]
    is 0.002, not the printed 0.0002: rows must sum to zero and the normal state lasts 18 times longer.
    """
    _check_positive(rate_scale=rate_scale, time_scale=time_scale)
    bursty, normal = 180.0 * rate_scale, 10.0 * rate_scale
    leave_bursty, leave_normal = 0.036 / time_scale, 0.002 / time_scale
    return MarkovianArrivalProcess(
        [[-(bursty + leave_bursty), leave_bursty], [leave_normal, -(normal + leave_normal)]],
        [[bursty, 0.0], [0.0, normal]],
        PHASE_NAMES,
    )


@dataclass(frozen=True)
class PeriodicProcess:
    """Tan's non-Markovian workload (Section 5.2.3): Poisson arrivals whose rate switches periodically.

    Each period starts with `normal_s` seconds at `normal_rate` per second, then `bursty_s` at `bursty_rate`.
    """

    normal_rate: float = 10.0
    bursty_rate: float = 180.0
    normal_s: float = 500.0
    bursty_s: float = 27.8

    def __post_init__(self) -> None:
        _check_positive(
            normal_rate=self.normal_rate,
            bursty_rate=self.bursty_rate,
            normal_s=self.normal_s,
            bursty_s=self.bursty_s,
        )

    def generate(self, rng: np.random.Generator, duration_s: float) -> Arrivals:
        """Return the arrivals of [0, duration_s), with their phases."""
        period_s = self.normal_s + self.bursty_s
        periods = np.arange(int(duration_s / period_s) + 1) * period_s
        starts = np.column_stack((periods, periods + self.normal_s)).ravel()
        ends = np.minimum(np.append(starts[1:], periods[-1] + period_s), duration_s)
        lengths = np.maximum(ends - starts, 0.0)
        stays = np.tile(np.array([NORMAL, BURSTY], dtype=np.int16), len(periods))
        rates = np.where(stays == BURSTY, self.bursty_rate, self.normal_rate)
        counts = rng.poisson(rates * lengths)
        times = np.repeat(starts, counts) + rng.random(int(counts.sum())) * np.repeat(lengths, counts)
        times = np.sort(times)  # stays follow one another, so sorting moves no request out of its own
        return Arrivals(times, np.repeat(stays, counts), float(duration_s), PHASE_NAMES)


@dataclass(frozen=True)
class Poisson:
    """Independent requests at `rate` per second."""

    rate: float

    def __post_init__(self) -> None:
        _check_positive(rate=self.rate)

    def generate(self, rng: np.random.Generator, duration_s: float) -> Arrivals:
        """Return the arrivals of [0, duration_s); no phases."""
        count = int(rng.poisson(self.rate * duration_s))
        return Arrivals(np.sort(rng.random(count) * duration_s), None, float(duration_s))


@dataclass(frozen=True)
class Constant:
    """Requests exactly 1/rate seconds apart, the first at 0."""

    rate: float

    def __post_init__(self) -> None:
        _check_positive(rate=self.rate)

    def generate(self, rng: np.random.Generator, duration_s: float) -> Arrivals:
        """Return the arrivals of [0, duration_s); no phases, and `rng` is left alone."""
        times = np.arange(int(np.ceil(self.rate * duration_s))) / self.rate
        return Arrivals(times[times < duration_s], None, float(duration_s))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, not {value}")


def _check_matrices(d0: NDArray[np.float64], d1: NDArray[np.float64]) -> None:
    """Raise ValueError unless (d0, d1) describe an irreducible Markovian arrival process."""
    if d0.ndim != 2 or d0.shape[0] != d0.shape[1] or d0.shape != d1.shape or not len(d0):
        raise ValueError(f"D0 and D1 must be square and alike, not {list(d0.shape)} and {list(d1.shape)}")
    if not (np.all(np.isfinite(d0)) and np.all(np.isfinite(d1))):
        raise ValueError("D0 and D1 must be finite")
    m = len(d0)
    outside = ~np.eye(m, dtype=bool)
    if np.any(np.diag(d0) >= 0):
        raise ValueError("D0's diagonal must be negative")
    if np.any(d0[outside] < 0) or np.any(d1 < 0):
        raise ValueError("D0 off its diagonal, and all of D1, must not be negative")
    if not np.any(d1 > 0):
        raise ValueError("D1 is zero: nothing would ever arrive")
    sums = (d0 + d1).sum(axis=1)
    for row in range(m):
        if abs(sums[row]) > _ROW_SUM_TOLERANCE * np.abs(d0[row]).max():
            raise ValueError(f"row {row} of D0 + D1 must sum to zero, not {sums[row]:.6g}")
    reach = (d0 + d1 > 0) | np.eye(m, dtype=bool)
    for via in range(m):  # transitive closure, one intermediate phase at a time
        reach |= np.outer(reach[:, via], reach[via])
    if not reach.all():
        start, goal = np.argwhere(~reach)[0]
        raise ValueError(f"the phases are not irreducible: phase {goal} is never reached from phase {start}")
