"""What became of edge requests, by service and decided node: accuracy, emulated delay, cost, and failures.

Outcomes and latencies as clients saw them are counted with everybody's (`metrics.py`); here is what the paper compares
policies by. Sums since start: a mean is a sum over `answers`.
"""

from typing import Final

import msgspec

from gateway.edge_answer import Account
from gateway.edge_request import EdgeAnswered, EdgeRequest, Ending
from protocol.outcomes import NOT_COUNTED, Outcome

NOWHERE: Final = "none"
"""The node of a request that was never placed."""
DELAYS: Final = ("access", "transmission", "queue", "compute")
COSTS: Final = ("routing", "memory", "compute")


class EdgeMeans(msgspec.Struct, frozen=True):
    """Of one service at one node: answers, failures (violations without an answer), and means over the answers."""

    answers: int
    failures: int
    failure_ratio: float
    accuracy: float
    delay_s: float
    cost_usd: float


class NodeCounts:
    """Of one service at one node."""

    __slots__ = ("accuracy", "answers", "cost_usd", "delay_s", "failures")

    def __init__(self) -> None:
        self.answers = 0
        self.failures = 0
        self.accuracy = 0.0
        self.delay_s = [0.0] * len(DELAYS)
        self.cost_usd = [0.0] * len(COSTS)

    def means(self) -> EdgeMeans:
        """For people."""
        ended, each = self.answers + self.failures, max(1, self.answers)
        return EdgeMeans(
            answers=self.answers,
            failures=self.failures,
            failure_ratio=self.failures / ended if ended else 0.0,
            accuracy=self.accuracy / each,
            delay_s=sum(self.delay_s) / each,
            cost_usd=sum(self.cost_usd) / each,
        )


class EdgeMetrics:
    """Counts every edge request that was admitted once. Labels are bounded: the deployment's services and nodes."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], NodeCounts] = {}

    def count(self, request: EdgeRequest, outcome: Outcome, end: Ending, account: Account | None) -> None:
        """One request has ended; with an `account` if it was answered."""
        choice = request.choice
        node = request.net.network.graph.names[choice.placement.node] if choice is not None else NOWHERE
        counts = self.counts.setdefault((request.service, node), NodeCounts())
        if account is None or not isinstance(end, EdgeAnswered):
            if outcome not in NOT_COUNTED:
                counts.failures += 1
            return
        spent = end.reply.spent
        counts.answers += 1
        counts.accuracy += account.accuracy
        emulated_s = (
            spent.emulated_access_s,
            spent.emulated_transmission_s,
            spent.emulated_queue_s,
            spent.emulated_compute_s,
        )
        for part, seconds in enumerate(emulated_s):
            counts.delay_s[part] += seconds
        for part, usd in enumerate((account.routing_usd, account.memory_usd, account.compute_usd)):
            counts.cost_usd[part] += usd

    def means(self) -> dict[str, dict[str, EdgeMeans]]:
        """By service and node."""
        found: dict[str, dict[str, EdgeMeans]] = {}
        for (service, node), counts in sorted(self.counts.items()):
            found.setdefault(service, {})[node] = counts.means()
        return found
