"""A deployment file (TOML): what an operator writes, checked before anything starts.

name = "digits"
catalog = ["../my-variants"]            # folders with further variants; relative to the file
[services.digits]                       # -> records.ServiceSpec
variants = ["digits_heavy", "digits_light"]   # from the heaviest to the lightest
requirement_ms = 250
[[workers]]                             # -> records.WorkerSpec
name = "a"
instances = [{ variant = "digits_heavy" }]
[edge]                                  # -> edge_records.EdgeSpec: detection and tracking on an edge network
[gateway]                               # -> GatewaySettings
[scheduler]                             # -> SchedulerSettings
"""

import math
import re
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import msgspec

from protocol.edge_deployment import check_edge
from protocol.edge_records import EdgeLinkSpec, EdgeNodeSpec, EdgeServiceSpec, EdgeSpec, Emulation
from protocol.records import ONE_GATEWAY_ROUTERS, Deployment, InstanceSpec, ServiceSpec, WorkerSpec

T = TypeVar("T")
_DEVICE = re.compile(r"cpu|(cuda|tensorrt)(:\d{1,3})?")
MOST_INSTANCES = 256
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class DeploymentError(ValueError):
    """The file cannot be used: names the file, the key, the value and the remedy."""


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where clients connect, and how long they may take. Several `processes` share the port.

    `header_timeout_s` and `body_timeout_s` bound the arrival of a request's head and body; `uploads_mb` the memory that
    all bodies still arriving take in each process (MiB); `drain_s` the wait for requests under way at the end.
    """

    host: str = "127.0.0.1"
    port: int = 8700
    processes: int = 1
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    uploads_mb: float = 256.0
    drain_s: float = 10.0


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the scheduler runs. `slot_s` is Tan's τ."""

    slot_s: float = 1.0


class DeploymentFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    name: str
    workers: tuple[WorkerSpec, ...]
    services: dict[str, ServiceSpec] = {}
    edge: EdgeSpec | None = None
    catalog: tuple[str, ...] = ()
    gateway: GatewaySettings = GatewaySettings()
    scheduler: SchedulerSettings = SchedulerSettings()

    def desired_state(self) -> Deployment:
        """What goes onto the board."""
        return Deployment(name=self.name, services=self.services, workers=self.workers, edge=self.edge)


def read_deployment(path: Path) -> DeploymentFile:
    """The checked file; `catalog` folders and a `policy_file` with a `/` in it made absolute, from the file's folder.

    Raises `DeploymentError`.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read ({error.strerror}): give a deployment file with -f") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path}: is not valid TOML: {error}") from error
    given = content.get("services")
    try:
        # Each by itself first: for a dictionary's values msgspec does not say whose value it was.
        for name, spec in given.items() if isinstance(given, dict) else ():
            _convert(spec, ServiceSpec, f"services.{name}")
        file = _convert(content, DeploymentFile, "")
    except DeploymentError as error:
        raise DeploymentError(f"{path}: {error}") from error
    fault = check_deployment(file.desired_state()) or _check_settings(file)
    if fault:
        raise DeploymentError(f"{path}: {fault}")
    services = {
        name: msgspec.structs.replace(spec, policy_file=str((path.parent / spec.policy_file).resolve()))
        if "/" in spec.policy_file
        else spec
        for name, spec in file.services.items()
    }
    catalog = tuple(str((path.parent / folder).resolve()) for folder in file.catalog)
    edge = _with_whole_paths(file.edge, path.parent) if file.edge is not None else None
    return msgspec.structs.replace(file, services=services, edge=edge, catalog=catalog)


def _with_whole_paths(edge: EdgeSpec, folder: Path) -> EdgeSpec:
    """Tables and policies with a `/` in them and a graph's CSV file, made absolute."""

    def whole(name: str) -> str:
        return str((folder / name).resolve()) if "/" in name else name

    services = {name: msgspec.structs.replace(spec, table=whole(spec.table)) for name, spec in edge.services.items()}
    return msgspec.structs.replace(edge, services=services, graph=whole(edge.graph), policy=whole(edge.policy))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'deadline'?"` where `word` is nearly one of those known, else empty: the end of an error."""
    close = get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def few_of(names: Iterable[str], most: int = 10) -> list[str]:
    """The first of names that may be many, and how many more there are: what an error can show."""
    listed = list(names)
    return listed if len(listed) <= most else [*listed[:most], f"and {len(listed) - most:,} more"]


def check_deployment(deployment: Deployment) -> str:
    """Empty if the parts fit together, else what is wrong: the key, its value and what would be right."""
    if not 1 <= len(deployment.name) <= 64 or not deployment.name.isprintable():
        return f"name = {deployment.name[:64]!r}: must be 1 to 64 printable characters"
    if not deployment.services and deployment.edge is None:
        return "services is empty: name at least one, as [services.NAME]"
    if not deployment.workers:
        return "workers is empty: add at least one [[workers]] with instances"
    served = {variant for spec in deployment.services.values() for variant in spec.variants}
    for name, spec in deployment.services.items():
        where = f"services.{name}"
        if not _NAME.fullmatch(name):
            return f"{where}: a name is made of a-z, 0-9, '_', '.' and '-', 64 at most"
        if not spec.variants or len(set(spec.variants)) != len(spec.variants):
            return f"{where}.variants = {list(spec.variants)}: list each variant once, heaviest first"
        if not 0 < spec.requirement_ms <= 600_000:
            return f"{where}.requirement_ms = {spec.requirement_ms}: must be above 0 and at most 600000 milliseconds"
        if not 0 < spec.percentile < 1:
            return f"{where}.percentile = {spec.percentile}: must be a fraction between 0 and 1, as 0.98"
        if spec.on_late not in ("serve", "error"):
            return f"{where}.on_late = {spec.on_late!r}: must be 'serve' or 'error'"
        if not 1 <= spec.max_body_bytes <= 64 << 20:
            return f"{where}.max_body_bytes = {spec.max_body_bytes}: must be from 1 to {64 << 20}"
        if not 1 <= spec.top_k <= 100:
            return f"{where}.top_k = {spec.top_k}: must be from 1 to 100"
        if not all(0 <= rate < math.inf for rate in spec.phase_rates):
            return f"{where}.phase_rates = {list(spec.phase_rates)}: requests/s in each phase, none below 0"
    if fault := _check_places(deployment) or check_edge(deployment):
        return fault
    seen: set[str] = set()
    for worker in deployment.workers:
        where = f"workers {worker.name!r}"
        if not _NAME.fullmatch(worker.name):
            return f"{where}: a name is made of a-z, 0-9, '_', '.' and '-', 64 at most"
        if worker.name in seen:
            return (
                f"{where}: two [[workers]] have this name; give each its own, as {_unused(worker.name, deployment)!r}"
            )
        seen.add(worker.name)
        if not _DEVICE.fullmatch(worker.device):
            return f"{where}.device = {worker.device!r}: must be cpu, cuda or tensorrt (cuda:1 is the second GPU)"
        if not 1 <= worker.threads <= 1024:
            return f"{where}.threads = {worker.threads}: must be from 1 to 1024"
        if len(worker.instances) > MOST_INSTANCES:
            return f"{where}: {len(worker.instances)} instances: at most {MOST_INSTANCES} on one worker; add workers"
        if worker.memory_mb is not None and not worker.memory_mb > 0:
            return f"{where}.memory_mb = {worker.memory_mb}: must be above 0, or left out for no limit"
        for instance in worker.instances:
            if instance.variant not in served:
                meant = did_you_mean(instance.variant, served)
                return f"{where}: variant {instance.variant!r} belongs to no service: list it in one's variants{meant}"
            if not 1 <= instance.capacity <= 10_000:
                return f"{where}: capacity = {instance.capacity} of {instance.variant}: must be from 1 to 10000"
            minimum, maximum = instance.batch
            if not 1 <= minimum <= maximum <= instance.capacity:
                return f"{where}: batch = {instance.batch} of {instance.variant}: needs 1 <= min <= max <= capacity"
    return ""


def _check_places(deployment: Deployment) -> str:
    """Every service has an instance somewhere, and every variant belongs to one service."""
    owner: dict[str, str] = {}
    for name, spec in deployment.services.items():
        for variant in spec.variants:
            other = owner.setdefault(variant, name)
            if other != name:
                return (
                    f"services.{name}.variants: {variant!r} is in services.{other}.variants too, and an instance serves"
                    " one service: leave it to one of them, or give it a second catalog entry under another name"
                )
    placed = {instance.variant for worker in deployment.workers for instance in worker.instances}
    for name, spec in deployment.services.items():
        if placed.isdisjoint(spec.variants):
            remedy = f"give a worker an instance, as instances = [{{ variant = {spec.variants[-1]!r} }}]"
            return f"services.{name}.variants = {list(spec.variants)}: none of them is on a worker: {remedy}"
    return ""


def _unused(name: str, deployment: Deployment) -> str:
    taken = {worker.name for worker in deployment.workers}
    return next(f"{name}-{number}" for number in range(2, len(taken) + 3) if f"{name}-{number}" not in taken)


def _check_settings(file: DeploymentFile) -> str:
    if not 0 < file.gateway.port < 65_536:
        return f"gateway.port = {file.gateway.port}: must be from 1 to 65535"
    held = [name for name, spec in file.services.items() if spec.router in ONE_GATEWAY_ROUTERS]
    if held and file.gateway.processes > 1:
        return f"gateway.processes = {file.gateway.processes}: the single queue of {held[0]} needs one gateway process"
    if not 1 <= file.gateway.processes <= 64:
        return f"gateway.processes = {file.gateway.processes}: must be from 1 to 64"
    for key in ("header_timeout_s", "body_timeout_s", "drain_s"):
        value = getattr(file.gateway, key)
        if not 0 < value <= 3600:
            return f"gateway.{key} = {value}: must be above 0 and at most 3600 seconds"
    bodies = [spec.max_body_bytes for spec in file.services.values()]
    bodies += [spec.max_body_bytes for spec in file.edge.services.values()] if file.edge is not None else []
    largest_mb = max(1.0, max(bodies) / 2**20)
    if not largest_mb <= file.gateway.uploads_mb <= 1 << 20:
        return f"gateway.uploads_mb = {file.gateway.uploads_mb}: must be from {largest_mb:g} (a body) to {1 << 20} MiB"
    if not 0.05 <= file.scheduler.slot_s <= 60:
        return f"scheduler.slot_s = {file.scheduler.slot_s}: must be from 0.05 to 60 seconds"
    return ""


_TABLES: dict[str, type[msgspec.Struct]] = {
    "": DeploymentFile,
    "services": ServiceSpec,
    "workers": WorkerSpec,
    "workers.instances": InstanceSpec,
    "edge": EdgeSpec,
    "edge.services": EdgeServiceSpec,
    "edge.nodes": EdgeNodeSpec,
    "edge.links": EdgeLinkSpec,
    "edge.emulate": Emulation,
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
}
"""What the tables of a file are, by the names on the way to them."""


def _convert(content: object, type_: type[T], where: str) -> T:
    """`content` as `type_`. Raises `DeploymentError` with the key below `where`, its value and what is expected."""
    try:
        return msgspec.convert(content, type_)
    except msgspec.ValidationError as error:
        text, _, at = str(error).partition(" - at `$")
    value = content
    for part in re.findall(r"\[\d+\]|[^.\[\]]+", at.rstrip("`")):
        if part.startswith("[") and isinstance(value, list):
            value = value[int(part[1:-1])]
        elif isinstance(value, dict):
            value = value.get(part)
    key = (where + at.rstrip("`")).lstrip(".")
    table = _TABLES.get(re.sub(r"\[\d+\]", "", "services" if where and where == key else key))
    named = re.search(r"field `(.+)`$", text)
    if named is None or table is None or not isinstance(value, dict):
        raise DeploymentError(f"{key} = {value!r}: {text}")
    field, name = f"{key}.{named[1]}".lstrip("."), named[1]
    if name in value:
        known = table.__struct_fields__
        raise DeploymentError(
            f"{field} = {value[name]!r}: no such key; there are {', '.join(known)}{did_you_mean(name, known)}"
        )
    raise DeploymentError(f"{field} is missing: add it")
