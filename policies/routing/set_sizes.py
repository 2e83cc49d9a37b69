"""Services of other sizes than the paper's, by names such as `2x8`, `3x4@0.7` and `1+2` (training and evaluation)."""

import re
from dataclasses import replace

from policies.routing.contract import InstanceKind, RoutingError
from policies.routing.presets import PAPER_KINDS, PAPER_REWARD_ACCURACY
from policies.routing.queueing_model import ServiceModel

MIDDLE = InstanceKind("modelled_middle", 1, 0.022, 0.805)
"""A variant between the paper's two: service time and accuracy are modelled."""
MIDDLE_REWARD = 0.7
PAPER_SIZE = "2x2"
PER_THIRD = 0.65
"""Factor on the paper's rates per instance of each of three variants: bursts load them about as they load its four."""


def sized(name: str, requirement_s: float = 0.3) -> tuple[ServiceModel, float]:
    """The service of a size and the factor on the paper's rates that goes with it.

    `2xN`: N heavy and N light instances; `3xN`: N of a modelled variant between them, too; rates grow with N.
    `H+L`: H heavy and L light instances at the paper's rates, as when others of its four are lost.
    `...@F`: rates F times as high.
    """
    counts = re.fullmatch(r"(2x|3x|\d+\+)(\d+)(?:@(\d+(?:\.\d+)?))?", name)
    each = int(counts[2]) if counts else 0
    rates = float(counts[3] or 1.0) if counts else 0.0
    heavy, light = PAPER_KINDS[0], PAPER_KINDS[-1]
    gain = (PAPER_REWARD_ACCURACY[0], PAPER_REWARD_ACCURACY[-1])
    if counts is None or each < 1 or counts[1] == "0+" or rates == 0.0:
        raise RoutingError(
            f"size = {name!r}: write 2xN, 3xN (N instances of each of two or three variants) or HEAVY+LIGHT; "
            "@F after it for rates F times as high"
        )
    if counts[1] == "3x":
        kinds = (heavy,) * each + (MIDDLE,) * each + (replace(light, rank=2),) * each
        reward = (gain[0],) * each + (MIDDLE_REWARD,) * each + (gain[1],) * each
        return ServiceModel(kinds, requirement_s, reward_accuracy=reward), each * PER_THIRD * rates
    first = each if counts[1] == "2x" else int(counts[1][:-1])
    service = ServiceModel(
        (heavy,) * first + (light,) * each, requirement_s, reward_accuracy=(gain[0],) * first + (gain[1],) * each
    )
    return service, (each / 2.0 if counts[1] == "2x" else 1.0) * rates
