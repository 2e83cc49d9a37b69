"""Fit a two-phase Markovian arrival process to a trace, and say how well it fits.

Method: the arrivals are counted in equal bins and a two-state Poisson hidden Markov model is fitted to the counts by
expectation maximisation (Baum and Welch; Rydén 1996 for Markov-modulated Poisson processes). The generator of the
phases is the matrix logarithm of the fitted transition matrix over the bin, closed for two states. Judged by what
was not fitted: interarrival moments and autocorrelation, and the index of dispersion for counts over growing windows.
"""

from dataclasses import dataclass

import numpy as np

from policies.routing.contract import FloatArray, RoutingError
from policies.routing.workload import Arrivals, MarkovianArrivalProcess

ITERATIONS = 100
MOST_BINS = 20_000
LEAST_ARRIVALS = 50


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a trace looks like: arrivals per second, squared coefficient of variation of the interarrival times,
    their skewness, their autocorrelation at lags 1, 2, 5, 10, and the index of dispersion for counts over windows."""

    rate: float
    scv: float
    skewness: float
    autocorrelation: tuple[float, ...]
    windows_s: tuple[float, ...]
    dispersion: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted process: rates per second in the two phases, mean holding times, bin used, log-likelihood per bin."""

    process: MarkovianArrivalProcess
    rates: tuple[float, float]
    hold_s: tuple[float, float]
    bin_s: float
    log_likelihood: float


def statistics(arrivals: Arrivals, windows: int = 8) -> Statistics:
    """The statistics of a trace; an error if it is too short to have any."""
    times = arrivals.time_s
    if len(times) < LEAST_ARRIVALS:
        raise RoutingError(f"{len(times)} arrivals: at least {LEAST_ARRIVALS} are needed to describe a trace")
    gaps = np.diff(times)
    mean, spread = gaps.mean(), gaps.std()
    centred = gaps - mean
    lags = tuple(
        float((centred[:-k] * centred[k:]).mean() / max(spread**2, 1e-300)) if len(gaps) > 4 * k else 0.0
        for k in (1, 2, 5, 10)
    )
    length_s = arrivals.end_s
    widths = np.geomspace(2.0 * mean, length_s / 20.0, windows)
    dispersion = []
    for width in widths:
        counts = _counts(times, width, length_s)
        dispersion.append(float(counts.var() / max(counts.mean(), 1e-300)))
    return Statistics(
        rate=len(times) / length_s,
        scv=float(spread**2 / mean**2),
        skewness=float((centred**3).mean() / max(spread**3, 1e-300)),
        autocorrelation=lags,
        windows_s=tuple(float(w) for w in widths),
        dispersion=tuple(dispersion),
    )


def _counts(times: FloatArray, width_s: float, length_s: float) -> FloatArray:
    bins = max(int(length_s / width_s), 1)
    return np.asarray(
        np.bincount((times[times < bins * width_s] / width_s).astype(np.int64), minlength=bins), dtype=float
    )


def fit(arrivals: Arrivals, bin_s: float | None = None) -> Fit:
    """The two-phase process that makes the trace's counts most likely.

    bin_s: width of the bins (default: about four arrivals' time, but at most 20,000 bins). Phase 0 is the busier.
    """
    times = arrivals.time_s
    if len(times) < LEAST_ARRIVALS:
        raise RoutingError(f"{len(times)} arrivals: at least {LEAST_ARRIVALS} are needed to fit a process")
    length_s = arrivals.end_s
    width = bin_s or max(4.0 * length_s / len(times), length_s / MOST_BINS)
    counts = _counts(times, width, length_s)
    if len(counts) < 10:
        raise RoutingError(f"bin_s = {width}: only {len(counts)} bins; choose at most {length_s / 10:.3g}")
    busy_share = np.quantile(counts, [0.25, 0.9])
    means = np.array([max(busy_share[1], counts.mean() * 1.5), max(min(busy_share[0], counts.mean() * 0.7), 0.05)])
    move = np.array([[0.9, 0.1], [0.02, 0.98]])
    start = np.array([0.2, 0.8])
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(counts.max()) + 1)))])[counts.astype(int)]
    before = -np.inf
    for _ in range(ITERATIONS):
        likelihood, start, move, means = _improve(counts, factorials, start, move, means)
        if likelihood - before < 1e-6 * abs(likelihood):
            break
        before = likelihood
    if means[0] < means[1]:
        means, move = means[::-1], move[::-1, ::-1]
    out, back = float(move[0, 1]), float(move[1, 0])
    both = min(out + back, 1.0 - 1e-6)
    # log of a two-state stochastic matrix: its off-diagonal entries, scaled by -log(1 - p - q) / (p + q).
    scale = -np.log1p(-both) / both / width
    leave = np.maximum(np.array([out, back]) * scale, 1e-9)
    rates = np.maximum(means / width, 1e-9)
    d0 = np.array([[-rates[0] - leave[0], leave[0]], [leave[1], -rates[1] - leave[1]]])
    process = MarkovianArrivalProcess(d0, np.diag(rates), ("bursty", "normal"))
    return Fit(
        process,
        (float(rates[0]), float(rates[1])),
        (float(1.0 / leave[0]), float(1.0 / leave[1])),
        float(width),
        float(before / len(counts)),
    )


def _improve(
    counts: FloatArray, factorials: FloatArray, start: FloatArray, move: FloatArray, means: FloatArray
) -> tuple[float, FloatArray, FloatArray, FloatArray]:
    """One step of expectation maximisation; returns the log-likelihood before it and the new parameters."""
    n = len(counts)
    log_emit = counts[:, None] * np.log(means) - means - factorials[:, None]
    top = log_emit.max(axis=1)
    emit = np.exp(log_emit - top[:, None]).tolist()
    (m00, m01), (m10, m11) = move.tolist()
    a0, a1 = start[0] * emit[0][0], start[1] * emit[0][1]
    forward, scales = [], []
    for k in range(n):
        if k:
            e0, e1 = emit[k]
            a0, a1 = (a0 * m00 + a1 * m10) * e0, (a0 * m01 + a1 * m11) * e1
        total = a0 + a1
        a0, a1 = a0 / total, a1 / total
        forward.append((a0, a1))
        scales.append(total)
    b0 = b1 = 1.0
    backward = [(1.0, 1.0)] * n
    for k in range(n - 2, -1, -1):
        e0, e1 = emit[k + 1]
        s = scales[k + 1]
        b0, b1 = (m00 * e0 * b0 + m01 * e1 * b1) / s, (m10 * e0 * b0 + m11 * e1 * b1) / s
        backward[k] = (b0, b1)
    f, b, e = np.array(forward), np.array(backward), np.array(emit)
    phase = f * b
    phase /= phase.sum(axis=1, keepdims=True)
    joint = f[:-1, :, None] * move[None] * (e[1:] * b[1:])[:, None, :] / np.array(scales[1:])[:, None, None]
    moved = joint.sum(axis=0) + 1e-12
    new_means = np.maximum((phase * counts[:, None]).sum(axis=0) / phase.sum(axis=0), 1e-6)
    likelihood = float(np.log(scales).sum() + top.sum())
    return likelihood, phase[0], moved / moved.sum(axis=1, keepdims=True), new_means
