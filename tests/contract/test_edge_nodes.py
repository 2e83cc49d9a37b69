"""Real node processes: requests enter, travel, are computed and come back; and what happens where they cannot."""

import asyncio
from pathlib import Path

import pytest

from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_rig import edge_rig


def test_a_request_is_answered_at_its_own_node_and_two_links_away(tmp_path: Path, board_url: str) -> None:
    """What is found is where it was put, in the original's pixels; the figures are those of Eqs. 3 to 5."""

    async def scenario() -> None:
        async with edge_rig(tmp_path, board_url, bright_deployment(tmp_path)) as rig:
            here = await rig.ask("a", "a", picture())
            assert here.attempt == Attempt.OK, here.reply
            (found,) = here.json["detections"]
            assert (found["label"], found["class"], found["score"]) == ("bright", 0, 0.9)
            assert found["box"] == pytest.approx([32, 16, 32, 32], abs=1.5)
            assert here.reply.new_instance
            assert here.reply.status.node == "a"

            async def linked() -> bool | None:
                return (await rig.ask("a", "c", picture())).attempt == Attempt.OK or None

            await rig.until(linked)
            there = await rig.ask("a", "c", picture(), configuration=1)
            assert there.attempt == Attempt.OK, there.reply
            assert there.json["detections"][0]["box"] == pytest.approx([32, 16, 32, 32], abs=2.5)
            assert there.reply.status.node == "c"
            assert not there.reply.new_instance
            megabits = 8 * there.reply.adapted_mb
            spent = there.reply.spent
            assert spent.emulated_access_s == pytest.approx(megabits / 100, rel=1e-9)
            assert spent.emulated_transmission_s == pytest.approx(2 * megabits / 100, rel=1e-9)
            assert spent.emulated_compute_s == pytest.approx(0.01, rel=1e-9)
            assert spent.decode_s > 0.0
            assert spent.adapt_s > 0.0
            assert spent.forward_s > 0.0

    asyncio.run(scenario())
