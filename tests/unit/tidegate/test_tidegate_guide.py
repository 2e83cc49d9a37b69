"""docs/guide.md knows every key that a deployment file may have, with its default; README's example shows bursts."""

import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest

from loadgen.figures import burst_spans
from loadgen.traces import parse_workload
from protocol import deployment
from protocol.edge_records import EdgeLinkSpec, EdgeNodeSpec, EdgeServiceSpec, EdgeSpec, Emulation
from protocol.records import InstanceSpec, ServiceSpec, WorkerSpec

ROOT = Path(__file__).parents[3]
TABLES: dict[str, type[msgspec.Struct]] = {
    "The file": deployment.DeploymentFile,
    "`[services.NAME]`": ServiceSpec,
    "`[[workers]]`": WorkerSpec,
    "`instances = [{ ... }]` of a worker": InstanceSpec,
    "`[edge]`": EdgeSpec,
    "`[edge.services.NAME]`": EdgeServiceSpec,
    "`[[edge.nodes]]`": EdgeNodeSpec,
    "`[[edge.links]]`": EdgeLinkSpec,
    "`[edge.emulate]`": Emulation,
    "`[gateway]`": deployment.GatewaySettings,
    "`[scheduler]`": deployment.SchedulerSettings,
}


def documented(title: str) -> dict[str, str]:
    """Keys and defaults of one table of the guide, as written there."""
    _, _, rest = (ROOT / "docs" / "guide.md").read_text().partition(f"\n**{title}**\n")
    rows = rest.split("\n**")[0].split("\n## ")[0].splitlines()
    return {found[1]: found[2] for row in rows if (found := re.match(r"\| `(\w+)` \| (.*?) \|", row))}


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "needed"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{json.dumps(field.default_factory())}`"
    if field.default is None:
        return "none"
    if isinstance(field.default, msgspec.Struct):
        return "see below"
    return f"`{json.dumps(field.default)}`"


@pytest.mark.parametrize("title", TABLES)
def test_every_key_is_documented_with_its_default(title: str) -> None:
    there = {field.name: default_of(field) for field in msgspec.structs.fields(TABLES[title])}
    assert documented(title) == there


def test_no_table_of_the_file_is_missing() -> None:
    assert set(TABLES.values()) == set(deployment._TABLES.values())
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert all(f'"{device}"' in guide for device in ("cpu", "cuda", "tensorrt", "cuda:1"))


def test_the_example_of_the_guide_can_be_read(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    example = re.findall(r"^```toml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "x.toml").write_text(example)
    assert deployment.read_deployment(tmp_path / "x.toml").services["digits"].router == "deadline"


def test_readmes_comparison_has_bursts() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if "tidegate compare" in line)
    words = shlex.split(command)
    given = dict(zip(words[2::2], words[3::2], strict=True))
    trace = parse_workload(
        given["--workload"],
        seed=int(given["--seed"]),
        duration_s=float(given["--duration-s"]),
        rate_scale=float(given["--rate-scale"]),
        time_scale=float(given["--time-scale"]),
    )
    spans = burst_spans(trace.arrivals)
    assert len(spans) == 2, "as the text below it says"
    assert sum(end - start for start, end in spans) > 2.0
