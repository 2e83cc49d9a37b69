"""Settings that cannot work, and the form of a log line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from protocol.logs import JsonLines
from workers.config import ConfigError, WorkerConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a/b"),
        ("name", ""),
        ("board", ""),
        ("board", "localhost:6379"),
        ("address", "unix:relative"),
        ("address", "tcp:host"),
        ("address", "tcp:host:99999"),
        ("address", "unix:/" + "x" * 120),
        ("advertise", "host:1"),
        ("catalog", (Path("/no/such/folder"),)),
        ("metrics_port", 65536),
        ("drain_s", -1.0),
        ("prepare_threads", 0),
        ("clip_frames", 0),
        ("clip_s", float("nan")),
    ],
)
def test_settings_name_key_value_and_remedy(key: str, value: object) -> None:
    """Each wrong one alone."""
    sound: dict[str, Any] = {"name": "a", "board": "redis://h:1/0", "address": "unix:/tmp/a.sock"}
    WorkerConfig(**sound)
    with pytest.raises(ConfigError) as caught:
        WorkerConfig(**(sound | {key: value}))
    assert caught.value.key == key
    assert caught.value.remedy in str(caught.value)


def test_an_address_that_nobody_can_reach_needs_another_to_advertise() -> None:
    """Listening on every interface says nothing about how to get there."""
    with pytest.raises(ConfigError, match="advertise"):
        WorkerConfig(name="a", board="redis://h:1/0", address="tcp:0.0.0.0:9001")
    WorkerConfig(name="a", board="redis://h:1/0", address="tcp:0.0.0.0:9001", advertise="tcp:host:9001")


def test_a_log_line_is_one_json_object() -> None:
    """With what `extra` brought, and the traceback inside the one line."""
    record = logging.makeLogRecord({"name": "workers.x", "levelno": 40, "levelname": "ERROR", "msg": "a\nb %s"})
    record.args, record.instance = ("c",), "w/null"
    try:
        raise ValueError("broken")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    text = JsonLines("worker w").format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"], line["instance"]) == ("a\nb c", "ERROR", "w/null")
    assert "ValueError: broken" in line["trace"]
