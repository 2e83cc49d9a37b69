"""Posting a deployment leaves alone what operators switched meanwhile, and fills an empty board again."""

import asyncio
from pathlib import Path
from typing import cast

import msgspec
from typer.testing import CliRunner

from protocol.board import Board
from protocol.deployment import read_deployment
from protocol.records import Deployment
from tests.fakes.running_system import any_port
from tidegate.post_command import keep_posted, same_places
from tidegate.probe import answers

DEPLOYMENT = read_deployment(Path(__file__).parents[3] / "deploy" / "paper-t4.toml").desired_state()


class Memory:
    """A board's deployment, in memory."""

    def __init__(self, present: Deployment | None) -> None:
        self.present = present

    async def deployment(self) -> Deployment | None:
        return self.present

    async def put_deployment(self, deployment: Deployment) -> Deployment:
        self.present = msgspec.structs.replace(deployment, version=deployment.version + 1)
        return self.present


def switched() -> Deployment:
    """Another router, and one variant unloaded."""
    services = {name: msgspec.structs.replace(spec, router="light-only") for name, spec in DEPLOYMENT.services.items()}
    first, *others = DEPLOYMENT.workers
    unloaded = msgspec.structs.replace(
        first, instances=tuple(msgspec.structs.replace(one, loaded=False) for one in first.instances)
    )
    return msgspec.structs.replace(DEPLOYMENT, services=services, workers=(unloaded, *others), version=9)


def test_what_operators_switch_is_no_other_deployment() -> None:
    assert same_places(switched(), DEPLOYMENT)


def test_a_change_of_the_file_is() -> None:
    fewer = msgspec.structs.replace(DEPLOYMENT, workers=DEPLOYMENT.workers[1:])
    renamed = msgspec.structs.replace(DEPLOYMENT, name="other")
    assert not same_places(fewer, DEPLOYMENT)
    assert not same_places(renamed, DEPLOYMENT)


def test_an_empty_board_gets_what_was_there_last() -> None:
    board = Memory(switched())
    latest = asyncio.run(keep_posted(cast(Board, board), DEPLOYMENT))
    assert latest == switched()
    board.present = None
    again = asyncio.run(keep_posted(cast(Board, board), latest))
    assert again == board.present
    assert again.services == switched().services
    assert again.version == 10


def test_mistakes_are_named() -> None:
    import typer

    from tidegate.post_command import post

    app = typer.Typer()
    app.command()(post)
    missing = CliRunner().invoke(app, ["-f", "no-such-file.toml", "--board", "redis://127.0.0.1:1/0"])
    assert (missing.exit_code, "no-such-file.toml" in missing.stderr) == (1, True)
    away = CliRunner().invoke(
        app, ["-f", "deploy/paper-t4.toml", "--board", f"redis://127.0.0.1:{any_port()}/0", "--patience-s", "0"]
    )
    assert (away.exit_code, "no Redis answers" in away.stderr) == (1, True)


def test_a_probe_of_nobody_fails() -> None:
    assert not answers(f"http://127.0.0.1:{any_port()}/healthz")
    assert not answers("nonsense")
