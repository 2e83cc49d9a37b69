"""`tidegate routing use`, `shadow`, `rollback`: the router of a running service, changed without losing a request."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from gateway.router import ROUTERS, TABLE_ROUTERS
from protocol.records import RouterChoice, ServiceSpec, ShadowRecord, WouldBe
from tidegate.running import GatewayError, NotThere, RunningGateway

T = TypeVar("T")
errors = Console(stderr=True)
POLL_S: Final = 0.05
NEWS_S: Final = 0.2
"""A change has reached the scheduler by then: a table that comes later is the new router's."""
SHADOW_POLL_S: Final = 1.0

NAMES: Final = f"A router's name: {', '.join(ROUTERS)}"

Url = Annotated[str, typer.Option(help="The gateway.")]
Service = Annotated[str, typer.Option(help="Service; the only one if there is only one.")]
Token = Annotated[str, typer.Option(envvar="TIDEGATE_ADMIN_TOKEN", help="Admin token, if the gateway has one.")]
PolicyFile = Annotated[
    str,
    typer.Option(
        "--policy-file",
        help="Artifact, or folder of artifacts, of a learned router (as the scheduler's machine sees it);"
        " those shipped if not given.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Patience = Annotated[float, typer.Option(help="Seconds until a router has to be in force.")]


class Operator(RunningGateway):
    """A running gateway whose routers are changed. `service` as everywhere; "" is the only one."""

    async def name_of(self, service: str) -> str:
        """The service meant. Raises `GatewayError` that lists what there is."""
        names = sorted((await self.state())["services"])
        if service:
            await self.service(service)
            return service
        if len(names) != 1:
            raise GatewayError(f"name the service with --service: the gateway has {', '.join(names) or 'none'}")
        return str(names[0])

    async def choice(self, service: str) -> RouterChoice:
        """The router that the service should have now."""
        spec: ServiceSpec = (await self.deployment()).services[service]
        return RouterChoice(router=spec.router, policy_file=spec.policy_file)

    async def use(self, service: str, wanted: RouterChoice, patience_s: float) -> None:
        """Switches and waits until the router is in force. Raises `GatewayError` with the reason if it is not in time,
        after taking the change back."""
        before = await self.choice(service)
        if before == wanted and (await self.service(service))["routing_by"] == wanted.router:
            return
        await self._call("PUT", f"/admin/services/{service}/router", msgspec.json.encode(wanted))
        reason = await self._in_force(service, wanted.router, patience_s)
        if reason and before == wanted:
            raise GatewayError(f"{wanted.router} cannot route {service}: {reason}")
        if reason:
            await self._call("POST", f"/admin/services/{service}/rollback")
            raise GatewayError(f"{wanted.router} cannot route {service}: {reason}; {before.router} was put back")

    async def roll_back(self, service: str, patience_s: float) -> RouterChoice:
        """Takes the last change back and waits until that router is in force; gives it back."""
        await self._call("POST", f"/admin/services/{service}/rollback")
        choice = await self.choice(service)
        if reason := await self._in_force(service, choice.router, patience_s):
            raise GatewayError(f"{choice.router} is back, but not in force: {reason}")
        return choice

    async def _in_force(self, service: str, router: str, patience_s: float) -> str:
        """Empty once the router routes, by a table that was made after the change where it needs one; else, when
        patience ends, why it does not."""
        ends_s = time.monotonic() + patience_s
        await asyncio.sleep(NEWS_S)
        version = (await self.service(service))["table_version"] if router in TABLE_ROUTERS else -1
        while True:
            state = await self.service(service)
            if state["router"] == router == state["routing_by"] and state["table_version"] > version:
                return ""
            if time.monotonic() > ends_s:
                return str(state["reason"]) or f"it is not in force after {patience_s:g} s"
            await asyncio.sleep(POLL_S)

    async def shadow_by(self, service: str, wanted: RouterChoice) -> None:
        """Lets a router look on; an empty name ends that."""
        await self._call("PUT", f"/admin/services/{service}/shadow", msgspec.json.encode(wanted))

    async def shadow(self, service: str) -> ShadowRecord | None:
        """How the router that looks on would have done; None if there is none, or its first slot is not over."""
        with contextlib.suppress(NotThere):
            return msgspec.convert(await self._call("GET", f"/admin/services/{service}/shadow"), ShadowRecord)
        return None


def use(
    policy: Annotated[str, typer.Argument(help=f"{NAMES}.")],
    url: Url = "http://127.0.0.1:8700",
    service: Service = "",
    policy_file: PolicyFile = "",
    patience_s: Patience = 10.0,
    admin_token: Token = "",
    json_output: AsJson = False,
) -> None:
    """Route a running service by another policy; if it cannot be in force in time, the former one is put back.

    Example: tidegate routing use learned-po --policy-file runs/monday && tidegate routing rollback
    """

    async def go() -> dict[str, Any]:
        async with Operator(url, admin_token) as gateway:
            name = await gateway.name_of(service)
            started_s = time.monotonic()
            await gateway.use(name, RouterChoice(router=policy, policy_file=_absolute(policy_file)), patience_s)
            return {"service": name, "router": policy, "seconds": round(time.monotonic() - started_s, 3)}

    told = _ended(go())
    _print(told, json_output, f"{told['service']} is routed by {policy} (after {told['seconds']:.2f} s)")


def rollback(
    url: Url = "http://127.0.0.1:8700",
    service: Service = "",
    patience_s: Patience = 10.0,
    admin_token: Token = "",
    json_output: AsJson = False,
) -> None:
    """Take the last change of a service's router back; again, the one before it (20 are kept).

    Example: tidegate routing rollback --service imagenet
    """

    async def go() -> dict[str, Any]:
        async with Operator(url, admin_token) as gateway:
            name = await gateway.name_of(service)
            choice = await gateway.roll_back(name, patience_s)
            return {"service": name, "router": choice.router, "policy_file": choice.policy_file}

    told = _ended(go())
    by = f" of {told['policy_file']}" if told["policy_file"] else ""
    _print(told, json_output, f"{told['service']} is routed by {told['router']}{by} again")


def shadow(
    policy: Annotated[
        str, typer.Argument(help=f"{NAMES}. The word none ends the shadow; without any, the one at work is shown.")
    ] = "",
    url: Url = "http://127.0.0.1:8700",
    service: Service = "",
    policy_file: PolicyFile = "",
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Watch for so long (a new one for 3 at least), then print; it goes on.")
    ] = 5.0,
    admin_token: Token = "",
    json_output: AsJson = False,
) -> None:
    """Let a policy decide beside the real one without acting, and show what would have become of the requests.

    Both run in one queueing model, fed with the arrivals that the workers count since it looks on; what the workers
    observed stands beside. Ctrl-C ends the watching, not the shadow.

    Example: tidegate routing shadow learned-po --seconds 60, and in the end tidegate routing shadow none
    """

    wanted = RouterChoice(router="" if policy == "none" else policy, policy_file=_absolute(policy_file))

    async def go() -> ShadowRecord | None:
        async with Operator(url, admin_token) as gateway:
            name = await gateway.name_of(service)
            if policy:
                await gateway.shadow_by(name, wanted)
            if policy == "none":
                return None
            record: ShadowRecord | None = None
            ends_s = time.monotonic() + max(seconds, 3.0 if policy else 0.0)
            with errors.status("watching") as status:
                while True:
                    news = await gateway.shadow(name)
                    if news is not None and (news.choice == wanted or not policy):
                        record = news
                        status.update(f"{record.choice.router}, {record.slots} slots")
                    if time.monotonic() > ends_s or (record is not None and record.reason):
                        break
                    await asyncio.sleep(min(SHADOW_POLL_S, max(0.0, ends_s - time.monotonic()) + 0.01))
            if record is None and policy:
                raise GatewayError(
                    f"nothing was heard of {policy} yet: is the scheduler running? It goes on looking on"
                )
            if record is None:
                raise GatewayError(f"no router looks on at {name}: name one, as tidegate routing shadow learned-po")
            return record

    record = _ended(go())
    if record is None:
        _print({"shadow": None}, json_output, "no router looks on any more")
        return
    if json_output:
        print(msgspec.json.encode(record).decode())
    elif not record.reason:
        _show(record)
    if record.reason:
        text = f"{record.choice.router} cannot decide: {record.reason}"
        errors.print(text, style="red", highlight=False, markup=False)
        raise typer.Exit(1)


def _show(record: ShadowRecord) -> None:
    """A table; of no requests there are no shares."""
    table = Table("", "requests", "goodput", "violations", "heavy", title=f"{record.slots} slots")
    for name, row in (
        (f"{record.choice.router} would have had", record.shadow),
        (f"{record.active_router} in the same model", record.active),
        (f"{record.active_router} as the workers counted", record.observed),
    ):
        table.add_row(
            name, f"{row.requests:,}", *(f"{100 * share:.2f}%" if row.requests else "" for share in _ratios(row))
        )
    Console().print(table)
    if not record.observed.requests:
        print("no request has ended since it looks on")
    if record.weights:
        shares = ", ".join(f"{one} {100 * weight:.1f}%" for one, weight in record.weights.items())
        print(f"its table now: {shares}")


def _ratios(row: WouldBe) -> tuple[float, float, float]:
    return row.goodput_ratio, row.violation_ratio, row.heavy_ratio


def _absolute(file: str) -> str:
    """The scheduler has another working directory than this command."""
    return str(Path(file).resolve()) if file else ""


def _ended(main: Awaitable[T]) -> T:
    async def awaited() -> T:
        return await main

    try:
        return asyncio.run(awaited())
    except GatewayError as error:
        errors.print(f"tidegate routing: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None


def _print(told: dict[str, Any], json_output: bool, text: str) -> None:
    print(json.dumps(told) if json_output else text)
