"""The routing commands: what they refuse and how they say so, and deployments as the simulator sees them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models.catalog import Accuracy
from models.profiles import Profile, service_times, write_profiles
from policies.routing.contract import RoutingError
from policies.routing.presets import PAPER_KINDS
from protocol.deployment import read_deployment
from tidegate.deployed_service import deployed_service
from tidegate.main import app
from tidegate.routing_sim_equals_live import PAPER_T4

DIGITS = PAPER_T4.parent / "digits.toml"
NOBODY = "http://127.0.0.1:9"


def says(*arguments: str) -> str:
    """What a command that fails says, on one line."""
    result = CliRunner().invoke(app, ["routing", *arguments])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("time_s\n0.5\n0.1\n", "line 3"),
        ("time_s,phase\n0.5,calm\n,calm\n", "line 3"),
        ("time_s\n0.5\nsoon\n", "soon"),
        ("time_s\n0.5\nnan\n", "nan"),
        ("time_s\n", ""),
        ("when\n1\n", "when"),
    ],
)
def test_a_bad_trace_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    for command in (["evaluate", "--policy", "deadline"], ["advise"], ["limit"]):
        said = says(*command, "--workload", str(file))
        assert "error:" in said
        assert named in said


def test_an_unknown_workload_or_router_is_named() -> None:
    assert "'nothing' is no workload" in says("evaluate", "--policy", "deadline", "--workload", "nothing")
    assert "rotuer" in says("evaluate", "--policy", "rotuer", "--slots", "100")


def test_services_of_other_sizes_are_scored() -> None:
    arguments = ["routing", "evaluate", "--slots", "600", "--policy", "threshold,infaas", "--json"]
    scored = {}
    for size in ("2x2", "3x4"):
        result = CliRunner().invoke(app, [*arguments, "--size", size])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["size"] == size
        scored[size] = {name: one["overall"] for name, one in found["results"].items()}
    assert set(scored["3x4"]) == {"threshold", "infaas"}
    assert scored["3x4"]["infaas"]["requests"] > 1.5 * scored["2x2"]["infaas"]["requests"]
    assert "write 2xN" in says("evaluate", "--size", "many")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"times": []}, "times"),
        ({"times": [{"batch_size": 1, "samples": 0, "quantiles_s": [0.01] * 101}]}, "samples"),
        ({"times": [{"batch_size": 1, "samples": 9, "quantiles_s": [0.01] * 100}]}, "quantiles_s"),
        ({"times": [{"batch_size": 1, "samples": 9, "quantiles_s": [0.01] * 100 + [0.001]}]}, "quantiles_s"),
        ({"accuracy": {"source": "none"}}, "accuracy"),
    ],
)
def test_a_bad_profile_is_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    file = tmp_path / "profiles.json"
    good = Profile(
        variant="digits_heavy",
        device="cpu",
        source="measured",
        accuracy=Accuracy(value=0.9, source="measured"),
        times=(service_times(1, [0.01, 0.02]),),
    )
    write_profiles(file, [good])
    content = json.loads(file.read_text())
    content["profiles"][0] |= change
    file.write_text(json.dumps(content))
    said = says("advise", "--profile", str(file), "--instances", "digits_heavy=1", "--slots", "100")
    assert "digits_heavy" in said or file.name in said.replace(" ", "")  # wrapped
    assert named in said


def test_what_a_deployment_lacks_is_named(tmp_path: Path) -> None:
    assert "tidegate models profile digits_heavy digits_light" in says("advise", "-f", str(DIGITS))
    assert "cannot be read" in says("advise", "-f", str(tmp_path / "nothing.toml"))
    assert "gpu0/pnasnet5large_t4" in says("learn", "-f", str(PAPER_T4), "--without", "x", "--out", str(tmp_path))
    assert "minutes = 0" in says("learn", "-f", str(PAPER_T4), "--minutes", "0", "--out", str(tmp_path))


def test_a_gateway_that_does_not_answer_is_named(tmp_path: Path) -> None:
    for arguments in (
        ["use", "deadline", "--url", NOBODY],
        ["shadow", "deadline", "--url", NOBODY],
        ["rollback", "--url", NOBODY],
        ["learn", "--from", NOBODY, "--out", str(tmp_path)],
    ):
        assert f"no gateway answers at {NOBODY}" in says(*arguments)


def test_the_papers_deployment_is_the_papers_service() -> None:
    service = deployed_service(read_deployment(PAPER_T4))
    assert service.kinds == PAPER_KINDS
    assert service.requirement_s == 0.3
    assert not service.expire
    assert service.quantiles_s is not None
    assert np.ptp(service.quantiles_s[:, 0], axis=1) == pytest.approx(0.0)
    # 0.4 + 0.6 b, as the catalog and the paper's presets have it.
    assert service.quantiles_s[0, :, 0] == pytest.approx([0.043, 0.043 * 2.2, 0.043 * 3.4])


def test_instances_can_be_left_out() -> None:
    file = read_deployment(PAPER_T4)
    left = deployed_service(file, without=["gpu1/pnasnet5large_t4"])
    assert left.kinds == PAPER_KINDS[1:]
    with pytest.raises(RoutingError, match="without = 'gpu9/x'"):
        deployed_service(file, without=["gpu9/x"])
