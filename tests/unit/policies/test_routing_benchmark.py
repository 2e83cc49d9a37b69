"""`tidegate routing bench` measures every figure that it is to print."""

from policies.routing.benchmark import SIZES, measure


def test_every_figure_is_there_and_positive() -> None:
    found = measure(0.001)
    for n in SIZES:
        for what in ("draw_bisection", "draw_alias", "deadline"):
            assert found.pop(f"{what}_{n}_ns") > 0.0
    assert found.pop("simulator_fixed_table_per_s") > 1e5
    assert found.pop("simulator_deadline_per_s") > 1e5
    assert not found
