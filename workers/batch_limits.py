"""Batch limits from the scheduler's tables: taken when one comes, given back when it expires."""

import logging

from protocol.records import Table
from workers.device import Timer
from workers.host import Host

log = logging.getLogger(__name__)


class BatchLimits:
    """Applies tables to the host's queues. State: per service the timer at which its limits expire."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._timers: dict[str, Timer] = {}

    def take(self, table: Table) -> None:
        """From the next batch on, the table's limits hold for the instances of its service, until it expires."""
        if timer := self._timers.pop(table.service, None):
            timer.cancel()
            self._give_back(table.service)
        if not table.batch_limits:
            return
        try:
            for variant, (minimum, maximum) in table.batch_limits.items():
                self._set(table.service, variant, minimum, maximum)
        except ValueError as error:
            log.error("a table's batch limits were refused", extra={"service": table.service, "reason": str(error)})
        clock = self._host.clock
        self._timers[table.service] = clock.call_at(
            clock.now_s() + table.valid_for_s, lambda: self._expire(table.service)
        )

    def _expire(self, service: str) -> None:
        del self._timers[service]
        self._give_back(service)

    def _give_back(self, service: str) -> None:
        """Back to (1, largest): whoever comes is served, in batches of up to what the deployment allows."""
        for instance in list(self._host.instances.values()):
            if instance.service == service:
                self._set(service, instance.spec.variant, 1, instance.spec.batch[1])

    def _set(self, service: str, variant: str, minimum: int, maximum: int) -> None:
        for instance in self._host.instances.values():
            mine = instance.service == service and instance.spec.variant == variant
            if mine and not instance.unwanted.is_set():
                instance.queue.set_batch_limits(minimum, maximum)
        self._host.limits_changed()
