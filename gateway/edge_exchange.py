"""POST /v1/{edge service}: the image or clip is the body, the answer is JSON with the decision, delays and costs.

The same life on a connection as a classified image's (`exchange.py`); what differs is the head (where the request
enters, what a body may be), where it goes, and what the answer says. The body goes to its node as it came, in the
pieces in which it arrived: nothing here decodes, joins or copies a clip.
"""

import math
from typing import Final

from gateway.admission import budget_ms, check_length
from gateway.edge_answer import Account, account_of, edge_answer
from gateway.edge_request import EdgeAnswered, EdgeRequest, Ending, Net
from gateway.exchange import Exchange
from gateway.handle import PREFIX
from gateway.request import Refused, Request
from protocol.deployment import did_you_mean, few_of
from protocol.edge_records import EdgeServiceSpec
from protocol.outcomes import Outcome

IMAGE_TYPES: Final = ("image/jpeg", "image/png")
CLIP_TYPES: Final = ("video/mp4", "video/x-motion-jpeg", "multipart/form-data")
ACCEPTED_TYPES: Final = frozenset(
    {
        *IMAGE_TYPES,
        *CLIP_TYPES,
        "application/octet-stream",
        "image/jpg",
        "image/*",
        "video/quicktime",
        "video/x-m4v",
        "application/mp4",
        "video/x-mjpeg",
        "video/mjpeg",
        "video/x-jpeg",
        "multipart/x-mixed-replace",
        "multipart/mixed",
    }
)
_ANY_TYPE: Final = b"application/octet-stream"
_MOST_PIECES: Final = 512


class EdgeExchange(Exchange):
    """One edge request and its answer. Its body counts among the gateway's uploads until it has ended."""

    __slots__ = ("_account", "_local", "_net", "_service")
    breathes = True

    _account: Account | None
    _local: int
    _net: Net | None
    _service: str

    def _admit(self) -> None:
        gateway = self._gateway
        self._service = self._path[len(PREFIX) :]
        self._net = self._account = None
        self._arrived_s = gateway.arrived(self._service)
        if self._spoilt is not None:
            raise self._spoilt
        spec = gateway.edge_view.services.get(self._service)
        if spec is None:
            raise Refused(Outcome.INVALID, f"{self._service} is not deployed any more; see /state", 404)
        self._content_type, self._budget_s = check_edge_head(spec, self._method, self._headers)
        net = gateway.edge_view.net
        if net is None or self._service not in net.service_of:
            reason = gateway.edge_view.fault or "the edge network is being read"
            raise Refused(Outcome.UNAVAILABLE, f"{self._service}: {reason}")
        self._net = net
        self._local = local_node(net, self._headers)
        self._limit = spec.max_body_bytes

    def _dispatch(self) -> None:
        assert self._net is not None, "a request whose head was refused has ended"
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        parts, self._parts = self._parts, []
        if not self._size:
            self._end(Refused(Outcome.INVALID, "the body is empty: POST the encoded image or clip as the body", 400))
            return
        deadline_s = self._arrived_s + self._budget_s
        self._request = request = EdgeRequest(
            self._id,
            self._net,
            self._service,
            self._local,
            self._arrived_s,
            deadline_s,
            parts if len(parts) <= _MOST_PIECES else (b"".join(parts),),
            self._content_type,
        )
        self._gateway.edge.start(request, self._end)

    def _retry_after_s(self) -> float:
        return 1.0

    def _answer_body(self, end: Ending, outcome: Outcome, total_s: float) -> bytes:
        assert isinstance(end, EdgeAnswered), "without a refusal and with somebody to tell there is an answer"
        self._account = account_of(end)
        return edge_answer(end, outcome, self._account, total_s)

    def _count(self, request: Request | EdgeRequest | None, end: Ending, outcome: Outcome, total_s: float) -> None:
        assert request is None or isinstance(request, EdgeRequest), "edge requests are made here"
        account = self._account
        if account is None and isinstance(end, EdgeAnswered):  # its client had left
            account = account_of(end)
        self._gateway.count_edge(self._service, request, outcome, end, account, total_s)


def check_edge_head(spec: EdgeServiceSpec, method: str, headers: dict[bytes, bytes]) -> tuple[str, float]:
    """The content type as it was given and the budget in seconds. Raises `Refused` (INVALID)."""
    if method != "POST":
        raise Refused(Outcome.INVALID, f"{method} is not allowed here: POST the image or clip as the body", 405)
    given = headers.get(b"content-type", _ANY_TYPE).decode("latin-1")
    name = given.partition(";")[0].strip().lower()
    if name and name not in ACCEPTED_TYPES:
        accepted = ", ".join((*IMAGE_TYPES, *CLIP_TYPES))
        raise Refused(Outcome.INVALID, f"content type {name[:80]!r} is not accepted: send {accepted}", 415)
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise Refused(Outcome.INVALID, "Content-Encoding is not accepted here: send the file's own bytes", 415)
    check_length(headers.get(b"content-length"), spec.max_body_bytes)
    return given, budget_ms(headers, spec.requirement_ms) / 1e3


def local_node(net: Net, headers: dict[bytes, bytes]) -> int:
    """The node at which a request enters: by `X-Edge-Node`, else the nearest to `X-Position`, else the first.

    Raises `Refused` (INVALID) for a node that does not exist and for what is no position.
    """
    named = headers.get(b"x-edge-node")
    if named is not None:
        name = named.decode("latin-1").strip()
        if name not in net.node_of:
            known = ", ".join(few_of(net.node_of))
            meant = did_you_mean(name, net.node_of)
            raise Refused(Outcome.INVALID, f"X-Edge-Node = {name[:80]!r}: no such node; there are {known}{meant}", 400)
        return net.node_of[name]
    given = headers.get(b"x-position")
    if given is None:
        return 0
    try:
        latitude, longitude = (float(part) for part in given.split(b","))
    except ValueError:
        latitude = longitude = math.nan
    if b"_" in given or not (-90.0 <= latitude <= 90.0 and -180.0 <= longitude <= 180.0):
        shown = given[:60].decode("latin-1")
        raise Refused(
            Outcome.INVALID, f"X-Position = {shown!r}: must be LATITUDE,LONGITUDE in degrees, as -37.814,144.963", 400
        )
    return net.network.graph.nearest_node(latitude, longitude)
