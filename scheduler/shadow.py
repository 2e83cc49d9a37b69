"""A router that decides without acting: what it would have done with the live arrivals, beside the one that acts.

Both run in a `Replica` of the service's queues, fed with the number of arrivals that the workers counted, ten times a
second: a burst begins anywhere in a slot, and what it meets until the slot's end is most of what a table costs. A loop
of its own, with its own look at the workers: whatever goes wrong here costs no table.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from policies.routing.contract import InstanceKind, SlotPolicy
from policies.routing.replica import Counts, Replica
from policies.routing.rules import RULES
from protocol.board import BOARD_ERRORS, Board
from protocol.outcomes import NOT_COUNTED, VIOLATIONS, Attempt, Outcome
from protocol.records import RouterChoice, ServiceSpec, ShadowRecord, WouldBe
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer, Seen
from scheduler.slots import slot_start_s

log = logging.getLogger("scheduler.shadow")

MakePolicy = Callable[[str, Sequence[InstanceKind], ServiceSpec, float], SlotPolicy | None]
LOOK_S: Final = 0.1
"""The workers are asked what arrived so often, at least."""
AFTER_S: Final = 0.01
"""So long after a slot's start: the table of the router that acts goes first."""
_RATIOS: Final = ("goodput", "violation", "heavy")


class Understudy:
    """One router with a replica of its own; raises `ValueError` if it cannot decide for these instances."""

    def __init__(
        self, choice: RouterChoice, spec: ServiceSpec, seen: Seen, make_policy: MakePolicy, slot_s: float
    ) -> None:
        wanted = msgspec.structs.replace(spec, router=choice.router, policy_file=choice.policy_file)
        self.policy = make_policy(choice.router, seen.kinds, wanted, slot_s)
        self.slot_s = self.policy.slot_s if self.policy is not None else slot_s
        self.total = Counts()
        self.weights: dict[str, float] = {}
        self._instances = seen.instances
        self._slot, self._phase = 0, -1
        self._replica = Replica(
            seen.kinds,
            spec.requirement_ms / 1e3,
            rule=RULES[choice.router] if self.policy is None else None,
            expire=spec.expire or choice.router == "heavy-expire",
            promise=1.0 - spec.percentile,
        )
        self.decide(seen, np.random.default_rng(0))

    @property
    def slots(self) -> int:
        """Slots of this router that have passed."""
        return int(self._replica.now_s / self.slot_s + 1e-6)

    def turn(self, seen: Seen, rng: np.random.Generator) -> None:
        """Decides if a slot has ended or, for a policy that sees it, the phase has changed."""
        sees = self.policy is not None and self.policy.needs_phase
        if self.slots > self._slot or (sees and seen.observation.phase != self._phase):
            self.decide(seen, rng)

    def decide(self, seen: Seen, rng: np.random.Generator) -> None:
        """Sets the table of the coming slot from the replica's own queues."""
        self._slot, self._phase = self.slots, seen.observation.phase
        self._replica.learn(seen.kinds, seen.observation.ready.tolist())
        if self.policy is not None:
            action = self.policy.act(self._replica.observe(seen.observation.phase), rng)
            weights = self._replica.set_table(action)
            self.weights = dict(zip(self._instances, weights.tolist(), strict=True))

    def run(self, arrivals: int, seconds: float, rng: np.random.Generator) -> None:
        """The time that has just passed, under the table that stood."""
        self.total = self.total + self._replica.run(arrivals, self._replica.now_s + seconds, rng)


class Observed:
    """What the workers counted, from one look to the next. State: their last counters and how much they held."""

    def __init__(self, seen: Seen) -> None:
        self.total = Counts()
        self._last = seen.counts
        self._held = _held(seen)
        self._answered = seen.counts.keys()

    def silent(self, seen: Seen) -> bool:
        """Whether somebody who answered the last look that was taken does not answer now."""
        return not self._answered <= seen.counts.keys()

    def take(self, seen: Seen) -> int:
        """Adds what ended since the last look; gives back how many requests arrived since then.

        One that a worker bounced counts where it went next. Of a worker that did not answer nothing is known until it
        does.
        """
        accuracy = {one: kind.accuracy for one, kind in zip(seen.instances, seen.kinds, strict=True)}
        heavy = {one for one, kind in zip(seen.instances, seen.kinds, strict=True) if kind.rank == 0}
        ended = Counts()
        held, self._answered = _held(seen), seen.counts.keys()
        arrived = 0
        for one, counts in seen.counts.items():
            before, held_before = self._last.get(one, ()), self._held.get(one, 0)
            if len(before) != len(counts) or sum(counts) < sum(before):  # a worker that restarted counts from 0
                before, held_before = (0,) * len(counts), 0
            arrived += held[one] - held_before
            new = {code: counts[code] - before[code] for code in range(len(counts))}
            arrived += sum(new.values()) - new.get(Attempt.BOUNCED, 0)
            violations = sum(new[code] for code in VIOLATIONS)
            requests = sum(new[code] for code in Outcome if code not in NOT_COUNTED)
            ended = ended + Counts(
                requests=requests,
                in_time=new[Attempt.OK],
                late=new[Attempt.LATE],
                refused=violations - new[Attempt.LATE],
                heavy=requests if one in heavy else 0,
                goodput=new[Attempt.OK] * accuracy[one],
            )
        self._last, self._held = {**self._last, **seen.counts}, {**self._held, **held}
        self.total = self.total + ended
        return max(arrived, 0)


class ShadowLoop:
    """Watches for a shadow to be asked for, and keeps it at work until it is no longer, or until cancelled."""

    def __init__(
        self,
        service: str,
        board: Board,
        observer: Observer,
        make_policy: MakePolicy,
        config: SchedulerConfig,
        metrics: SchedulerMetrics,
        leading: Callable[[], bool],
    ) -> None:
        self.service = service
        self._board = board
        self._observer = observer
        self._make_policy = make_policy
        self._config = config
        self._metrics = metrics
        self._leading = leading
        self._rng = np.random.default_rng(config.seed + 1)

    async def run(self) -> None:
        """For ever; a shadow whose router, service or set of instances changes starts over."""
        try:
            while True:
                await asyncio.sleep(self._config.slot_s)
                choice, spec = self._choice(), self._spec()
                if choice is None or spec is None or not self._leading():
                    self._forget()
                    continue
                try:
                    await self._watch(choice, spec)
                except ValueError as error:
                    await self._say(ShadowRecord(choice=choice, active_router=spec.router, reason=str(error)))
                except BOARD_ERRORS:
                    continue
                except Exception as error:  # a policy may be anybody's code
                    log.exception("shadow of %s", self.service)
                    reason = f"its code failed: {error!r} (see the scheduler's log)"
                    await self._say(ShadowRecord(choice=choice, active_router=spec.router, reason=reason))
        finally:
            self._forget()

    def _choice(self) -> RouterChoice | None:
        return self._observer.shadow_choices.get(self.service)

    def _spec(self) -> ServiceSpec | None:
        deployment = self._observer.deployment
        return deployment.services.get(self.service) if deployment is not None else None

    async def _watch(self, choice: RouterChoice, spec: ServiceSpec) -> None:
        loop = asyncio.get_running_loop()
        boundary_s = slot_start_s(loop.time(), self._config.slot_s)  # slots as the router that acts has them
        await asyncio.sleep(boundary_s + AFTER_S - loop.time())
        seen = await self._observer.observe(self.service, spec)
        if not seen.instances:
            raise ValueError(f"no instance of {self.service} is known")
        instances = seen.instances
        active = RouterChoice(router=spec.router, policy_file=spec.policy_file)
        understudies = [Understudy(one, spec, seen, self._make_policy, self._config.slot_s) for one in (choice, active)]
        shadow, acting = understudies
        step_s = min(one.slot_s / math.ceil(one.slot_s / LOOK_S) for one in understudies)
        observed, said_s, ran_s = Observed(seen), boundary_s, boundary_s
        while self._choice() == choice and self._spec() == spec and self._leading():
            boundary_s = slot_start_s(max(boundary_s, loop.time()), step_s)
            await asyncio.sleep(boundary_s + AFTER_S - loop.time())
            seen = await self._observer.observe(self.service, spec)
            if seen.instances != instances:
                return
            if observed.silent(seen) and boundary_s - ran_s < self._config.slot_s:
                continue  # what arrived there, and when, the next look may tell
            arrivals = observed.take(seen)
            for one in understudies:
                await asyncio.to_thread(one.run, arrivals, boundary_s - ran_s, self._rng)
                one.turn(seen, self._rng)
            ran_s = boundary_s
            if boundary_s - said_s < self._config.slot_s - 1e-6:
                continue
            said_s = boundary_s
            await self._say(
                ShadowRecord(
                    choice=choice,
                    active_router=spec.router,
                    slots=shadow.slots,
                    weights=shadow.weights,
                    shadow=_would_be(shadow.total),
                    active=_would_be(acting.total),
                    observed=_would_be(observed.total),
                )
            )

    async def _say(self, record: ShadowRecord) -> None:
        for of, figures in (("shadow", record.shadow), ("active", record.active), ("observed", record.observed)):
            for ratio in _RATIOS:
                self._metrics.would_be.labels(self.service, of, ratio).set(getattr(figures, f"{ratio}_ratio"))
        try:
            await self._board.put_shadow(self.service, record)
        except BOARD_ERRORS as error:
            log.warning("shadow of %s: %s", self.service, error)

    def _forget(self) -> None:
        """A shadow that has ended has no figures: a dashboard would show its last ones for ever."""
        for of in ("shadow", "active", "observed"):
            for ratio in _RATIOS:
                with contextlib.suppress(KeyError):
                    self._metrics.would_be.remove(self.service, of, ratio)


def _held(seen: Seen) -> dict[str, int]:
    """Requests in each instance that answered."""
    lengths = zip(seen.instances, seen.observation.length.tolist(), strict=True)
    return {one: length for one, length in lengths if one in seen.counts}


def _would_be(total: Counts) -> WouldBe:
    return WouldBe(
        requests=total.requests,
        goodput_ratio=total.goodput_ratio,
        violation_ratio=total.violation_ratio,
        heavy_ratio=total.heavy_ratio,
    )
