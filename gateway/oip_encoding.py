"""Content codings of the Open Inference Protocol's HTTP bodies: gzip and deflate, both ways. Pure."""

import zlib
from typing import Final

from gateway.request import Refused
from protocol.outcomes import Outcome

_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS
_RAW: Final = -zlib.MAX_WBITS
_LEVEL: Final = 1
"""Answers are small and the network near: the fastest level."""


def decompress(body: bytes, coding: bytes, limit: int) -> bytes:
    """The body without its `Content-Encoding`. Never makes more than `limit` bytes of it.

    Raises `Refused`: 415 for another coding than gzip, deflate or identity; 400 for a body that is damaged, cut
    short, or would unfold beyond `limit`.
    """
    name = coding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        shown = coding[:40].decode("latin-1")
        raise Refused(Outcome.INVALID, f"content encoding {shown!r} is not accepted: send gzip, deflate or none", 415)
    # "deflate" is a zlib stream (RFC 9110), but some clients send the bare stream: its first byte tells.
    wrapped = name != b"deflate" or (len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0)
    stream = zlib.decompressobj(_GZIP_OR_ZLIB if wrapped else _RAW)
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused(Outcome.INVALID, f"the {name.decode()} body cannot be read: {error}", 400) from None
    if len(plain) > limit:
        raise Refused(Outcome.INVALID, f"the {name.decode()} body unfolds to more than {limit} bytes", 400)
    if not stream.eof:
        raise Refused(Outcome.INVALID, f"the {name.decode()} body is cut short", 400)
    if stream.unused_data:
        raise Refused(Outcome.INVALID, f"the {name.decode()} body has bytes behind its end", 400)
    return plain


def chosen_coding(accept: bytes) -> bytes:
    """`gzip` or `deflate`, whichever the `Accept-Encoding` header names first without `q=0`; b"" for neither."""
    for part in accept.lower().split(b","):
        name, _, parameters = part.partition(b";")
        refused = parameters.replace(b" ", b"") in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
        if not refused and (name := name.strip()) in (b"gzip", b"deflate"):
            return name
    return b""


def compress(body: bytes, coding: bytes) -> bytes:
    """The body in the coding that `chosen_coding` gave."""
    if not coding:
        return body
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS if coding == b"gzip" else zlib.MAX_WBITS)
    return stream.compress(body) + stream.flush()
