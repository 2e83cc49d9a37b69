"""The gateway's configuration: a frozen struct, checked once at start."""

from pathlib import Path
from typing import Final

import msgspec

SLOWEST_ANSWER_S: Final = 60.0


class ConfigError(ValueError):
    """A setting that cannot be used: names the key, the value and the remedy."""


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How one gateway process listens and what it lets in.

    `max_header_bytes` and `header_timeout_s` bound what comes before a body, `body_timeout_s` the whole body;
    the body's size limit belongs to each service. `uploads_mb` (MiB) bounds what all unfinished bodies together take in
    this process: past it a body that goes on growing is UNAVAILABLE. `answer_timeout_s` is the longest wait for a
    worker beyond the request's own budget: past it the request FAILED. `drain_s` bounds the wait for requests under
    way at the end. `metrics_folder`: where the processes of one port (`reuse_port`) share what they count.
    """

    host: str = "127.0.0.1"
    port: int = 8700
    board_url: str = ""
    reuse_port: bool = False
    admin_token: str = ""
    max_header_bytes: int = 16_384
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    uploads_mb: float = 256.0
    answer_timeout_s: float = 30.0
    drain_s: float = 10.0
    metrics_folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.board_url:
            raise ConfigError("board_url is empty: give --board or set TIDEGATE_REDIS_URL (redis://host:port/0)")
        if not self.board_url.startswith(("redis://", "rediss://", "unix://")):
            raise ConfigError(f"board_url = {self.board_url!r}: must start with redis://, rediss:// or unix://")
        if not 0 < self.port < 65_536:
            raise ConfigError(f"port = {self.port}: must be from 1 to 65535")
        if self.max_header_bytes < 1024:
            raise ConfigError(f"max_header_bytes = {self.max_header_bytes}: must be at least 1024")
        if not 1 <= self.uploads_mb <= 1 << 20:
            raise ConfigError(f"uploads_mb = {self.uploads_mb}: must be from 1 to {1 << 20} MiB")
        if self.metrics_folder is not None and not self.metrics_folder.is_dir():
            raise ConfigError(
                f"metrics_folder = {str(self.metrics_folder)!r}: no such folder; create it or leave it out"
            )
        for key in ("header_timeout_s", "body_timeout_s", "answer_timeout_s", "drain_s"):
            value = getattr(self, key)
            if not 0 < value <= 3600:
                raise ConfigError(f"{key} = {value}: must be above 0 and at most 3600 seconds")
