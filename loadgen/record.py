"""What one run left behind: one row per request, in columns. Scores and reports are computed from this alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadgen.answers import ANSWERED, NOT_COUNTED, UNKNOWN, Answer, Outcome


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The requests of one run, all columns as long as the number sent; times in seconds since its start.

    intended_s: when the trace wanted each request sent; sent_s: when it was; done_s: when its answer was read
    or given up. outcome: int8 of `Outcome`. correct: 1, 0 or UNKNOWN. rank: of the variant that answered (0 =
    heaviest) or UNKNOWN. variant, instance: indices into `variants` and `instances`, or UNKNOWN. service_s: what
    the service says that computing took, or NaN. planned: how many requests the trace holds up to end_s; more
    than were sent when the run was interrupted.
    """

    intended_s: NDArray[np.float64]
    sent_s: NDArray[np.float64]
    done_s: NDArray[np.float64]
    outcome: NDArray[np.int8]
    correct: NDArray[np.int8]
    rank: NDArray[np.int8]
    variant: NDArray[np.int16]
    instance: NDArray[np.int16]
    service_s: NDArray[np.float64]
    variants: tuple[str, ...]
    instances: tuple[str, ...]
    phase: NDArray[np.int16] | None
    phase_names: tuple[str, ...]
    end_s: float
    planned: int
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.intended_s)

    @property
    def latency_s(self) -> NDArray[np.float64]:
        """Seconds from the intended send time to the end of the answer; a late sender hides nothing."""
        return self.done_s - self.intended_s

    @property
    def sending_lag_s(self) -> NDArray[np.float64]:
        """Seconds by which each request left later than intended."""
        return self.sent_s - self.intended_s

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Where predictions came back, in time or late."""
        return np.isin(self.outcome, ANSWERED)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Where the request stands in the denominator of ratios."""
        return ~np.isin(self.outcome, NOT_COUNTED)


class Recorder:
    """Fills the columns while a run is under way; `finish` cuts them to what was sent."""

    def __init__(self, intended_s: NDArray[np.float64]) -> None:
        count = len(intended_s)
        self._intended_s = intended_s
        self._sent_s = np.full(count, np.nan)
        self._done_s = np.full(count, np.nan)
        self._outcome = np.full(count, Outcome.CANCELLED, dtype=np.int8)
        self._correct = np.full(count, UNKNOWN, dtype=np.int8)
        self._rank = np.full(count, UNKNOWN, dtype=np.int8)
        self._variant = np.full(count, UNKNOWN, dtype=np.int16)
        self._instance = np.full(count, UNKNOWN, dtype=np.int16)
        self._service_s = np.full(count, np.nan)
        self._variants: dict[str, int] = {}
        self._instances: dict[str, int] = {}
        self.sent = 0
        self.counts = dict.fromkeys(Outcome, 0)

    def start(self, request: int, now_s: float) -> None:
        """Note that a request leaves now; requests start in order."""
        self._sent_s[request] = now_s
        self.sent = request + 1

    def end(self, request: int, now_s: float, answer: Answer) -> None:
        """Note how a request ended, once."""
        self._done_s[request] = now_s
        self._outcome[request] = answer.outcome
        self._correct[request] = answer.correct
        self._rank[request] = answer.rank
        self._service_s[request] = answer.service_s
        if answer.variant:
            self._variant[request] = self._variants.setdefault(answer.variant, len(self._variants))
        if answer.instance:
            self._instance[request] = self._instances.setdefault(answer.instance, len(self._instances))
        self.counts[answer.outcome] += 1

    def finish(
        self,
        phase: NDArray[np.int16] | None,
        phase_names: tuple[str, ...],
        end_s: float,
        interrupted: bool,
    ) -> RunRecord:
        """Return the record of all requests that were sent; end_s: where the run ended."""
        sent = slice(0, self.sent)
        return RunRecord(
            intended_s=self._intended_s[sent],
            sent_s=self._sent_s[sent],
            done_s=self._done_s[sent],
            outcome=self._outcome[sent],
            correct=self._correct[sent],
            rank=self._rank[sent],
            variant=self._variant[sent],
            instance=self._instance[sent],
            service_s=self._service_s[sent],
            variants=tuple(self._variants),
            instances=tuple(self._instances),
            phase=None if phase is None else phase[sent],
            phase_names=phase_names,
            end_s=end_s,
            planned=len(self._intended_s),
            interrupted=interrupted,
        )
