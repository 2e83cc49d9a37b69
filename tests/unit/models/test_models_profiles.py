"""Profiles: quantile grids against closed formulas, JSON there and back, faults named, measuring for real."""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy import stats

from models.catalog import Accuracy, Emulation, Input, Variant, VariantError
from models.profile import measure
from models.profiles import Profile, ServiceTimes, modelled_profile, read_profiles, service_times, write_profiles


def emulated(law: Emulation) -> Variant:
    known = Accuracy(value=0.8, source="published")
    return Variant(name="e", service="s", runtime="emulated", labels=("a", "b"), accuracy=known, emulated=law)


def profile(*times: ServiceTimes) -> Profile:
    return Profile(variant="v", device="cpu", source="measured", times=times, co_located=("v", "w"))


def test_the_grid_holds_the_quantiles_of_an_exponential() -> None:
    draws = np.random.default_rng(5).exponential(0.02, 400_000)
    record = service_times(1, draws)
    assert record.samples == 400_000
    for percent in (10, 50, 90, 98):
        assert record.quantiles_s[percent] == pytest.approx(-0.02 * math.log(1 - percent / 100), rel=0.02)
    assert record.quantiles_s[0] == pytest.approx(draws.min(), abs=1e-9)
    assert record.quantiles_s[100] == pytest.approx(draws.max(), abs=1e-9)


@pytest.mark.parametrize("cv", [0.3, 0.8])
def test_a_modelled_gamma_profile_equals_scipys_quantiles(cv: float) -> None:
    law = Emulation(service_ms=40.0, cv=cv, distribution="gamma", fixed_share=0.4)
    got = modelled_profile(emulated(law), (1, 5), draws=100_000)
    reference = stats.gamma(a=1 / cv**2, scale=0.040 * cv**2)
    for probability in (0.1, 0.5, 0.9, 0.98):
        assert got.quantile_s(1, probability) == pytest.approx(reference.ppf(probability), rel=0.02)
        assert got.quantile_s(5, probability) == pytest.approx(3.4 * reference.ppf(probability), rel=0.02)
    assert got.mean_s(1) == pytest.approx(0.040, rel=0.03)
    assert got.source == "modelled"


def test_a_deterministic_profile_is_flat_and_between_sizes_lies_on_the_law() -> None:
    got = modelled_profile(emulated(Emulation(service_ms=43.0, fixed_share=0.4)), (1, 4, 5))
    for size in (1, 2, 3, 4, 5):
        assert got.grid_s(size) == pytest.approx(np.full(101, 0.043 * (0.4 + 0.6 * size)))
    with pytest.raises(ValueError, match="--batch 6"):
        got.grid_s(6)
    with pytest.raises(ValueError, match="fraction"):
        got.quantile_s(1, 98)


def test_json_there_and_back_and_ids_follow_content(tmp_path: Path) -> None:
    first = profile(service_times(1, [0.01, 0.02, 0.05]), service_times(3, [0.03]))
    second = profile(service_times(1, [0.01, 0.02, 0.06]))
    file = tmp_path / "deep" / "profiles.json"
    write_profiles(file, [first, second])
    assert read_profiles(file) == (first, second)
    assert [p.name for p in file.parent.iterdir()] == ["profiles.json"]
    assert first.id == read_profiles(file)[0].id != second.id


@pytest.mark.parametrize(
    ("change", "key", "remedy"),
    [
        (lambda p: p["times"][0].update(quantiles_s=[0.1] * 100), "quantiles_s", "length >= 101"),
        (lambda p: p["times"][0].update(quantiles_s=[0.1] * 100 + [0.05]), "quantiles_s", "rising"),
        (lambda p: p["times"][0].update(quantiles_s=[-0.1] * 101), "quantiles_s", "not negative"),
        (lambda p: p["times"].append(p["times"][0]), "v.times", "once, rising"),
        (lambda p: p.update(times=[]), "v.times", "once, rising"),
        (lambda p: p.update(accuracy={"source": "measured"}), "accuracy.source", "give a value"),
        (lambda p: p.update(source="guessed"), "source", "guessed"),
    ],
)
def test_a_fault_names_key_and_remedy(tmp_path: Path, change: Any, key: str, remedy: str) -> None:
    file = tmp_path / "p.json"
    write_profiles(file, [profile(service_times(1, [0.01]))])
    content = msgspec.json.decode(file.read_bytes())
    change(content["profiles"][0])
    file.write_bytes(msgspec.json.encode(content))
    with pytest.raises(VariantError) as caught:
        read_profiles(file)
    assert key in caught.value.key
    assert remedy in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="tidegate models profile"):
        read_profiles(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(VariantError, match="not valid JSON"):
        read_profiles(tmp_path / "broken.json")


def small_model(folder: Path) -> Variant:
    """An ONNX file that takes the mean over an 8x8 gray picture."""
    node = helper.make_node("ReduceMean", ["input"], ["out"], axes=[2, 3], keepdims=0)
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 8, 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", 3])
    graph = helper.make_graph([node], "mean", [image], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    return Variant(
        name="m",
        service="s",
        runtime="onnxruntime",
        path=str(folder / "m.onnx"),
        labels=("a", "b", "c"),
        input=Input(shape=(3, 8, 8)),
        accuracy=Accuracy(value=0.5, source="measured"),
    )


def test_instances_are_measured_together(tmp_path: Path) -> None:
    variant = small_model(tmp_path)
    seen: list[tuple[int, int]] = []
    got = measure(
        [variant, variant, emulated(Emulation(service_ms=7.0))],
        batch_sizes=(1, 3),
        window_s=0.05,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert [p.variant for p in got] == ["m", "e"]
    measured, modelled = got
    assert measured.source == "measured"
    assert measured.co_located == ("m",)
    assert measured.accuracy.value == 0.5
    assert [times.batch_size for times in measured.times] == [1, 3]
    for times in measured.times:
        assert times.samples > 10
        # All services of both instances fit into the two windows.
        assert times.samples * np.mean(times.quantiles_s[10:90]) < 2 * 0.05 * 1.5
    assert modelled.mean_s(3) == pytest.approx(0.021)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_instance_that_cannot_load_is_reported_not_waited_for(tmp_path: Path) -> None:
    variant = small_model(tmp_path)
    absent = msgspec.structs.replace(variant, name="absent", path=str(tmp_path / "absent.onnx"))
    with pytest.raises(VariantError, match="no such file"):
        measure([variant, absent], batch_sizes=(1,), window_s=0.05)
    with pytest.raises(VariantError, match="1 or more"):
        measure([variant], batch_sizes=(0,))
