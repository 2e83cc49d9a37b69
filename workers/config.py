"""What one worker process needs to know before it starts. Checked here; nothing is opened.

Everything about what it serves (device, threads, instances, capacities, batch limits) is not here: it comes from the
deployment on the board.
"""

import re
from pathlib import Path

import msgspec

from models.clip_limits import Limits
from protocol.link import address_fault, is_every_interface

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class ConfigError(ValueError):
    """A setting that cannot work: which key, its value, and what would be right."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key} = {value!r}: {remedy}")
        self.key = key
        self.value = value
        self.remedy = remedy


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's own settings. `address`: where it listens; `advertise`: how others reach it ("" = the same).

    `clip_frames`, `clip_s`: what an edge node decodes of one clip at most.
    """

    name: str
    board: str
    address: str
    advertise: str = ""
    catalog: tuple[Path, ...] = ()
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    drain_s: float = 10.0
    seed: int = 0
    prepare_threads: int = 2
    clip_frames: int = Limits().max_frames
    clip_s: float = Limits().max_seconds

    def __post_init__(self) -> None:
        _require(
            _NAME.fullmatch(self.name) is not None,
            "name",
            self.name,
            "1 to 64 of a-z, 0-9, '_', '.', '-', beginning with a letter or digit",
        )
        _require(
            self.board.startswith(("redis://", "rediss://", "unix://")),
            "board",
            self.board,
            "give --board or TIDEGATE_REDIS_URL: redis://host:port/0 or unix:///path/redis.sock",
        )
        _check_address("address", self.address)
        if self.advertise:
            _check_address("advertise", self.advertise)
        elif is_every_interface(self.address):
            raise ConfigError("advertise", "", f"nobody can connect to {self.address}: say tcp:THIS-HOST:PORT")
        for folder in self.catalog:
            _require(folder.is_dir(), "catalog", str(folder), "no such folder; create it or leave it out")
        if self.metrics_port is not None:
            _require(0 <= self.metrics_port <= 65535, "metrics_port", self.metrics_port, "a port is 0 to 65535")
        _require(0 <= self.drain_s <= 3600, "drain_s", self.drain_s, "seconds, 0 to 3600")
        _require(1 <= self.prepare_threads <= 64, "prepare_threads", self.prepare_threads, "1 to 64 threads")
        _require(1 <= self.clip_frames <= 100_000, "clip_frames", self.clip_frames, "1 to 100000 frames")
        _require(0 < self.clip_s <= 3600, "clip_s", self.clip_s, "seconds, above 0 and at most 3600")


def _check_address(key: str, value: str) -> None:
    fault = address_fault(value)
    _require(not fault, key, value, fault)


def _require(right: bool, key: str, value: object, remedy: str) -> None:
    if not right:
        raise ConfigError(key, value, remedy)
