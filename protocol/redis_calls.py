"""Calls to Redis whose cancellations are not lost, and records that are read without trust: for the board's files."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
from redis.exceptions import RedisError

BOARD_ERRORS: Final = (RedisError, OSError, TimeoutError)
"""What a call raises while Redis is away."""

T = TypeVar("T")
P = ParamSpec("P")


async def keep_cancellation(call: Awaitable[T]) -> T:
    """Awaits `call`, and raises `CancelledError` if the task was cancelled meanwhile and nobody noticed.

    redis-py (seen with 8.1) loses cancellations that arrive while it takes a connection from its pool; a loop that
    lives on board calls would then never end.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await call
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def cancellable(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A method whose cancellations are kept."""

    @functools.wraps(method)
    async def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        return await keep_cancellation(method(*args, **kwargs))

    return kept


async def quietly(closing: Awaitable[None]) -> None:
    """A subscription whose connection broke may fail to close; there is nothing left to save in it."""
    try:
        await closing
    except BOARD_ERRORS:
        return


def decoded(data: bytes | None, type_: type[T]) -> T | None:
    """A record, or None where there is none or this version cannot read it."""
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.MsgspecError:
        return None
