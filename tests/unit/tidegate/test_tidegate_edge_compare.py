"""The comparison of placement policies: its workload, and its figures by hand."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gateway.edge_answer import (
    ConfigurationView,
    CostView,
    DecisionView,
    DelayView,
    EdgeAnswer,
    ObservedView,
    RealDelay,
)
from models.edge_scores import ClipTruth, StillTruth
from policies.placement.deployed import network_of
from policies.placement.edge_network import EdgeNetwork
from protocol.edge_records import Emulation
from protocol.records import Deployment
from tests.fakes.edge_models import bright_deployment
from tidegate.edge_compare_figures import PolicyFigures, largest_difference, not_comparable, policy_figures
from tidegate.edge_compare_report import print_figures, write_page
from tidegate.edge_compare_send import Sent
from tidegate.edge_compare_workload import (
    REHEARSAL_S,
    Arrival,
    EdgeWorkload,
    Item,
    WorkloadError,
    draw_arrivals,
    kinds_of,
    render_workload,
)

ADAPTED_MB, WAITING_TFLOP = 0.3, 0.2


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    """Three nodes in a row, 1 TFLOPS, 100 Mbps everywhere; "small" needs 0.01 tera-operations a pass, 2 passes."""
    return bright_deployment(tmp_path)


@pytest.fixture
def network(deployment: Deployment) -> EdgeNetwork:
    assert deployment.edge is not None
    return network_of(deployment.edge)


# the workload


def test_windows_hold_so_many_of_each_service_and_a_seed_says_all(network: EdgeNetwork) -> None:
    drawn = draw_arrivals(network, 30, 4, 2.0, 0.1, seed=5)
    assert drawn == draw_arrivals(network, 30, 4, 2.0, 0.1, seed=5)
    assert drawn != draw_arrivals(network, 30, 4, 2.0, 0.1, seed=6)
    assert len(drawn) == 30
    times_s = [one.time_s for one in drawn]
    assert times_s == sorted(times_s)
    windows = [[one for one in drawn if n * 2.0 <= one.time_s < n * 2.0 + 2.0] for n in range(4)]
    assert [len(window) for window in windows] == [8, 8, 8, 6]
    for window in windows[:3]:
        assert Counter(one.service for one in window) == {"detection": 4, "tracking": 4}
        assert window[-1].time_s - window[0].time_s < 0.1
    for service in ("detection", "tracking"):
        mine = [one for one in drawn if one.service == service]
        assert [one.item for one in mine] == list(range(len(mine)))
    assert {one.node for one in drawn} == {0, 1, 2}
    assert {one.deadline_s for one in drawn} == {1.0, 2.0}


@pytest.mark.parametrize(("requests", "every_s", "says"), [(0, 1.0, "--requests 0"), (5, 0.0, "--every-s 0")])
def test_a_workload_of_nothing_is_refused(network: EdgeNetwork, requests: int, every_s: float, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        draw_arrivals(network, requests, 4, every_s, 0.1, seed=0)


def test_scenes_are_rendered_as_cameras_send_them(network: EdgeNetwork) -> None:
    arrivals = (Arrival(0.0, "detection", 0, 1.0, 0), Arrival(0.1, "tracking", 1, 1.0, 0))
    steps: list[int] = []
    workload = render_workload(arrivals, kinds_of(network, {}), 3, steps.append)
    assert steps == [1, 2]
    image, clip = workload.item(0), workload.item(1)
    assert (image.content_type, clip.content_type) == ("image/jpeg", "video/x-motion-jpeg; fps=15")
    assert image.body[:3] == b"\xff\xd8\xff"
    assert clip.body.count(b"\xff\xd8\xff") >= 45
    assert isinstance(clip.truth, ClipTruth)
    assert clip.truth.frame_count == 45
    again = render_workload(arrivals[:1], {"detection": "detection"}, 3, steps.append)
    assert again.item(0).body == image.body
    other = render_workload(arrivals[:1], {"detection": "detection"}, 4, steps.append)
    assert other.item(0).body != image.body


def test_a_rehearsal_has_the_first_requests_and_time(network: EdgeNetwork) -> None:
    workload = EdgeWorkload(draw_arrivals(network, 12, 4, 1.0, 0.1, 0), {}, {}, "")
    rehearsed = workload.rehearsal(5).arrivals
    assert [one.time_s for one in rehearsed] == [one.time_s for one in workload.arrivals[:5]]
    assert {one.deadline_s for one in rehearsed} == {REHEARSAL_S}


# the figures, by hand


def _told(network: EdgeNetwork, node: str = "c", *, late: bool = False, **changed: Any) -> EdgeAnswer:
    """An answer of "small" at `node`, entered at a; figures by hand from Eqs. 3 to 5 and 8 to 10."""
    hops = {"a": 0, "b": 1, "c": 2}[node]
    megabits = 8 * ADAPTED_MB
    per_mb = 0.016 / 1024
    cost = CostView(
        routing=megabits * 0.002 * hops,
        memory=per_mb * 100.0,
        compute=0.0003 * 0.01 / 1.0 + per_mb * ADAPTED_MB,
        total=0.0,
    )
    access_s, links_s, queue_s, compute_s = megabits / 100, hops * megabits / 100, WAITING_TFLOP / 1.0, 2 * 0.01 / 1.0
    real = RealDelay(0.05, 0.01, 0.002, 0.003, 0.001, 0.2, 0.0, 0.1, 0.9)
    told = EdgeAnswer(
        request_id="x",
        service="detection",
        outcome="LATE" if late else "OK",
        decision=DecisionView(
            ConfigurationView("whole", {"resolution": 1.0}), "small", node, "a", "beam", "scheduler", False, 0.25, 0.006
        ),
        delay_s=DelayView(
            access_s, links_s, queue_s, compute_s, access_s + links_s + queue_s + compute_s, 0.01, 0.02, real
        ),
        cost_usd=msgspec.structs.replace(cost, total=cost.routing + cost.memory + cost.compute),
        expected_accuracy=0.5,
        observed=ObservedView(ADAPTED_MB, WAITING_TFLOP, True),
        emulated=True,
    )
    return msgspec.structs.replace(told, **changed)


def _sent(number: int, told: EdgeAnswer, lag_s: float = 0.0) -> Sent:
    return Sent(number, lag_s, told.outcome, msgspec.json.encode(told))


@pytest.fixture
def workload() -> EdgeWorkload:
    """Three images in which nothing is."""
    nothing = StillTruth(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_))
    item = Item(b"", "image/jpeg", nothing, 0.0)
    arrivals = tuple(Arrival(float(n), "detection", 0, 1.0, n) for n in range(3))
    return EdgeWorkload(arrivals, {"detection": "detection"}, {"detection": (item,) * 3}, "three")


def test_rewards_delays_and_costs_are_huangs(network: EdgeNetwork, workload: EdgeWorkload) -> None:
    near, far = _told(network, "a"), _told(network, "c")
    sent = [_sent(0, near), _sent(1, far, lag_s=0.02), Sent(2, 0.0, "EXPIRED", b"", "no node can be in time")]
    figures = policy_figures("beam", sent, workload, network, Emulation(), 2)
    delays = [0.024 + 0.2 + 0.02, 3 * 0.024 + 0.2 + 0.02]
    costs = [near.cost_usd.total, far.cost_usd.total]
    assert costs[1] - costs[0] == pytest.approx(2 * 8 * 0.3 * 0.002)
    # Accuracies of the table are 0.5 and 0.4: "whole" stands at the top of Eq. 19's scale.
    assert figures.reward == pytest.approx(2 * 1.0 - 100.0 - sum(delays) - sum(costs))
    assert figures.predicted_reward == pytest.approx(2 * 1.0 - 100.0 - 2 * 0.25 - 2 * 0.006)
    assert figures.delay_s == pytest.approx(np.mean(delays))
    assert figures.cost_usd == pytest.approx(np.mean(costs))
    assert (figures.accuracy, figures.requests, figures.answered) == (0.5, 3, 2)
    assert figures.failure_ratio == pytest.approx(1 / 3)
    assert figures.failures == {"EXPIRED: no node can be in time": 1}
    assert figures.link_queue_s == pytest.approx(0.03)
    assert figures.nodes == {"a": 1, "c": 1}
    assert figures.decided_by == {"beam in the scheduler": 2}
    assert figures.beside_s["load"].mean == pytest.approx(0.2)
    assert (figures.loads, figures.most_lag_s) == (2, 0.02)
    assert figures.services["detection"].failure_ratio == pytest.approx(1 / 3)


def test_late_answers_are_failures_and_are_still_held_against_the_environment(
    network: EdgeNetwork, workload: EdgeWorkload
) -> None:
    late = _told(network, late=True)
    wrong = msgspec.structs.replace(late, delay_s=msgspec.structs.replace(late.delay_s, queue=0.3))
    figures = policy_figures("beam", [_sent(0, wrong)], workload, network, Emulation(), 0)
    assert (figures.answered, figures.reward, figures.accuracy) == (0, -100.0, None)
    assert figures.failures == {"LATE": 1}
    assert figures.difference.delay_s == pytest.approx(0.1)


def test_the_largest_difference_sees_every_figure_that_is_emulated(network: EdgeNetwork) -> None:
    told = _told(network, "b")
    found = largest_difference([told], network, Emulation())
    assert max(found.delay_s, found.cost_usd, found.accuracy) < 1e-12
    for part in ("access", "transmission", "queue", "compute"):
        wrong = msgspec.structs.replace(told.delay_s, **{part: getattr(told.delay_s, part) + 1e-3})
        found = largest_difference([told, _told(network, "b", delay_s=wrong)], network, Emulation())
        assert found.delay_s == pytest.approx(1e-3)
    for part in ("routing", "memory", "compute"):
        dearer = msgspec.structs.replace(told.cost_usd, **{part: getattr(told.cost_usd, part) + 1e-4})
        assert largest_difference(
            [_told(network, "b", cost_usd=dearer)], network, Emulation()
        ).cost_usd == pytest.approx(1e-4)
    real = msgspec.structs.replace(told.delay_s, access=0.0, transmission=0.0, queue=0.0, compute=0.0)
    nothing = Emulation(uplink=False, links=False, compute="real")
    assert largest_difference([_told(network, "b", delay_s=real)], network, nothing).delay_s == 0.0


def test_without_emulated_computing_the_real_one_counts(network: EdgeNetwork, workload: EdgeWorkload) -> None:
    told = _told(network, "a")
    real = policy_figures("beam", [_sent(0, told)], workload, network, Emulation(compute="real"), 0)
    assert real.delay_s == pytest.approx(told.delay_s.total + 0.1)


def _with(figures: PolicyFigures, **changed: Any) -> PolicyFigures:
    return msgspec.structs.replace(figures, **changed)


def test_what_makes_runs_not_comparable(network: EdgeNetwork, workload: EdgeWorkload) -> None:
    sent = [_sent(n, _told(network)) for n in range(3)]
    good = policy_figures("beam", sent, workload, network, Emulation(), 0)
    assert not_comparable([good, good]) == ""
    assert "beam 10.0%" in not_comparable([good, _with(good, late_sent_ratio=0.1)])
    assert "interrupted" in not_comparable([good, policy_figures("x", sent[:2], workload, network, Emulation(), 0)])
    by_gateway = _with(good, decided_by={"beam in the scheduler": 1, "sequential in the gateway": 2}, second_choices=1)
    assert "beam 33% of the answers" in not_comparable([by_gateway])
    assert not_comparable([_with(by_gateway, second_choices=2)]) == ""


def test_the_page_and_the_table_tell_figures_reasons_and_the_warning(
    network: EdgeNetwork, workload: EdgeWorkload, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = [_sent(0, _told(network)), Sent(1, 0.0, "EXPIRED", b"", "too <late>")]
    figures = [policy_figures("beam", sent, workload, network, Emulation(), 0)]
    print_figures(figures, "title", "not comparable: because")
    shown = capsys.readouterr().out
    assert "50.0%" in shown
    assert "1 × EXPIRED: too <late>" in shown
    assert "not comparable: because" in shown
    page = tmp_path / "page.html"
    write_page(page, figures, "title", {"Deployment": "edge"}, "not comparable: because")
    text = page.read_text()
    assert "too &lt;late&gt;" in text
    assert "class=warning" in text
    assert text.count("Plotly.newPlot(") >= 5
