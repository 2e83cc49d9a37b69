"""The scheduler's configuration: a frozen struct, checked once at start."""

import msgspec

from protocol.link import address_fault, is_every_interface


class ConfigError(ValueError):
    """A setting that cannot be used: names the key, the value and the remedy."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`slot_s` is Tan's τ; a policy that is made for another slot (infaas: 0.1 s) keeps its own.

    A table is valid for `tables_live_slots` slots: so many may fail to come before gateways fall back to `deadline`.
    `address`: where gateways bring windows of edge requests (unix:/path or tcp:host:port), `advertise` how they reach
    it, if not so; without one it decides on none. `status_timeout_s` bounds the wait for a worker's status at the
    boundary; who is later counts as not ready.
    """

    board_url: str = ""
    slot_s: float = 1.0
    tables_live_slots: float = 3.0
    status_timeout_s: float = 0.1
    metrics_port: int = 0
    seed: int = 0
    address: str = ""
    advertise: str = ""

    def __post_init__(self) -> None:
        if not self.board_url.startswith(("redis://", "rediss://", "unix://")):
            raise ConfigError(
                f"board_url = {self.board_url!r}: give --board or set TIDEGATE_REDIS_URL (redis://host:port/0)"
            )
        if not 0.05 <= self.slot_s <= 60.0:
            raise ConfigError(f"slot_s = {self.slot_s}: must be from 0.05 to 60 seconds")
        if not 0.0 < self.status_timeout_s <= 1.0:
            raise ConfigError(f"status_timeout_s = {self.status_timeout_s}: must be above 0 and at most 1 second")
        for key in ("address", "advertise"):
            value = getattr(self, key)
            if value and (fault := address_fault(value)):
                raise ConfigError(f"{key} = {value!r}: {fault}")
        if is_every_interface(self.address) and not self.advertise:
            raise ConfigError(f"advertise is empty: nobody can connect to {self.address}; say tcp:THIS-HOST:PORT")
        if not 0 <= self.metrics_port < 65_536:
            raise ConfigError(f"metrics_port = {self.metrics_port}: must be 0 (off) or a port below 65536")
