"""gzip and deflate both ways, against the standard library's and gzip's own readers; bombs and damage are refused."""

import gzip
import zlib

import pytest

from gateway.oip_encoding import chosen_coding, compress, decompress
from gateway.request import Refused

TEXT = b'{"inputs": []}' * 50
LIMIT = 10_000


def bare_deflate(data: bytes) -> bytes:
    """A deflate stream without zlib's wrapping, as some clients send it."""
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (gzip.compress(TEXT, mtime=0), b"gzip"),
        (gzip.compress(TEXT, mtime=0), b" GZip "),
        (gzip.compress(TEXT, mtime=0), b"x-gzip"),
        (zlib.compress(TEXT), b"deflate"),
        (bare_deflate(TEXT), b"deflate"),
        (TEXT, b"identity"),
    ],
)
def test_reads_what_others_wrote(body: bytes, coding: bytes) -> None:
    assert decompress(body, coding, LIMIT) == TEXT


def test_reads_up_to_the_limit_and_not_one_byte_more() -> None:
    assert len(decompress(gzip.compress(bytes(LIMIT)), b"gzip", LIMIT)) == LIMIT
    with pytest.raises(Refused, match=f"more than {LIMIT} bytes") as refused:
        decompress(gzip.compress(bytes(LIMIT + 1)), b"gzip", LIMIT)
    assert refused.value.http_status == 400


@pytest.mark.parametrize(
    ("body", "coding", "reason", "status"),
    [
        (gzip.compress(TEXT, mtime=0)[:-9], b"gzip", "cut short", 400),
        (gzip.compress(TEXT, mtime=0) + b"more", b"gzip", "behind its end", 400),
        (b"not gzip at all", b"gzip", "cannot be read", 400),
        (b"\xff\xff\xff", b"deflate", "cannot be read", 400),
        (b"", b"gzip", "cut short", 400),
        (TEXT, b"br", "'br' is not accepted", 415),
        (TEXT, b"gzip, gzip", "not accepted", 415),
    ],
)
def test_refuses_with_the_reason(body: bytes, coding: bytes, reason: str, status: int) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        decompress(body, coding, LIMIT)
    assert refused.value.http_status == status


def test_writes_what_others_read() -> None:
    assert gzip.decompress(compress(TEXT, b"gzip")) == TEXT
    assert zlib.decompress(compress(TEXT, b"deflate")) == TEXT
    assert compress(TEXT, b"") == TEXT


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (b"", b""),
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b"br, deflate, gzip", b"deflate"),
        (b"gzip;q=0, deflate;q=0.5", b"deflate"),
        (b"GZIP ; q=1", b"gzip"),
        (b"identity", b""),
        (b"gzip; q = 0", b""),
    ],
)
def test_chooses_the_first_coding_that_the_client_takes(accept: bytes, coding: bytes) -> None:
    assert chosen_coding(accept) == coding
