"""How fast a training run goes: environment steps, updates and samples per second."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """A run's counts when its training loop began; what came before (prefill, warm-up) is not counted.

    An update is one gradient step on a minibatch; of HISPER's, the critics' (see each trainer). Samples are the slots
    of all these minibatches. Evaluations count as time spent, since a run cannot do without them.
    """

    began_s: float  # processor seconds
    step: int = 0
    updates: int = 0
    samples: int = 0

    def rates(self, now_s: float, step: int, updates: int, samples: int) -> dict[str, float]:
        """`steps_per_s`, `updates_per_s` and `samples_per_s` since the loop began; 0 before any time has passed."""
        spent_s = now_s - self.began_s
        done = {"steps": step - self.step, "updates": updates - self.updates, "samples": samples - self.samples}
        return {f"{what}_per_s": count / spent_s if spent_s > 0 else 0.0 for what, count in done.items()}
