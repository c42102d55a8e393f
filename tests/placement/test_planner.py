"""The planner is a pure function: budgets are kept, more is never slower, and what is refused is refused rightly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effusion.core.errors import BudgetError
from effusion.placement import planner
from effusion.placement.forecast import Part, Speed
from effusion.placement.plan import Plan
from effusion.placement.sizes import Piece

from .parts import SPEED, part

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(400, 60_000)), min_size=1, max_size=4)
DEVICES = st.sampled_from(["cpu", "cuda:0"])


def _parts(shapes: list[tuple[int, int]]) -> list[Part]:
    return [part(f"p{i}", blocks, size, activations=37 * size % 9001) for i, (blocks, size) in enumerate(shapes)]


def _plan(parts: list[Part], memory: int, device: str = "cpu") -> Plan | None:
    try:
        return planner.plan(parts, memory, None, device, SPEED)
    except BudgetError:
        return None


@settings(max_examples=100, deadline=None)
@given(SIZES, DEVICES, st.lists(st.integers(500, 1_500_000), min_size=2, max_size=8))
def test_budgets_are_kept_and_more_is_never_slower(
    shapes: list[tuple[int, int]], device: str, budgets: list[int]
) -> None:
    parts = _parts(shapes)
    before: Plan | None = None
    for memory in sorted(budgets):
        made = _plan(parts, memory, device)
        if made is None:
            assert memory < planner.least(parts)
            assert before is None, "what fits in less fits in more"
            continue
        assert made.peak <= memory
        assert before is None or made.seconds <= before.seconds * (1 + 1e-9)
        for p in parts:
            assert sum(r.nbytes for r in made.of(p.name)) in (p.nbytes, sum(x.nbytes for x in p.leaves))
        before = made


@settings(max_examples=100, deadline=None)
@given(SIZES, DEVICES)
def test_the_least_is_achievable_and_one_byte_less_is_not(shapes: list[tuple[int, int]], device: str) -> None:
    parts = _parts(shapes)
    least = planner.least(parts)
    made = _plan(parts, least, device)
    assert made is not None and made.peak <= least
    assert _plan(parts, least - 1, device) is None


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(10_000, 400_000), st.integers(0, 400_000))
def test_host_memory_is_kept_too(shapes: list[tuple[int, int]], memory: int, ram: int) -> None:
    parts = _parts(shapes)
    try:
        made = planner.plan(parts, memory, ram, "cuda:0", SPEED)
    except BudgetError:
        return
    assert made.peak <= memory and made.peak_ram <= ram
    rest = {r.home for r in made.rows}
    assert "host" not in rest or made.peak_ram


def test_everything_stays_where_it_fits() -> None:
    parts = [part(), part("vae", 2)]
    made = planner.plan(parts, 30_000, None, "cpu", SPEED)
    assert not any(r.travels for r in made.rows)
    assert made.peak == 10_000 + 500


def test_components_take_turns_before_blocks_are_streamed() -> None:
    parts = [part("text", 4, 100_000), part("net", 8, 100_000)]
    made = planner.plan(parts, 900_000, None, "cuda:0", SPEED)
    assert all(r.keep for r in made.rows if r.home == "host")
    assert made.peak <= 900_000


def test_what_is_kept_is_spread() -> None:
    pieces = part(blocks=10, size=100_000).blocks
    for count in range(2, 10):
        kept = sorted(pieces.index(p) for p in planner.spread(pieces)[:count])
        assert max(b - a for a, b in itertools.pairwise([*kept, 10])) <= 2 * -(-10 // count)
    made = planner.plan([part(blocks=10, size=100_000, activations=0)], 700_000, None, "cpu", SPEED)
    assert sum(r.nbytes for r in made.rows if r.keep) >= 400_000


def test_a_table_of_which_few_rows_are_read_stays_for_what_they_take() -> None:
    pieces = (Piece("embed", 1_000_000, 5_000), Piece("a", 200_000, 200_000), Piece("b", 200_000, 200_000))
    p = Part("text", pieces, pieces, 1000)
    assert planner.least([p]) < 250_000
    made = planner.plan([p], 250_000, None, "cpu", SPEED)
    assert [r.keep for r in made.of("text")] == [True, False, False]


def test_what_is_never_called_costs_nothing() -> None:
    used, unused = Piece("decoder", 100_000, 100_000), Piece("encoder", 900_000, 0)
    p = Part("vae", (unused, used), (unused, used), 1000)
    made = planner.plan([p], 120_000, None, "cuda:0", SPEED)
    assert made.peak <= 102_000


def test_weights_that_cant_leave_memory_are_counted_throughout_and_named() -> None:
    parts = [part("loose", 4, 10_000, bound=True), part("net", 8, 10_000)]
    made = planner.plan(parts, 130_000, None, "cpu", SPEED)
    assert all(not r.travels for r in made.of("loose"))
    assert min(s.weights for s in made.stages) >= 40_000
    with pytest.raises(BudgetError, match=r"\['loose'\].*torch_dtype='auto'"):
        planner.plan(parts, 40_000, None, "cpu", SPEED)


def test_the_ring_hides_fetching_only_where_computing_takes_longer() -> None:
    busy = part(blocks=8, size=100_000, activations=0, flops=1e12)
    idle = part(blocks=8, size=100_000, activations=0, flops=1.0)
    slow = Speed(1e9, 1e6, 1e10)
    assert planner.plan([busy], 450_000, None, "cuda:0", slow).seconds < 1e3 * 1.01
    assert planner.plan([idle], 450_000, None, "cuda:0", slow).seconds > 1.0
