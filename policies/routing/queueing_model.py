"""What the simulator simulates: a service's instances with their queues, and the arrivals they meet.

`ServiceModel` and `ArrivalModel` are for people (validated, immutable); `System` and `State` are the flat arrays
that compiled code walks over. Leading axis of every `State` array: e, the environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policies.routing.contract import BATCH_SIZES, FloatArray, InstanceKind, IntArray, RoutingError
from policies.routing.estimation import new_margin
from policies.routing.per_request import new_state
from policies.routing.randomness import streams

DETERMINISTIC, GAMMA, LOGNORMAL, EMPIRICAL = 0, 1, 2, 3
_LAWS = {"deterministic": DETERMINISTIC, "gamma": GAMMA, "lognormal": LOGNORMAL, "empirical": EMPIRICAL}
TRACE, MARKOVIAN, PERIODIC = 0, 1, 2

ARRIVED, IN_TIME, LATE, QUEUE_FULL, EXPIRED, TO_HEAVY, GOODPUT, BOUNCED, UNAVAILABLE, SOJOURN_S = range(10)
COUNTERS = 10
"""Columns of `State.tally`; GOODPUT sums accuracy over requests in time, SOJOURN_S seconds over finished ones."""


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """A service as simulated: its instances, how long they take, and what is asked of them.

    law: "deterministic", "gamma", "lognormal" (mean kind.service_s, coefficient of variation cv) or "empirical"
    quantiles_s: for "empirical", float64[n, 3, 101], service time quantiles per instance and batch size 1, 3, 5
    batch_factor: mean service time of a batch of 1, 3, 5 over that of one (default: 0.4 + 0.6 b, modelled;
        papers/README.md); used by all laws but "empirical"
    score_accuracy, reward_accuracy: accuracies for goodput and for the reward, per instance (default: kind.accuracy)
    expire: drop what can no longer finish in time, on arrival and before service
    slow_at_s, slow_factor: from that time on every service time is multiplied by the factor of its instance
    """

    kinds: tuple[InstanceKind, ...]
    requirement_s: float = 0.3
    law: str = "deterministic"
    cv: float = 0.0
    quantiles_s: FloatArray | None = None
    batch_factor: tuple[float, float, float] = (1.0, 2.2, 3.4)
    reward_accuracy: tuple[float, ...] | None = None
    expire: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    central_capacity: int = 0
    slow_at_s: float = float("inf")
    slow_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.kinds)
        if n == 0:
            raise RoutingError("kinds is empty: a service needs at least one instance")
        if self.law not in _LAWS:
            raise RoutingError(f"law = {self.law!r}: must be one of {sorted(_LAWS)}")
        if not self.requirement_s > 0.0:
            raise RoutingError(f"requirement_s = {self.requirement_s}: must be above 0")
        if self.cv < 0.0:
            raise RoutingError(f"cv = {self.cv}: must be 0 or more")
        if self.law == "empirical":
            if self.quantiles_s is None or self.quantiles_s.shape != (n, len(BATCH_SIZES), 101):
                shape = None if self.quantiles_s is None else self.quantiles_s.shape
                raise RoutingError(f"quantiles_s has shape {shape}: law 'empirical' needs ({n}, 3, 101)")
            if not np.isfinite(self.quantiles_s).all() or (self.quantiles_s <= 0.0).any():
                raise RoutingError(
                    "quantiles_s holds values that are not finite and positive: measure the profile again"
                )
        for name in ("reward_accuracy", "slow_factor"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise RoutingError(f"{name} has {len(value)} entries: one per instance, {n}, is needed")

    def with_instances(self, chosen: Sequence[int]) -> "ServiceModel":
        """The same service with these of its instances, by number; one named twice is there twice."""
        each = list(chosen)
        return replace(
            self,
            kinds=tuple(self.kinds[i] for i in each),
            quantiles_s=None if self.quantiles_s is None else self.quantiles_s[each],
            reward_accuracy=None if self.reward_accuracy is None else tuple(self.reward_accuracy[i] for i in each),
            slow_factor=None if self.slow_factor is None else tuple(self.slow_factor[i] for i in each),
        )

    def mean_batch_s(self) -> FloatArray:
        """Mean service times float64[n, 3] of batches of 1, 3 and 5."""
        if self.law == "empirical" and self.quantiles_s is not None:
            grid = self.quantiles_s
            return np.asarray((grid[:, :, 1:] + grid[:, :, :-1]).mean(axis=2) / 2.0)
        means = np.array([k.service_s for k in self.kinds])
        return np.asarray(means[:, None] * np.array(self.batch_factor)[None, :])


@dataclass(frozen=True, slots=True)
class ArrivalModel:
    """Arrivals as the simulator makes them.

    kind TRACE: `time_s` (non-decreasing) and `phase`; one environment only.
    kind MARKOVIAN: a Markovian arrival process by `d0`, `d1` (Tan 3.1.2), any number of phases.
    kind PERIODIC: Poisson arrivals whose rate steps through `rate` with fixed durations `hold_s` (Tan 5.2.3).
    """

    kind: int
    phase_names: tuple[str, ...]
    d0: FloatArray | None = None
    d1: FloatArray | None = None
    rate: FloatArray | None = None
    hold_s: FloatArray | None = None
    time_s: FloatArray | None = None
    phase: IntArray | None = None

    @property
    def phases(self) -> int:
        """Number of phases."""
        return len(self.phase_names)


def markovian(d0: ArrayLike, d1: ArrayLike, phase_names: tuple[str, ...] | None = None) -> ArrivalModel:
    """Arrivals of the Markovian arrival process (D0, D1); both float64[m, m]."""
    a, b = np.asarray(d0, dtype=np.float64), np.asarray(d1, dtype=np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape != b.shape:
        raise RoutingError(f"D0 {a.shape} and D1 {b.shape} must be square and of one shape")
    if (
        (b < 0).any()
        or ((a - np.diag(np.diag(a))) < 0).any()
        or np.abs((a + b).sum(axis=1)).max() > 1e-9 * np.abs(a).max()
    ):
        raise RoutingError("D0, D1: off-diagonal rates must not be negative and rows of D0 + D1 must sum to 0")
    names = phase_names or tuple(f"phase-{i}" for i in range(a.shape[0]))
    return ArrivalModel(MARKOVIAN, names, d0=a, d1=b)


def paper_arrivals(rate_scale: float = 1.0, time_scale: float = 1.0) -> ArrivalModel:
    """Tan's main workload, Eq. 12 with D0[2,1] = 0.002 (papers/README.md), phases bursty and normal."""
    out, back = 0.036 / time_scale, 0.002 / time_scale
    high, low = 180.0 * rate_scale, 10.0 * rate_scale
    d0 = np.array([[-high - out, out], [back, -low - back]])
    return markovian(d0, np.diag([high, low]), ("bursty", "normal"))


def periodic_arrivals() -> ArrivalModel:
    """Tan's non-Markovian workload (5.2.3): 500 s at 10 per second, then 27.8 s at 180."""
    return ArrivalModel(
        PERIODIC, ("bursty", "normal"), rate=np.array([180.0, 10.0]), hold_s=np.array([1.0 / 0.036, 500.0])
    )


def trace_arrivals(
    time_s: ArrayLike, phase: ArrayLike | None = None, phase_names: tuple[str, ...] = ("all",)
) -> ArrivalModel:
    """Arrivals at given times; an error names the first time that is missing or decreases."""
    times = np.ascontiguousarray(time_s, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0:
        raise RoutingError("time_s is empty: a trace needs at least one arrival")
    bad = np.flatnonzero(~np.isfinite(times))
    if len(bad):
        raise RoutingError(f"time_s[{bad[0]}] is missing or not finite: every arrival needs a time")
    down = np.flatnonzero(np.diff(times) < 0)
    if len(down):
        raise RoutingError(f"time_s[{down[0] + 1}] = {times[down[0] + 1]} decreases: sort the trace by time")
    phases = np.zeros(len(times), dtype=np.int64) if phase is None else np.ascontiguousarray(phase, dtype=np.int64)
    if len(phases) != len(times) or phases.min() < 0 or phases.max() >= len(phase_names):
        raise RoutingError(f"phase: one per arrival, each in 0..{len(phase_names) - 1}, is needed")
    return ArrivalModel(TRACE, phase_names, time_s=times, phase=phases)


# Columns of `System.kind`, float64[n, ...]: what an instance is.
RANK, CAPACITY, MEAN_S, SCORE, GAIN, SLOW = 0, 1, 2, 5, 6, 7  # MEAN_S: three columns, batches of 1, 3 and 5
# Columns of `State.queue`, int64[E, n, 3 + 2C]: first the scalars, then C tags, then C request numbers.
LENGTH, HEAD, SERVING, RING = 0, 1, 2, 3
# Columns of `State.times`, float64[E, n, 3 + 2C]: first the scalars, then C arrival times, then C foreseen sojourns.
STARTED_S, FINISH_S, OWN_SERVICE_S = 0, 1, 2
# Columns of `State.clock`, float64[E, 4], and of `State.marks`, int64[E, 5].
NOW_S, SINCE_S, PENDING_S, REWARD = 0, 1, 2, 3
PHASE, POSITION, REFRESHES, CENTRAL_HEAD, CENTRAL_LENGTH = 0, 1, 2, 3, 4
# Rows of `State.view_batch`.
BATCH_ADDED_S, BATCH_SERVING = 0, 1


class Settings(NamedTuple):
    """Scalars of a simulation."""

    law: int
    cv: float
    requirement_s: float
    alpha: float
    expire: bool
    batching: bool
    slow_at_s: float
    arrivals: int
    learn_rate: float  # of service times; 0: not learned
    learn_trust: bool
    refresh_s: float  # age of a gateway's view of the others' load; 0: one exact view
    bounce: bool
    choose_limits: bool  # batch limits follow `rules.largest_batch`; else they stay as they are


class System(NamedTuple):
    """Constants of a simulation, shared by its environments (n instances, m phases)."""

    set: Settings
    kind: FloatArray  # [n, 8]
    rank: IntArray  # [n]
    capacity: IntArray  # [n]
    grid_s: FloatArray  # [n, 3, 101] service time quantiles (law EMPIRICAL)
    event_rate: FloatArray  # [m] total event rate, or the Poisson rate (periodic)
    event_sums: FloatArray  # [m, 2m] cumulative: first m a move without arrival, then m with one
    hold_s: FloatArray  # [m] periodic only
    trace_s: FloatArray
    trace_phase: IntArray
    accuracy: FloatArray  # [n]
    weights: FloatArray  # of the learned rule, or empty


class State(NamedTuple):
    """Everything that changes, for E environments, n instances, C places, G gateways, Q central places.

    Few wide arrays rather than many named ones: in compiled code each array that a function is handed costs more
    than the work done on it (measured: ten times slower with one array per quantity).
    """

    random: NDArray[np.uint64]  # [E, STREAMS]
    clock: FloatArray  # [E, 4]
    marks: IntArray  # [E, 5]
    queue: IntArray  # [E, n, 3 + 2C]
    times: FloatArray  # [E, n, 3 + 2C]
    limits: IntArray  # [E, 2, ranks] minimum and maximum batch size
    tally: FloatArray  # [E, m, COUNTERS]
    view_length: IntArray  # [E, G, n] what each gateway believes
    view_clear_s: FloatArray  # [E, G, n]
    view_service_s: FloatArray  # [E, G, n]
    view_batch: FloatArray  # [E, G, 2, n], batching only: what one more request adds, and how many are in service
    trust: FloatArray  # [E, G, MARGIN_STATE], or seven for the learned rule (`per_request.py`)
    central: IntArray  # [E, Q, 2] tag and number of the requests in the central queue
    central_s: FloatArray  # [E, Q] their arrival times
    log: FloatArray  # [N, 2] instance (-1: lost) and finish time per request, or empty


def build(
    service: ServiceModel,
    arrivals: ArrivalModel,
    environments: int,
    seed: int,
    *,
    batching: bool = False,
    choose_limits: bool = False,
    gateways: int = 1,
    refresh_s: float = 0.0,
    bounce: bool = False,
    margin: float | None = None,
    learn_trust: bool = False,
    learn_rate: float = 0.0,
    log: int = 0,
    weights: FloatArray | None = None,
) -> tuple[System, State]:
    """Flat arrays for a simulation that starts empty at time 0, phases drawn from their stationary law.

    margin: where margin[0] starts (None: where a live gateway's would); learn_trust, learn_rate: whether margin and
    service times are learned online;
    gateways, refresh_s, bounce: several gateways that see each other's load up to refresh_s late, and whether the
    workers bounce; weights: of the learned rule; log: number of requests whose instance and finish are recorded (one
    environment only).
    """
    n, m = len(service.kinds), arrivals.phases
    if arrivals.kind == TRACE and environments != 1:
        raise RoutingError(f"environments = {environments}: a trace runs in one")
    if log and environments != 1:
        raise RoutingError(f"environments = {environments}: requests are logged in one only")
    accuracy = np.array([k.accuracy for k in service.kinds])
    gain = accuracy if service.reward_accuracy is None else np.array(service.reward_accuracy)
    rank = np.array([k.rank for k in service.kinds], dtype=np.int64)
    capacity = np.array([k.capacity for k in service.kinds], dtype=np.int64)
    slow = np.ones(n) if service.slow_factor is None else np.array(service.slow_factor)
    mean_s = service.mean_batch_s()
    event_rate, event_sums, hold_s = _event_tables(arrivals)
    system = System(
        set=Settings(
            law=DETERMINISTIC if service.cv == 0.0 and service.law != "empirical" else _LAWS[service.law],
            cv=float(service.cv),
            requirement_s=float(service.requirement_s),
            alpha=float(service.alpha),
            expire=service.expire,
            batching=batching,
            slow_at_s=float(service.slow_at_s),
            arrivals=arrivals.kind,
            learn_rate=float(learn_rate),
            learn_trust=learn_trust,
            refresh_s=float(refresh_s) if gateways > 1 else 0.0,
            bounce=bounce,
            choose_limits=choose_limits,
        ),
        kind=np.column_stack([rank, capacity, mean_s, accuracy, service.beta * gain, slow]),
        rank=rank,
        capacity=capacity,
        grid_s=np.zeros((n, len(BATCH_SIZES), 101)) if service.quantiles_s is None else service.quantiles_s,
        event_rate=event_rate,
        event_sums=event_sums,
        hold_s=hold_s,
        trace_s=np.zeros(0) if arrivals.time_s is None else arrivals.time_s,
        trace_phase=np.zeros(0, dtype=np.int64) if arrivals.phase is None else arrivals.phase,
        accuracy=accuracy,
        weights=np.zeros(0) if weights is None else weights,
    )
    e, g, c = environments, gateways, int(capacity.max())
    places = service.central_capacity or int(capacity.sum())
    trust = new_margin(heavy_share=float(mean_s[:, 0].max()) / service.requirement_s)
    if margin is not None:
        trust[0] = margin
    state = State(
        random=streams(seed, e),
        clock=np.zeros((e, 4)),
        marks=np.zeros((e, 5), dtype=np.int64),
        queue=np.zeros((e, n, RING + 2 * c), dtype=np.int64),
        times=np.zeros((e, n, RING + 2 * c)),
        limits=np.ones((e, 2, int(rank.max()) + 1), dtype=np.int64),
        tally=np.zeros((e, m, COUNTERS)),
        view_length=np.zeros((e, g, n), dtype=np.int64),
        view_clear_s=np.zeros((e, g, n)),
        view_service_s=np.tile(mean_s[:, 0], (e, g, 1)),
        view_batch=np.zeros((e, g, 2, n if batching else 0)),
        trust=np.tile(np.array(new_state(*trust[:2]) if weights is not None else trust), (e, g, 1)),
        central=np.zeros((e, places, 2), dtype=np.int64),
        central_s=np.zeros((e, places)),
        log=np.tile([-1.0, np.nan], (log, 1)),
    )
    state.times[:, :, FINISH_S] = np.inf
    state.times[:, :, OWN_SERVICE_S] = mean_s[:, 0]
    if batching:
        state.limits[:, 1] = 1 if choose_limits else BATCH_SIZES[-1]
        state.view_batch[:, :, BATCH_ADDED_S] = mean_s[:, 0]
    _place_phases(arrivals, state, seed)
    return system, state


def _event_tables(arrivals: ArrivalModel) -> tuple[FloatArray, FloatArray, FloatArray]:
    m = arrivals.phases
    if arrivals.kind == MARKOVIAN and arrivals.d0 is not None and arrivals.d1 is not None:
        total = -np.diag(arrivals.d0)
        moves = arrivals.d0 - np.diag(np.diag(arrivals.d0))
        sums = np.cumsum(np.hstack([moves, arrivals.d1]), axis=1) / total[:, None]
        sums[:, -1] = 1.0
        return total, sums, np.full(m, np.inf)
    if arrivals.kind == PERIODIC and arrivals.rate is not None and arrivals.hold_s is not None:
        return arrivals.rate, np.ones((m, 2 * m)), arrivals.hold_s
    return np.ones(m), np.ones((m, 2 * m)), np.full(m, np.inf)


def _place_phases(arrivals: ArrivalModel, state: State, seed: int) -> None:
    """Stationary first phases (Tan 5.1.2), and the first event of each environment."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    e = len(state.clock)
    if arrivals.kind == TRACE:
        return
    if arrivals.kind == MARKOVIAN and arrivals.d0 is not None and arrivals.d1 is not None:
        q = arrivals.d0 + arrivals.d1
        m = len(q)
        system = np.vstack([q.T, np.ones(m)])
        stationary = np.linalg.lstsq(system, np.append(np.zeros(m), 1.0), rcond=None)[0]
        state.marks[:, PHASE] = rng.choice(m, size=e, p=np.maximum(stationary, 0.0) / np.maximum(stationary, 0.0).sum())
        state.clock[:, PENDING_S] = rng.exponential(size=e) / -np.diag(arrivals.d0)[state.marks[:, PHASE]]
        return
    if arrivals.hold_s is not None and arrivals.rate is not None:
        into = rng.uniform(0.0, arrivals.hold_s.sum(), size=e)
        ends = np.cumsum(arrivals.hold_s)
        state.marks[:, PHASE] = np.searchsorted(ends, into, side="right").clip(max=len(ends) - 1)
        state.clock[:, SINCE_S] = -(into - np.concatenate([[0.0], ends[:-1]])[state.marks[:, PHASE]])
        state.clock[:, PENDING_S] = rng.exponential(size=e) / arrivals.rate[state.marks[:, PHASE]]
