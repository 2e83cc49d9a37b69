"""Run `learn_prices` as a training: progress, curve, TensorBoard, and the artifact as other learners write it."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from policies.placement.prices import PricedAgents, Prices, PriceSettings, learn_prices, save_prices
from policies.placement.training import Run, Settings, score
from policies.placement.workload import draw_slots


def price_settings(settings: Settings) -> PriceSettings:
    """How a run learns prices: from nothing while it cools, or from `convention`'s split, which is settled."""
    soft = not settings.start
    temperature = PriceSettings.temperature if soft else 0.0
    return PriceSettings(settings.price_slots, settings.price_rounds, temperature=temperature, convention=not soft)


def train_prices(settings: Settings, folder: Path, resume: bool = False) -> Prices:
    """Learn and write `folder`/actors.{safetensors,json} and curve.jsonl. A round counts as `price_slots` steps."""
    if resume:
        raise ValueError("prices are learned in a minute or two; start again without --resume")
    if settings.start not in ("", "convention"):
        raise ValueError(f"start is {settings.start!r}; prices start from convention or nothing")
    settings = replace(settings, steps=settings.price_rounds * settings.price_slots)
    network, run = settings.network(), Run(settings, folder)
    held_out = draw_slots(network, settings.load(), settings.evaluation_slots, np.random.default_rng(10_000))
    figures: dict[str, float] = {}

    def report(round_: int, prices: Prices) -> None:
        figures.update(score(network, PricedAgents(network, prices), held_out))
        run.report((round_ + 1) * settings.price_slots, figures)

    run.open(0)
    prices = learn_prices(network, settings.load(), price_settings(settings), settings.seed, report)
    record = {"steps": settings.steps, "processor_s": run.elapsed_s(), **figures}
    save_prices(folder / "actors", prices, network, {"settings": asdict(settings), "record": record})
    return prices
