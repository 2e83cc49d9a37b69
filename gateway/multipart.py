"""The first file of a multipart/form-data body: what browsers and `curl -F` send."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.request import Refused
from protocol.outcomes import Outcome

MOST_EMPTY_PARTS = 100
"""Before the first file: a body of nothing but empty parts would keep the event loop busy for seconds."""


def first_file(content_type: bytes, body: bytes) -> tuple[str, bytes]:
    """Content type and bytes of the first part that has content. Raises `Refused` (INVALID, 400)."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Refused(Outcome.INVALID, "multipart/form-data without a boundary", 400)
    collector = _Collector()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": collector.header_field,
                "on_header_value": collector.header_value,
                "on_header_end": collector.header_end,
                "on_part_data": collector.part_data,
                "on_part_end": collector.part_end,
            },
        )
        parser.write(body)
    except _Found:
        return collector.content_type or "application/octet-stream", bytes(collector.data)
    except FormParserError as error:
        raise Refused(Outcome.INVALID, f"the multipart body cannot be read: {error}", 400) from None
    raise Refused(Outcome.INVALID, "the multipart body holds no file", 400)


class _Found(Exception):
    """The first file is complete: what follows need not be read."""


class _Collector:
    """Keeps the first part that has data, with its content type; raises `_Found` at its end."""

    def __init__(self) -> None:
        self.content_type = ""
        self.data = bytearray()
        self._field = bytearray()
        self._value = bytearray()
        self._empty_parts = 0

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if bytes(self._field).lower() == b"content-type":
            self.content_type = bytes(self._value).partition(b";")[0].strip().lower().decode("latin-1")
        self._field.clear()
        self._value.clear()

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.data += data[start:end]

    def part_end(self) -> None:
        if self.data:
            raise _Found
        self.content_type = ""
        self._empty_parts += 1
        if self._empty_parts > MOST_EMPTY_PARTS:
            raise Refused(Outcome.INVALID, f"the multipart body begins with {self._empty_parts} empty parts", 400)
