"""Sends a workload of images and clips in open loop, and drives the system that answers: policy by policy.

As `loadgen/sender.py`, nothing waits for the answers before: a request goes when its time has come, and how late it
really left is kept. Bodies and nodes differ by request here, and the whole answer is wanted.
"""

import asyncio
import contextlib
import io
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from policies.placement.edge_network import EdgeNetwork
from protocol.edge_records import EdgeLinkSpec, EdgeNodeSpec, EdgeSpec
from protocol.records import Deployment
from tidegate.edge_compare_workload import EdgeWorkload
from tidegate.running import GatewayError, RunningGateway

LEAD_S: Final = 0.05
PATIENCE_S: Final = 30.0
"""Beyond a request's deadline: the gateway gives up long before."""
LOAD_PATIENCE_S: Final = 60.0
REASON_PATIENCE_S: Final = 8.0
"""How long a policy that the scheduler says it cannot load may take: it tries again every few seconds."""
NEWS_S: Final = 0.8
"""The gateway asks nodes twice a second: what it says of them is no older."""
FORGETS_MB: Final = 1e-6
LIVE_NAMES: Final = {"exact": "exact-30ms"}
"""What the scheduler calls a policy that may not think as long as it likes."""
_NAP_S: Final = 0.1
_TICK_S: Final = 0.001
_STOP_GRACE_S: Final = 2.0
_LARGE_BODY_BYTES: Final = 1 << 20

OnProgress = Callable[[int, Counter[str]], None]
"""Told how many requests have left, and how those that ended did."""


@dataclass(slots=True)
class Sent:
    """What became of one request, by its number in the workload. `outcome` is the gateway's, or the client's own word.

    `lag_s`: how much later than wanted it left; `answer`: the JSON of a 200; `reason`: why there is none.
    """

    number: int
    lag_s: float
    outcome: str = "CANCELLED"
    answer: bytes = b""
    reason: str = ""


class PolicyUnusable(GatewayError):
    """The scheduler cannot place by this policy: says why."""


class EdgeOperator(RunningGateway):
    """A running gateway whose placement policy is changed, and which is asked for detections and tracks."""

    async def edge(self) -> dict[str, Any]:
        """The edge network as `/state` tells it. Raises `GatewayError` where there is none."""
        edge = (await self.state()).get("edge")
        if edge is None:
            raise GatewayError(f"the gateway at {self.url} serves no edge network: start one, as deploy/edge4.toml")
        return dict(edge)

    async def put(self, deployment: Deployment) -> None:
        """Replaces the desired state."""
        await self._call("PUT", "/admin/deployment", msgspec.json.encode(deployment))

    async def forget(self, deployment: Deployment, network: EdgeNetwork) -> None:
        """Lets every node unload its variants, so that no policy finds what another has loaded.

        Until the next `use` the nodes have no memory, and refuse.
        """
        await self.put(without_memory(deployment, network))

        async def empty() -> bool:
            nodes = (await self.edge())["nodes"]
            return all(not node["deployed"] and not node["loading"] for node in nodes if node["worker"])

        await self._until(empty, "nodes did not unload their variants")

    async def use(self, policy: str, deployment: Deployment) -> None:
        """Places by `policy` from now on; returns once the scheduler does, and every node is ready and idle.

        Raises `PolicyUnusable` with the scheduler's reason if it cannot.
        """
        assert deployment.edge is not None, "edge() has found one"
        await self.put(
            msgspec.structs.replace(deployment, edge=msgspec.structs.replace(deployment.edge, policy=policy))
        )
        wanted = LIVE_NAMES.get(policy, policy)
        gives_up_s = time.monotonic() + REASON_PATIENCE_S
        preloaded = {worker.node: set(worker.preload) for worker in deployment.workers if worker.node}

        async def ready() -> bool:
            edge = await self.edge()
            if edge["policy"] != policy or edge["placing_by"] != wanted or edge["reason"]:
                if edge["policy"] == policy and edge["reason"] and time.monotonic() > gives_up_s:
                    raise PolicyUnusable(edge["reason"])
                return False
            here = [node for node in edge["nodes"] if node["node"] in preloaded]
            loaded = all(preloaded[node["node"]] <= set(node["deployed"]) for node in here)
            return loaded and all(node["ready"] for node in here) and _idle(edge)

        await self._until(ready, f"{policy} did not come into force on idle nodes", LOAD_PATIENCE_S)

    async def until_idle_again(self) -> int:
        """Returns once no request is under way and every node has said so; variants loaded so far, by all nodes."""
        edge: dict[str, Any] = {}
        ends_s = time.monotonic() + NEWS_S

        async def idle() -> bool:
            nonlocal edge
            edge = await self.edge()
            return _idle(edge) and time.monotonic() > ends_s

        await self._until(idle, "nodes did not become idle")
        return sum(int(node["loads"]) for node in edge["nodes"])

    async def send(
        self, workload: EdgeWorkload, network: EdgeNetwork, on_progress: OnProgress, stop: asyncio.Event
    ) -> list[Sent]:
        """Every request at its time, and what became of it.

        Once `stop` is set nothing more is sent, and what has no answer 2 s later is CANCELLED; requests that never left
        are not in the list.
        """
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            return await _Run(session, self.url, workload, network.graph.names, on_progress, stop).run()


def without_memory(deployment: Deployment, network: EdgeNetwork) -> Deployment:
    """The same deployment with nodes that have room for nothing, and preload nothing."""
    assert deployment.edge is not None, "there is a network"
    graph = network.graph
    nodes = tuple(
        EdgeNodeSpec(
            name=name,
            latitude=float(graph.positions[k, 0]),
            longitude=float(graph.positions[k, 1]),
            tflops=float(graph.tflops[k]),
            memory_mb=FORGETS_MB,
            uplink_mbps=float(graph.uplink_mbps[k]),
        )
        for k, name in enumerate(graph.names)
    )
    links = tuple(
        EdgeLinkSpec(between=(graph.names[a], graph.names[b]), bandwidth_mbps=float(mbps), usd_per_megabit=float(usd))
        for (a, b), mbps, usd in zip(graph.links, graph.bandwidth_mbps, graph.routing_usd_per_mb, strict=True)
    )
    edge: EdgeSpec = msgspec.structs.replace(deployment.edge, graph="", nodes=nodes, links=links)
    workers = tuple(msgspec.structs.replace(worker, preload=()) for worker in deployment.workers)
    return msgspec.structs.replace(deployment, edge=edge, workers=workers)


def _idle(edge: dict[str, Any]) -> bool:
    return edge["requests"]["under_way"] == 0 and all(node["length"] == 0 for node in edge["nodes"])


class _Run:
    """One replay. State: the requests that left, and those under way."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        workload: EdgeWorkload,
        nodes: tuple[str, ...],
        on_progress: OnProgress,
        stop: asyncio.Event,
    ) -> None:
        self._session = session
        self._url = url
        self._workload = workload
        self._nodes = nodes
        self._on_progress = on_progress
        self._stop = stop
        self._sent: list[Sent] = []
        self._ends: Counter[str] = Counter()
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> list[Sent]:
        begins_s = time.perf_counter() + LEAD_S
        try:
            for number, arrival in enumerate(self._workload.arrivals):
                await self._until(begins_s + arrival.time_s)
                if self._stop.is_set():
                    break
                task = asyncio.create_task(self._send(number, begins_s + arrival.time_s))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
            await self._answers()
        finally:
            for task in list(self._under_way):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*self._under_way, return_exceptions=True)
        return sorted(self._sent, key=lambda sent: sent.number)

    async def _until(self, moment_s: float) -> None:
        # In short naps, so that stopping is felt; uvloop's timers count milliseconds.
        while (left_s := moment_s - time.perf_counter()) > 0.0 and not self._stop.is_set():  # noqa: ASYNC110
            await asyncio.sleep(min(max(left_s, _TICK_S), _NAP_S))

    async def _answers(self) -> None:
        give_up_s: float | None = None
        while self._under_way:
            if self._stop.is_set() and give_up_s is None:
                give_up_s = time.perf_counter() + _STOP_GRACE_S
            if give_up_s is not None and time.perf_counter() > give_up_s:
                return
            await asyncio.wait(self._under_way, timeout=_NAP_S)

    async def _send(self, number: int, wanted_s: float) -> None:
        arrival, item = self._workload.arrivals[number], self._workload.item(number)
        sent = Sent(number, max(0.0, time.perf_counter() - wanted_s))
        self._sent.append(sent)
        self._on_progress(len(self._sent), self._ends)
        headers = {
            "Content-Type": item.content_type,
            "X-Edge-Node": self._nodes[arrival.node],
            "X-Deadline-Ms": f"{arrival.deadline_s * 1e3:g}",
        }
        body = item.body if len(item.body) < _LARGE_BODY_BYTES else io.BytesIO(item.body)
        url = f"{self._url}/v1/{arrival.service}"
        try:
            async with asyncio.timeout(arrival.deadline_s + PATIENCE_S):
                async with self._session.post(url, data=body, headers=headers) as response:
                    told = await response.read()
            _read(sent, response.status, told)
        except TimeoutError:
            sent.outcome, sent.reason = "TIMEOUT", f"no answer {PATIENCE_S:g} s after its deadline"
        except (aiohttp.ClientError, OSError) as error:
            sent.outcome, sent.reason = "CONNECTION", str(error) or repr(error)
        finally:
            self._ends[sent.outcome] += 1
            self._on_progress(len(self._sent), self._ends)


class _Told(msgspec.Struct):
    """Of an answer or a refusal."""

    outcome: str = ""
    error: str = ""
    code: str = ""


def _read(sent: Sent, status: int, body: bytes) -> None:
    try:
        told = msgspec.json.decode(body, type=_Told)
    except msgspec.MsgspecError:
        sent.outcome, sent.reason = "UNREADABLE", f"HTTP {status} with something else than JSON"
        return
    if status == 200:
        sent.outcome, sent.answer = told.outcome or "OK", body
    else:
        sent.outcome, sent.reason = told.code or f"HTTP {status}", told.error
