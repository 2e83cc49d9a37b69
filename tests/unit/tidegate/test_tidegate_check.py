"""What an edge deployment names is looked up before anything starts."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.edge_catalog import EdgeVariant, load_edge_catalog
from protocol.deployment import DeploymentError, read_deployment
from protocol.edge_records import EdgeServiceSpec
from tests.fakes.edge_system import edge_catalog, edge_file
from tidegate import check


@pytest.fixture(autouse=True)
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog has what the tables name; `large` may be taken out."""
    monkeypatch.setattr(check, "load_edge_catalog", edge_catalog)


@pytest.mark.parametrize("name", ["edge4", "edge16"])
def test_the_shipped_deployments_are_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "load_edge_catalog", load_edge_catalog)
    check.refuse_unknown(read_deployment(Path(__file__).parents[3] / "deploy" / f"{name}.toml"))


def test_what_exists_is_accepted(tmp_path: Path) -> None:
    check.refuse_unknown(edge_file(tmp_path))
    check.refuse_unknown(edge_file(tmp_path, policy="/a/path/to/mine"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": "beem"}, "edge.policy = 'beem': must be one of"),
        ({"policy": "beem"}, "did you mean 'beam'?"),
        (
            {"services": {"detection": EdgeServiceSpec(table="detektion")}},
            "table = 'detektion': no such table; shipped are",
        ),
        ({"nodes": (), "links": (), "graph": "eua17"}, "graph 'eua17' is unknown"),
        ({"nodes": (), "links": (), "graph": "eua16"}, "workers 'w-a': node = 'a': the graph has"),
        (
            {"services": {"detection": EdgeServiceSpec(table="detection")}},
            "edge.services.detection: the table's variant 'r50_fpn_fp16' is not in the catalog",
        ),
    ],
)
def test_what_does_not_exist_is_named(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DeploymentError) as caught:
        check.refuse_unknown(edge_file(tmp_path, **settings))
    assert says in str(caught.value)


def test_a_variant_without_a_network_is_told_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_file(folders: tuple[Path, ...] = ()) -> dict[str, EdgeVariant]:
        known = edge_catalog(folders)
        return known | {"large": msgspec.structs.replace(known["large"], path="")}

    monkeypatch.setattr(check, "load_edge_catalog", without_file)
    with pytest.raises(DeploymentError, match=r"'large'.*has no network file: `tidegate models export large"):
        check.refuse_unknown(edge_file(tmp_path))


def test_a_preload_that_no_table_has_is_named(tmp_path: Path) -> None:
    file = edge_file(tmp_path)
    first, *others = file.workers
    workers = (msgspec.structs.replace(first, preload=("lage",)), *others)
    with pytest.raises(DeploymentError, match=r"workers 'w-a': preload 'lage'.*did you mean 'large'"):
        check.refuse_unknown(msgspec.structs.replace(file, workers=workers))
