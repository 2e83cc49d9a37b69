"""The comparison of placement policies: what its scores make of answers, how it drives a gateway, what it refuses."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from models.datasets.scenes import LABELS
from models.edge_scores import ClipTruth, StillTruth
from policies.placement.deployed import network_of
from policies.placement.edge_network import EdgeNetwork
from protocol.deployment import check_deployment
from protocol.records import Deployment
from tests.fakes.edge_models import bright_deployment
from tidegate import edge_compare_scores
from tidegate.edge_compare_scores import ScoresMissing, measured_detection, measured_tracking, need_scores
from tidegate.edge_compare_send import EdgeOperator, PolicyUnusable, without_memory
from tidegate.edge_compare_workload import Item
from tidegate.main import app
from tidegate.running import GatewayError


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return bright_deployment(tmp_path)


@pytest.fixture
def network(deployment: Deployment) -> EdgeNetwork:
    assert deployment.edge is not None
    return network_of(deployment.edge)


# the scores


def _answered(settings: dict[str, float], **found: Any) -> bytes:
    return msgspec.json.encode({"decision": {"configuration": {"name": "x", "settings": settings}}, **found})


def test_perfect_detections_score_one_and_none_score_nothing() -> None:
    boxes = np.array([[10.0, 20.0, 60.0, 80.0], [100.0, 50.0, 150.0, 90.0]])
    truth = StillTruth(boxes, np.array([0, 2]), np.array([3000.0, 2000.0]), np.zeros(2, np.bool_))
    item = Item(b"", "image/jpeg", truth, 0.0)
    found = [
        {"label": LABELS[label], "class": 99, "score": 0.9, "box": [left, top, right - left, bottom - top]}
        for label, (left, top, right, bottom) in zip((0, 2), boxes.tolist(), strict=True)
    ]
    perfect = measured_detection([(item, _answered({}, detections=found))])
    assert perfect is not None
    assert perfect.name == "mAP"
    assert perfect.value == pytest.approx(1.0)
    half = measured_detection([(item, _answered({}, detections=found[:1]))])
    assert half is not None
    assert half.value == pytest.approx(0.5)
    strange = [{**one, "label": "car"} for one in found]
    assert measured_detection([(item, _answered({}, detections=strange))]) is None
    empty = measured_detection([(item, _answered({}, detections=[]))])
    assert empty is not None
    assert empty.value == 0.0


def test_tracks_of_left_out_frames_are_filled_in_before_they_are_scored() -> None:
    rows = [(float(frame), 1.0, 10.0 * frame, 20.0, 30.0, 30.0, 1.0, 1.0, 1.0) for frame in range(1, 10)]
    item = Item(b"", "video/x-motion-jpeg; fps=15", ClipTruth(np.array(rows), 9), 15.0)
    tracks = [[frame, 7, 10.0 * frame, 20.0, 30.0, 30.0, 0.9, 0] for frame in (1, 4, 7)]
    score = measured_tracking([(item, _answered({"frame_rate": 5.0}, tracks=tracks))])
    # Frames 8 and 9 keep the box of frame 7, which overlaps theirs by a half (a match) and by a fifth (missed, wrong).
    assert score.name == "MOTA"
    assert score.value == pytest.approx(1.0 - 2 / 9)
    whole = [[row[0], 7, *row[2:6], 0.9, 0] for row in rows]
    assert measured_tracking([(item, _answered({}, tracks=whole))]).value == pytest.approx(1.0)
    assert measured_tracking([(item, _answered({}, tracks=[]))]).value == pytest.approx(0.0)


def test_a_missing_package_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    need_scores()
    monkeypatch.setattr(edge_compare_scores, "NEEDED", ("no_such_package",))
    with pytest.raises(ScoresMissing, match=r"no_such_package is missing.*pip install"):
        need_scores()


# the running system


def test_nodes_without_memory_are_the_same_network(
    deployment: Deployment, network: EdgeNetwork, tmp_path: Path
) -> None:
    named = bright_deployment(tmp_path, graph="eua16", preload=("small",))
    for one in (deployment, named):
        assert one.edge is not None
        graph = network_of(one.edge).graph
        empty = without_memory(one, network_of(one.edge))
        assert check_deployment(empty) == ""
        assert empty.edge is not None
        same = network_of(empty.edge).graph
        assert same.names == graph.names
        for part in ("positions", "tflops", "uplink_mbps", "links", "bandwidth_mbps", "routing_usd_per_mb"):
            np.testing.assert_array_equal(getattr(same, part), getattr(graph, part))
        assert (same.memory_mb < 1e-3).all()
        assert not any(worker.preload for worker in empty.workers)


class Scripted(EdgeOperator):
    """A gateway whose edge network is as the next of some states says, the last one for ever."""

    def __init__(self, *states: dict[str, Any] | None) -> None:
        super().__init__("http://gateway")
        self.put_policies: list[str] = []
        self._states = list(states)

    async def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        if method == "PUT":
            edge = msgspec.json.decode(body or b"", type=Deployment).edge
            assert edge is not None
            self.put_policies.append(edge.policy)
            return {}
        return {"edge": self._states.pop(0) if len(self._states) > 1 else self._states[0]}


def _edge(policy: str, by: str, reason: str = "", *, length: int = 0, ready: bool = True) -> dict[str, Any]:
    node = {"node": "a", "worker": "w-a", "ready": ready, "length": length, "deployed": [], "loading": [], "loads": 3}
    return {"policy": policy, "placing_by": by, "reason": reason, "nodes": [node], "requests": {"under_way": 0}}


def test_a_policy_is_waited_for_until_it_places_on_idle_nodes(deployment: Deployment) -> None:
    gateway = Scripted(
        _edge("sequential", "sequential"),
        _edge("sequential", "beam"),
        _edge("beam", "sequential", "beam is being loaded"),
        _edge("beam", "beam", ready=False),
        _edge("beam", "beam", length=1),
        _edge("beam", "beam"),
    )
    asyncio.run(gateway.use("beam", deployment))
    assert gateway.put_policies == ["beam"]
    assert len(gateway._states) == 1
    asyncio.run(Scripted(_edge("exact", "exact-30ms")).use("exact", deployment))


def test_a_policy_that_cannot_place_is_told_with_the_schedulers_reason(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.edge_compare_send.REASON_PATIENCE_S", 0.0)
    with pytest.raises(PolicyUnusable, match="trained on another layout"):
        asyncio.run(Scripted(_edge("hisper", "sequential", "trained on another layout")).use("hisper", deployment))


def test_a_gateway_without_an_edge_network_is_told() -> None:
    with pytest.raises(GatewayError, match="serves no edge network"):
        asyncio.run(Scripted(None).edge())


# the command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policies", "baem"], "did you mean"),
        (["--policies", ","], "none given"),
        (["127.0.0.1:1", "--policies", "beam"], "no gateway answers"),
        (["-f", "nowhere.toml", "--policies", "beam"], "nowhere.toml"),
        (["--report", "/nowhere/x.html"], "/nowhere"),
        (["--requests", "0"], "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["edge", "compare", *arguments])
    assert done.exit_code in (1, 2)
    assert says in " ".join((done.output + done.stderr).split())
