"""The model repository of the Open Inference Protocol: index, load, unload.

Loading changes the deployment on the board (`InstanceSpec.loaded`) and the workers follow it, so what was loaded
stays loaded over restarts and for every gateway. Only what the deployment places can be loaded: where an instance
should live is the operator's choice (`PUT /admin/deployment`), not a client's.
"""

import asyncio
import time
from typing import Any, Final

import msgspec

from gateway.fleet import Fleet
from gateway.oip_models import VERSION, Model, all_models
from gateway.request import Refused
from protocol.board import BOARD_ERRORS
from protocol.outcomes import Outcome
from protocol.records import Deployment, InstanceRecord, InstanceState

PATIENCE_S: Final = 120.0
"""Longest wait for workers to load or unload; what takes longer goes on, and the client asks `ready`."""
_LOOK_EVERY_S: Final = 0.02


def index(fleet: Fleet, only_ready: bool) -> list[dict[str, Any]]:
    """Answer of `POST v2/repository/index`: every service and variant of the deployment, and its state."""
    entries = []
    for model in all_models(fleet.services):
        state, reason = model.state()
        if state == "READY" or not only_ready:
            entries.append({"name": model.name, "version": VERSION, "state": state, "reason": reason})
    return entries


def changed(deployment: Deployment, variants: tuple[str, ...], loaded: bool) -> tuple[Deployment, list[str]]:
    """The deployment with all instances of `variants` wanted or not, and the ids of these instances."""
    ids: list[str] = []
    workers = []
    for worker in deployment.workers:
        seen: dict[str, int] = {}
        specs = []
        for spec in worker.instances:
            number = seen[spec.variant] = seen.get(spec.variant, 0) + 1
            if spec.variant in variants:
                ids.append(f"{worker.name}/{spec.variant}" + (f"#{number}" if number > 1 else ""))
                spec = msgspec.structs.replace(spec, loaded=loaded)
            specs.append(spec)
        workers.append(msgspec.structs.replace(worker, instances=tuple(specs)))
    return msgspec.structs.replace(deployment, workers=tuple(workers)), ids


async def set_loaded(fleet: Fleet, model: Model, loaded: bool, patience_s: float = PATIENCE_S) -> None:
    """Loads or unloads every instance of the model; returns once the workers have done so.

    Calls at the same time add up; of two that contradict each other the earlier one is told.

    Raises `Refused`: INVALID if the deployment places no instance of it or somebody else undid this, FAILED with the
    worker's reason if loading failed, UNAVAILABLE without board or deployment or when `patience_s` is over.
    """
    ids: list[str] = []

    def change(present: Deployment) -> Deployment:
        wanted, ids[:] = changed(present, model.variants, loaded)
        if not ids:
            reason = f"no worker of the deployment has {model.name!r}: give one an instance with PUT /admin/deployment"
            raise Refused(Outcome.INVALID, reason, 400)
        return wanted

    try:
        posted = await fleet.board.change_deployment(change, fleet.deployment)
        if posted is None:
            raise Refused(Outcome.UNAVAILABLE, "no deployment is posted on the board")
    except BOARD_ERRORS as error:
        raise Refused(Outcome.UNAVAILABLE, f"the board (Redis) cannot be reached: {error}") from error
    ends_s = time.monotonic() + patience_s
    while True:
        records = {target.id: target.record for target in model.router.targets}
        open_ids = {target.id for target in model.router.targets if model.router.capacity[target.index] > 0}
        if loaded:
            failures = _failures([records[id] for id in ids if id in records])
            if failures:
                raise Refused(Outcome.FAILED, f"failed to load {model.name!r}: {failures}")
        latest = fleet.deployment
        if latest and latest.version > posted.version and changed(latest, model.variants, loaded)[0] != latest:
            reason = f"somebody else has {'unloaded' if loaded else 'loaded'} {model.name!r} or a part of it meanwhile"
            raise Refused(Outcome.INVALID, reason, 409)
        if set(ids) <= open_ids if loaded else not any(id in records for id in ids):
            return
        if time.monotonic() > ends_s:
            doing = "loading" if loaded else "unloading"
            raise Refused(Outcome.UNAVAILABLE, f"still {doing} {model.name!r} after {patience_s:g} s: ask again later")
        await asyncio.sleep(_LOOK_EVERY_S)


def _failures(records: list[InstanceRecord]) -> str:
    return "; ".join(f"{one.id}: {one.reason}" for one in records if one.state is InstanceState.FAILED)
