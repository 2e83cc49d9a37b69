"""The first file of a form: found whatever surrounds it, and never at great cost."""

from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart
from email.policy import HTTP

import pytest

from gateway.multipart import MOST_EMPTY_PARTS, first_file
from gateway.request import Refused
from protocol.outcomes import Outcome

FORM = b"multipart/form-data; boundary=xyz"


def _form(*parts: tuple[str, bytes]) -> bytes:
    body = b""
    for headers, content in parts:
        body += b"--xyz\r\n" + headers.encode() + b"\r\n\r\n" + content + b"\r\n"
    return body + b"--xyz--\r\n"


def test_the_standard_librarys_form_is_read() -> None:
    message = MIMEMultipart("form-data", boundary="a-b")
    file = MIMEApplication(b"x", "octet-stream", _encoder=lambda part: None)
    file["Content-Disposition"] = 'form-data; name="file"; filename="a.png"'
    message.attach(file)
    body = message.as_bytes(policy=HTTP).partition(b"\r\n\r\n")[2]
    assert first_file(b'multipart/form-data; boundary="a-b"', body) == ("application/octet-stream", b"x")


def test_the_first_part_with_content_wins_and_the_rest_is_not_read() -> None:
    body = _form(("content-type: text/plain", b""), ("Content-Type: IMAGE/JPEG; q=1", b"one"), ("x: y", b"two"))
    assert first_file(FORM, body + b"garbage") == ("image/jpeg", b"one")


def test_a_part_without_a_type_does_not_inherit_one() -> None:
    assert first_file(FORM, _form(("content-type: image/png", b""), ("x: y", b"data"))) == (
        "application/octet-stream",
        b"data",
    )


def test_content_that_looks_like_a_boundary_is_kept() -> None:
    content = b"\r\n--xy\r\n--xyy\r\n-- xyz"
    assert first_file(FORM, _form(("content-type: image/png", content)))[1] == content


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (b"multipart/form-data", _form(("x: y", b"data"))),
        (b"multipart/form-data; boundary=", _form(("x: y", b"data"))),
        (b"multipart/form-data; boundary=" + b"b" * 10_000, _form(("x: y", b"data"))),
        (b"multipart/form-data; boundary=\xff\xfe", _form(("x: y", b"data"))),
        (FORM, b""),
        (FORM, b"no form at all"),
        (FORM, _form(("x: y", b"data"))[:-12]),
        (FORM, _form(("x: y", b""))),
        (FORM, _form(*[("x: y", b"")] * (MOST_EMPTY_PARTS + 1), ("x: y", b"data"))),
        (FORM, b"--xyz\r\n" + b"a: b\r\n" * 100_000),
        (FORM, b"--xyz\r\nbad header\x00: \x01\r\n\r\ndata\r\n--xyz--"),
    ],
)
def test_bad_forms_are_invalid(content_type: bytes, body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        first_file(content_type, body)
    assert (caught.value.outcome, caught.value.http_status) == (Outcome.INVALID, 400)
