"""The outputs to save inside a layer: the trade-off curve of bytes and seconds, against all possible choices."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from gcbench.plan.policies.min_cut import Call, Selection, fewer, frontier


def call(seconds=1.0, nbytes=1, reads=(), *, needed=False, can_keep=True, must_run=False):
    return Call(
        name="mm",
        seconds=seconds,
        nbytes=nbytes,
        reads=tuple(reads),
        needed=needed,
        can_keep=can_keep,
        must_run=must_run,
    )


def rerun(calls, keep):
    """The calls that run again, by the definition: asked for one after the other, from the last to the first."""
    last_needed = max((v for v, c in enumerate(calls) if c.needed), default=-1)
    runs = []
    asked = {v for v, c in enumerate(calls) if c.needed}
    for v in reversed(range(len(calls))):
        forced = calls[v].must_run and v <= last_needed
        if forced or (v in asked and v not in keep):
            runs.append(v)
            asked |= set(calls[v].reads)
    return set(runs)


def everything(calls):
    """Of all that can be kept: (bytes, exact milliseconds) -> the fewest outputs that this takes."""
    found = {}
    choosable = [v for v, c in enumerate(calls) if c.can_keep]
    for size in range(len(choosable) + 1):
        for keep in itertools.combinations(choosable, size):
            milliseconds = sum(Fraction(round(calls[v].seconds * 1000)) for v in rerun(calls, set(keep)))
            found.setdefault((sum(calls[v].nbytes for v in keep), milliseconds), size)
    return found


def hull(points):
    """The corners of the lower convex hull, from the least bytes to the least time: those best at some price."""
    best_by_bytes = {}
    for nbytes, cost in sorted(points):
        if not best_by_bytes or cost < min(best_by_bytes.values()):
            best_by_bytes[nbytes] = cost
    left = list(best_by_bytes.items())
    corners = [left[0]]
    while corners[-1] != left[-1]:
        x, y = corners[-1]
        steepest = [(Fraction(b - x), c - y, (b, c)) for b, c in left if b > x]
        # The steepest fall; of equal ones the farthest.
        corners.append(min(steepest, key=lambda step: (step[1] / step[0], -step[0]))[2])
    return corners


def random_calls(seed):
    """Up to ten calls in whole milliseconds; every third has few values, so that costs often tie."""
    r = random.Random(seed)
    few = seed % 3 == 0
    calls = []
    for v in range(r.randint(1, 10)):
        reads = sorted(r.sample(range(v), min(v, r.choice([0, 1, 1, 2, 3]))))
        calls.append(
            call(
                seconds=(r.randrange(3) if few else r.randrange(1000)) / 1000,
                nbytes=r.randrange(3) if few else r.choice([0, r.randrange(10**10), r.randrange(100)]),
                reads=reads,
                needed=r.random() < 0.5,
                can_keep=r.random() < 0.8,
                must_run=r.random() < 0.15,
            )
        )
    return calls


@pytest.mark.parametrize("block", range(10))
def test_every_corner_is_found(block):
    for seed in range(30 * block, 30 * block + 30):
        calls = random_calls(seed)
        points = everything(calls)
        found = frontier(calls)
        assert [(f.kept_bytes, round(f.seconds * 1000)) for f in found] == hull(points), seed
        for f in found:
            runs = rerun(calls, set(f.keep))
            assert f.seconds == pytest.approx(sum(calls[v].seconds for v in runs), rel=1e-12, abs=0)
            assert f.kept_bytes == sum(calls[v].nbytes for v in f.keep)
            assert all(calls[v].can_keep for v in f.keep) and list(f.keep) == sorted(set(f.keep))
            assert f.skip == tuple(v for v in range(max(runs, default=0)) if v not in runs and v not in f.keep)
            assert len(f.keep) == points[f.kept_bytes, round(f.seconds * 1000)], "an output is kept for nothing"


def test_a_chain_by_hand():
    """Two needed calls behind a costly one: its output is worth more than theirs."""
    calls = [call(5, 3), call(1, 3, [0], needed=True), call(1, 3, [0], needed=True)]
    assert frontier(calls) == (
        Selection(keep=(), skip=(), kept_bytes=0, seconds=7.0),
        Selection(keep=(0,), skip=(), kept_bytes=3, seconds=2.0),
        Selection(keep=(1, 2), skip=(), kept_bytes=6, seconds=0.0),
    )


def test_what_only_leads_to_a_kept_output_is_skipped():
    calls = [call(4, 9), call(4, 1, [0]), call(1, 9, [1], needed=True)]
    assert Selection(keep=(1,), skip=(0,), kept_bytes=1, seconds=1.0) in frontier(calls)


def test_random_numbers_are_drawn_again_and_so_is_all_they_need():
    """The trap: with all that is needed kept, a dropout before it still runs, on an input that is kept or run again."""
    calls = [call(4, 8), call(2, 1, [0], must_run=True, can_keep=False), call(8, 8, [1], needed=True)]
    assert [(f.keep, f.seconds) for f in frontier(calls)] == [((), 14.0), ((2,), 6.0), ((0, 2), 2.0)]


def test_random_numbers_after_the_last_needed_call_are_not_drawn():
    """The recomputation stops before."""
    calls = [call(4, 8, needed=True), call(2, 1, [0], must_run=True)]
    assert [(f.keep, f.seconds) for f in frontier(calls)] == [((), 4.0), ((0,), 0.0)]


def test_what_may_not_be_kept_runs_again():
    calls = [call(4, 8), call(2, 1, [0], needed=True, can_keep=False)]
    assert [(f.keep, f.seconds) for f in frontier(calls)] == [((), 6.0), ((0,), 2.0)]


def test_outputs_that_hold_nothing_are_kept_where_they_save_time_only():
    calls = [call(0, 0, needed=True), call(3, 0, needed=True), call(3, 0)]
    assert frontier(calls) == (Selection(keep=(1,), skip=(), kept_bytes=0, seconds=0.0),)


def test_nothing_needed_costs_nothing():
    nothing = (Selection(keep=(), skip=(), kept_bytes=0, seconds=0.0),)
    assert frontier([]) == frontier([call(), call(must_run=True)]) == nothing


def test_choices_on_one_line_are_one_edge():
    """Ten equal calls, and thirds of a second that binary numbers do not have: two corners, not eleven."""
    calls = [call(0.1, 7, needed=True) for _ in range(10)]
    assert [(len(f.keep), f.seconds) for f in frontier(calls)] == [(0, 1.0), (10, 0.0)]


def test_a_tie_in_the_middle_is_one_edge_too():
    """The trap: at the price of the middle edge, which is that of the whole hull too, any point of it is cheapest."""
    calls = [
        call(2, 1, needed=True),
        call(1.5, 1),
        call(1.5, 1),
        call(4, 6, [1, 2], needed=True),
        call(2, 2, needed=True),
        call(1, 3, needed=True),
    ]
    corners = [(0, 12.0), (1, 10.0), (3, 7.0), (9, 1.0), (12, 0.0)]
    assert [(f.kept_bytes, f.seconds) for f in frontier(calls)] == corners


def layer(num_calls, seed):
    """A layer with the shape of a transformer's: many views that take no time, few costly calls."""
    r = random.Random(seed)
    calls = []
    for v in range(num_calls):
        view = r.random() < 0.4
        calls.append(
            call(
                seconds=0.0 if view else r.choice([1e-5, 3e-5, 1e-4, 5e-4]) * r.uniform(0.5, 2),
                nbytes=0 if view else r.randrange(2**22, 2**27),
                reads=sorted({max(0, v - 1 - int(r.expovariate(0.3))) for _ in range(r.randint(1, 3))}) if v else (),
                needed=not view and r.random() < 0.6,
            )
        )
    return calls


def test_a_layer_of_120_calls_takes_a_moment():
    """0.1 s here; the trap is an algorithm that takes minutes."""
    calls = layer(120, 0)
    found = frontier(calls)
    assert len(found) > 20


def area(corners):
    """Seconds times bytes below the lines between corners."""
    return sum(
        (right.kept_bytes - left.kept_bytes) * (left.seconds + right.seconds) / 2
        for left, right in itertools.pairwise(corners)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 3, 4, 5])
def test_no_other_choice_of_as_many_corners_loses_less(seed, most):
    corners = frontier(layer(22, seed))
    assert len(corners) > 5
    few = fewer(corners, most)
    others = [(corners[0], *inner, corners[-1]) for inner in itertools.combinations(corners[1:-1], most - 2)]
    assert (few[0], few[-1]) == (corners[0], corners[-1]) and len(few) <= most
    assert area(few) == pytest.approx(min(area(other) for other in others), rel=1e-9)


def test_few_corners_are_all_taken_and_one_is_refused():
    corners = frontier(layer(22, 0))
    assert fewer(corners, 99) == corners
    with pytest.raises(ValueError, match="2 or more"):
        fewer(corners, 1)
