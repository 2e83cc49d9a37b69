"""A trained routing policy on disk: `NAME.safetensors` (the actor) beside `NAME.json` (what it is and how it came).

Never pickle. Loading checks everything that serving relies on, so that a wrong artifact fails at load, by name.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from policies.routing.contract import RoutingError
from policies.routing.features import Layout

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"


def write_artifact(
    folder: Path,
    name: str,
    layout: Layout,
    tensors: dict[str, NDArray[np.float32]],
    *,
    slot_s: float,
    workload: str,
    training: dict[str, Any],
) -> Path:
    """Write both files into `folder`; returns the path of the JSON file."""
    about = {"workload": workload, "slot_s": slot_s, "layout": asdict(layout), "layout_hash": layout.hash}
    return write_record(folder, name, tensors, {**about, "training": training})


def write_record(folder: Path, name: str, tensors: dict[str, NDArray[np.float32]], about: dict[str, Any]) -> Path:
    """Write tensors and what is said `about` them, `slot_s` at least, into `folder`; the path of the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"format": FORMAT, "name": name, **about}, indent=1, sort_keys=True) + "\n")
    return path


def shipped(source: Path | str) -> Path:
    """Where an artifact is: a path, or a name among the pretrained (`learned-po`) if nothing here is called so."""
    where = Path(source)
    if where.parent == Path(".") and not where.with_suffix(".json").exists():
        return PRETRAINED / f"routing-{where.name}"
    return where


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The record and the actor's tensors behind a `.json` (or its stem); errors name what is wrong."""
    record_path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    try:
        record = json.loads(record_path.read_text())
        tensors = load_file(record_path.with_suffix(".safetensors"))
    except FileNotFoundError as missing:
        beside = "" if not record_path.exists() else f" beside {record_path.name}"
        absent = record_path if not beside else record_path.with_suffix(".safetensors")
        raise RoutingError(f"artifact {absent} does not exist{beside}") from missing
    except OSError as broken:
        raise RoutingError(f"artifact {record_path}: cannot be read ({broken.strerror})") from broken
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise RoutingError(f"artifact {record_path} is not JSON: {broken}") from broken
    except SafetensorError as broken:
        raise RoutingError(f"artifact {record_path.with_suffix('.safetensors')}: broken ({broken})") from broken
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else "none"
        raise RoutingError(f"artifact {record_path}: format = {found}, this code reads {FORMAT}")
    for key in ("name", "slot_s"):
        if key not in record:
            raise RoutingError(f"artifact {record_path}: {key} is missing; train it again")
    for key, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise RoutingError(f"artifact {record_path}: tensor {key} holds NaN or infinity; train it again")
    return record, tensors


def read_artifact(path: Path) -> tuple[dict[str, Any], Layout, dict[str, NDArray[np.float32]]]:
    """The record, the layout and the actor's tensors of a policy for one set of instances."""
    record, tensors = read_record(path)
    for key in ("layout", "layout_hash"):
        if key not in record:
            raise RoutingError(f"artifact {path}: {key} is missing; train it again")
    try:
        fields = dict(record["layout"])
        layout = Layout(**{**fields, "variants": tuple(fields["variants"]), "elapsed_s": tuple(fields["elapsed_s"])})
    except (TypeError, KeyError, ValueError) as wrong:
        raise RoutingError(
            f"artifact {path}: layout = {record['layout']}: made for another feature layout ({wrong}); train it again"
        ) from wrong
    if layout.hash != record["layout_hash"]:
        raise RoutingError(
            f"artifact {path}: layout_hash = {record['layout_hash']}, but its layout hashes to {layout.hash}: "
            "it was made for another feature layout; train it again"
        )
    return record, layout, tensors
