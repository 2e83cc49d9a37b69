"""Fig. 3 of Tan: goodput and violations when the required latency varies (workload and instances are the paper's)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from policies.routing.artifact import PRETRAINED
from policies.routing.contract import RoutingError
from policies.routing.evaluate import LEARNED, evaluate, trained
from policies.routing.presets import paper_service
from policies.routing.queueing_model import paper_arrivals
from policies.routing.scores import Scores

SWEPT_MS = (150, 225, 300, 375, 450)
"""Required latencies; the paper goes from 150 to 450 ms in steps of 25."""
SWEPT = ("learned-po", "learned-fo", "stationary", "threshold", "light-only", "single-queue", "deadline")
"""The paper's three (learned-po, learned-fo, stationary), then others for comparison."""


@dataclass(frozen=True, slots=True)
class Point:
    """One router at one required latency: scores 50:50 and per phase, by name."""

    router: str
    requirement_ms: int
    scores: dict[str, Scores]


def _path(router: str, requirement_ms: int) -> Path:
    if requirement_ms == 300:
        return PRETRAINED / f"routing-{router}.json"
    return PRETRAINED / "latency" / f"{router}-{requirement_ms}.json"


def artifact_for(router: str, requirement_ms: int) -> Path:
    """The trained policy for a required latency; an error says how to train one."""
    path = _path(router, requirement_ms)
    if not path.exists():
        raise RoutingError(
            f"{path} does not exist: no {router} was trained for {requirement_ms} ms; train it with python -m "
            f"policies.routing.train --policy {router} --requirement-ms {requirement_ms} "
            f"--start policies/pretrained/routing-{router}.json --slots 3000000 --out FOLDER"
        )
    return path


def sweep(
    routers: Sequence[str],
    latencies_ms: Sequence[int],
    *,
    slots: int,
    seed: int,
    progress: Callable[[str, float], None] | None = None,
) -> list[Point]:
    """Every router at every required latency, on the same arrivals; progress(what, share done).

    A learned router is left out where none was trained, if it was somewhere; an error says how to train one otherwise.
    """
    found: list[Point] = []
    for router in routers:
        if router in LEARNED and not any(_path(router, ms).exists() for ms in latencies_ms):
            artifact_for(router, latencies_ms[0])
    for router in routers:
        for requirement_ms in latencies_ms:
            if progress is not None:
                progress(f"{router}, {requirement_ms} ms", len(found) / (len(routers) * len(latencies_ms)))
            if router in LEARNED and not _path(router, requirement_ms).exists():
                continue
            policy = None
            if router in LEARNED:
                policy = trained(router, artifact_for(router, requirement_ms), paper_service().kinds)
            result = evaluate(
                router, paper_service(requirement_ms / 1000.0), paper_arrivals(), slots=slots, seed=seed, policy=policy
            )
            found.append(Point(router, requirement_ms, result.scores))
    return found
