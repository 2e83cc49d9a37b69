"""Desired against actual: which instances to load, to drain, to adjust. Declarative, so safe to repeat.

`wanted_on` and `compare` decide and are pure; `Reconciler` starts and ends instances' lives accordingly.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from protocol.deployment import check_deployment, few_of
from protocol.outcomes import Attempt
from protocol.records import Deployment, InstanceSpec, ServiceSpec
from workers.host import Host
from workers.instance import Instance
from workers.life import Loading, live

log = logging.getLogger(__name__)


class Wanted(msgspec.Struct, frozen=True):
    """One instance that the deployment asks this worker for. `service`: as the deployment assigns the variant."""

    id: str
    spec: InstanceSpec
    service: str
    device: str
    threads: int

    def same_runtime(self, instance: Instance) -> bool:
        """Whether `instance` can stay loaded; its queue and limits can be adjusted in place."""
        mine = (self.spec.variant, self.device, self.threads)
        return mine == (instance.spec.variant, instance.device, instance.threads)


class Difference(msgspec.Struct, frozen=True):
    """What is to be done: entries to load, ids to drain, entries whose instance stays and takes new settings."""

    load: tuple[Wanted, ...]
    drain: tuple[str, ...]
    adjust: tuple[Wanted, ...]


def wanted_on(deployment: Deployment, worker: str) -> tuple[Wanted, ...] | None:
    """The instances that `deployment` asks `worker` for; None if it does not name the worker.

    Ids are "<worker>/<variant>", the second of a variant "<worker>/<variant>#2", and so on.
    """
    spec = next((one for one in deployment.workers if one.name == worker), None)
    if spec is None:
        return None
    seen: Counter[str] = Counter()
    wanted = []
    for instance in spec.instances:
        seen[instance.variant] += 1
        if not instance.loaded:
            continue
        number = seen[instance.variant]
        id = f"{worker}/{instance.variant}" + (f"#{number}" if number > 1 else "")
        service = _service_of(instance.variant, deployment.services)
        wanted.append(Wanted(id, instance, service, spec.device, spec.threads))
    return tuple(wanted)


def compare(wanted: tuple[Wanted, ...], actual: Mapping[str, Instance]) -> Difference:
    """What leads from `actual` to `wanted`. One that has to be reloaded is drained now and loaded once it is gone."""
    by_id = {one.id: one for one in wanted}
    kept = {one.id for one in wanted if one.id in actual and one.same_runtime(actual[one.id])}
    return Difference(
        load=tuple(one for one in wanted if one.id not in actual),
        drain=tuple(sorted(id for id in actual if id not in kept)),
        adjust=tuple(by_id[id] for id in sorted(kept)),
    )


def _service_of(variant: str, services: Mapping[str, ServiceSpec]) -> str:
    """The service that lists the variant (the first by name, should several do); "" if none does."""
    return next((name for name in sorted(services) if variant in services[name].variants), "")


class Reconciler:
    """Keeps the host's instances as the deployment wants them. Its state: the deployment, one task per instance."""

    def __init__(
        self, worker: str, host: Host, loading: Loading, on_change: Callable[[], None], drain_s: float
    ) -> None:
        self._worker = worker
        self._host = host
        self._loading = loading
        self._on_change = on_change
        self._drain_s = drain_s
        self._wanted: tuple[Wanted, ...] = ()
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._deployment: Deployment | None = None
        self._ending = False

    def follow(self, deployment: Deployment | None) -> None:
        """This is what the board says now. None (an empty board) changes nothing: it will be filled again."""
        if self._ending or (deployment is not None and deployment == self._deployment):
            return
        if deployment is None:
            if self._deployment is None:
                log.info("waiting for a deployment on the board")
            return
        self._deployment = deployment
        if fault := check_deployment(deployment):
            log.error("deployment refused; what is loaded stays", extra={"reason": fault})
            return
        wanted = wanted_on(deployment, self._worker)
        if wanted is None:
            names = ", ".join(few_of(spec.name for spec in deployment.workers)) or "none"
            log.warning(
                f"deployment {deployment.name!r} has no worker {self._worker!r} (it has: {names}); waiting for one"
            )
        else:
            spec = next(one for one in deployment.workers if one.name == self._worker)
            self._loading = msgspec.structs.replace(self._loading, memory_mb=spec.memory_mb)
        self._wanted = wanted or ()
        self._reconcile()

    async def end(self) -> None:
        """Drain and unload everything; nothing is loaded any more."""
        self._ending, self._wanted = True, ()
        self._reconcile()
        if self._lives:
            _, late = await asyncio.wait(self._lives.values(), timeout=self._drain_s + 2.0)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _reconcile(self) -> None:
        difference = compare(self._wanted, self._host.instances)
        for id in difference.drain:
            self._host.instances[id].unwanted.set()
        for wanted in difference.adjust:
            self._adjust(self._host.instances[wanted.id], wanted)
        for wanted in difference.load:
            instance = Instance(wanted.id, wanted.spec, wanted.service, wanted.device, wanted.threads)
            self._host.instances[wanted.id] = instance
            self._lives[wanted.id] = asyncio.create_task(self._run(instance), name=wanted.id)

    def _adjust(self, instance: Instance, wanted: Wanted) -> None:
        if instance.unwanted.is_set() or (instance.spec, instance.service) == (wanted.spec, wanted.service):
            return  # on its way out, and loaded anew once it is gone; or as wanted already
        instance.queue.capacity = wanted.spec.capacity
        if instance.spec.batch != wanted.spec.batch:
            instance.queue.set_batch_limits(*wanted.spec.batch)
        else:
            instance.queue.set_batch_limits(instance.queue.minimum, instance.queue.maximum)
        instance.spec, instance.service = wanted.spec, wanted.service
        self._host.limits_changed()
        self._on_change()

    async def _run(self, instance: Instance) -> None:
        try:
            await live(instance, self._host, self._loading, self._on_change, self._drain_s)
        except Exception:  # a fault of ours: say so, free what waits, let the next round load it anew
            log.exception("instance ended unexpectedly", extra={"instance": instance.id})
        finally:
            self._host.end_all(instance, Attempt.UNAVAILABLE)
            del self._host.instances[instance.id]
            del self._lives[instance.id]
            self._on_change()
        self._reconcile()
