"""The option chosen for each layer: the fastest that fits, against every choice there is."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from gcbench.plan.layer_mix import dynamic_program
from gcbench.plan.layer_mix import problem as mix
from gcbench.plan.layer_mix.problem import Option, Problem, frontier, peak, smallest, solve

MS = 1e-3


def option(milliseconds, kept, forward, backward):
    return Option(seconds=milliseconds * MS, kept_bytes=kept, forward_bytes=forward, backward_bytes=backward)


def problem(options, gradients=None, *, standing=0, head=0, loss_left=0, other=0, budget=0):
    return Problem(
        options=tuple(tuple(layer) for layer in options),
        gradient_bytes=tuple(gradients or [0] * len(options)),
        standing_bytes=standing,
        head_bytes=head,
        loss_left_bytes=loss_left,
        other_peak_bytes=other,
        budget_bytes=budget,
    )


def random_problem(seed):
    """Up to six layers of up to four options; the shape of the numbers changes with the seed."""
    r = random.Random(seed)
    largest = [2, 10, 10**10, 10**12][seed % 4]
    alike = seed % 3 != 0

    def options():
        found = []
        for _ in range(r.randint(1, 4)):
            kept = r.choice([0, r.randrange(largest)])
            above = r.choice([0, r.randrange(largest), kept])
            found.append(option(r.randrange(r.choice([2, 10, 10**6])), kept, kept + above, kept + r.randrange(largest)))
        return tuple(found)

    kinds = [options() for _ in range(r.randint(1, 2))]
    layers = [r.choice(kinds) if alike else options() for _ in range(r.randint(1, 6))]
    return problem(
        layers,
        [r.choice([0, r.randrange(2 * largest)]) for _ in layers],
        standing=r.randrange(largest),
        head=r.randrange(2 * largest),
        loss_left=r.choice([0, r.randrange(largest)]),
        other=r.choice([0, r.randrange(5 * largest)]),
    )


def every_choice(p):
    """All choices with their milliseconds and peaks, the peaks written out as they are defined."""
    choices = np.array(list(itertools.product(*(range(len(layer)) for layer in p.options))))
    n = len(p.options)

    def of(name):
        return np.array([[getattr(o, name) for o in layer] + [0] * (4 - len(layer)) for layer in p.options])[
            np.arange(n), choices
        ]

    kept, forward, backward = of("kept_bytes"), of("forward_bytes"), of("backward_bytes")
    peaks = np.full(len(choices), p.other_peak_bytes)
    for i in range(n):
        before = p.standing_bytes + kept[:, :i].sum(axis=1)
        peaks = np.maximum(peaks, before + forward[:, i])
        later = sum(p.gradient_bytes[j] for j in range(i + 1, n))
        peaks = np.maximum(peaks, before + p.loss_left_bytes + later + backward[:, i])
    peaks = np.maximum(peaks, p.standing_bytes + kept.sum(axis=1) + p.head_bytes)
    return choices, np.rint(of("seconds") / MS).astype(np.int64).sum(axis=1), peaks


def budgets_of(peaks, seed):
    """Peaks of some choices and a byte below each, the lowest and the highest among them."""
    some = [*random.Random(seed).choices(peaks.tolist(), k=4), int(peaks.min()), int(peaks.max())]
    return [budget + more for budget in some for more in (0, -1)]


def is_tidy(p, choice):
    """Whether the layers of each kind come by rising kept bytes."""
    for kind in set(p.options):
        kept = [kind[number].kept_bytes for layer, number in zip(p.options, choice, strict=True) if layer == kind]
        if kept != sorted(kept):
            return False
    return True


def check(p, found, choices, milliseconds, peaks):
    """`found` is what the brute force finds in `p`'s budget."""
    fits = peaks <= p.budget_bytes
    if not fits.any():
        assert found is None
        return
    assert found is not None and found.unproven_seconds == 0
    chosen = int(np.flatnonzero((choices == found.choice).all(axis=1))[0])
    assert found.peak_bytes == peaks[chosen] == peak(p, found.choice)
    assert found.peak_bytes <= p.budget_bytes
    assert found.seconds == pytest.approx(milliseconds[chosen] * MS, abs=1e-12)
    fastest = milliseconds[fits].min()
    assert milliseconds[chosen] == fastest
    if not is_tidy(p, found.choice):
        # Then no arrangement of these options that is tidy fits, or it would have been taken.
        alike = [
            other
            for other in np.flatnonzero(fits & (milliseconds == fastest))
            if is_tidy(p, choices[other])
            and all(
                sorted(number for layer, number in zip(p.options, choices[other], strict=True) if layer == kind)
                == sorted(number for layer, number in zip(p.options, found.choice, strict=True) if layer == kind)
                for kind in set(p.options)
            )
        ]
        assert not alike


@pytest.mark.parametrize("block", range(10))
def test_nothing_that_fits_is_faster(block):
    for seed in range(18 * block, 18 * block + 18):
        p = random_problem(seed)
        everything = every_choice(p)
        for budget in budgets_of(everything[2], seed):
            within = replace(p, budget_bytes=budget)
            check(within, solve(within), *everything)


@pytest.mark.parametrize("widths", [dynamic_program._WIDTHS, (1, 3, 10**6)], ids=["usual", "narrow first"])
def test_of_equal_times_the_lowest_peak_is_found(monkeypatch, widths):
    """Asked of the search itself: tidying afterwards may take a higher one."""
    monkeypatch.setattr(dynamic_program, "_WIDTHS", widths)
    for seed in range(60):
        p = random_problem(seed)
        p = replace(
            p,
            other_peak_bytes=0,
            options=tuple(
                tuple(replace(o, seconds=round(o.seconds / MS) % 3 * MS) for o in layer) for layer in p.options
            ),
        )
        _, milliseconds, peaks = every_choice(p)
        for budget in budgets_of(peaks, seed):
            fits = peaks <= budget
            found = mix._search(p).fastest(budget)
            if not fits.any():
                assert found is None
                continue
            fastest = milliseconds[fits].min()
            assert found.reach_bytes == peaks[fits & (milliseconds == fastest)].min()


def test_the_smallest_is_the_lowest_peak_and_then_the_fastest():
    for seed in range(100):
        p = random_problem(seed)
        everything = every_choice(p)
        lowest = int(everything[2].min())
        found = smallest(p)
        assert found.peak_bytes == lowest
        check(replace(p, budget_bytes=lowest), found, *everything)


def test_many_budgets_at_once_find_what_each_finds_alone():
    for seed in range(60):
        p = random_problem(seed)
        everything = every_choice(p)
        budgets = budgets_of(everything[2], seed) * 2
        for budget, found in zip(budgets, frontier(p, budgets), strict=True):
            check(replace(p, budget_bytes=budget), found, *everything)


def test_a_peak_by_hand():
    layers = [[option(0, 10, 11, 17)], [option(0, 20, 29, 22)]]
    p = problem(layers, [1000, 3], standing=100, head=8, loss_left=5)
    # forward: 100 + 11, 100 + 10 + 29; head: 100 + 30 + 8; backward: 100 + 5 + 10 + 22, 100 + 5 + 3 + 17
    assert peak(p, (0, 0)) == 139
    assert peak(replace(p, head_bytes=10), (0, 0)) == 140
    assert peak(replace(p, loss_left_bytes=9), (0, 0)) == 141
    assert peak(replace(p, gradient_bytes=(1000, 19)), (0, 0)) == 141
    assert peak(replace(p, other_peak_bytes=150), (0, 0)) == 150


def test_no_layers_leave_the_head():
    p = problem([], standing=5, head=7, budget=12)
    assert solve(p) == smallest(p) == mix.Solution(choice=(), seconds=0.0, peak_bytes=12)
    assert solve(replace(p, budget_bytes=11)) is None


LIGHT, HEAVY = option(7, 1, 10, 10), option(0, 5, 14, 14)


def test_equal_layers_come_in_blocks_with_the_heaviest_last():
    p = problem([(HEAVY, LIGHT)] * 12, budget=12 + 4 * 5 + 9)
    found = solve(p)
    assert found.choice == (1,) * 7 + (0,) * 5
    assert found.peak_bytes <= p.budget_bytes


def test_kinds_of_layers_are_put_in_order_each_for_itself():
    other = tuple(replace(o, seconds=2 * o.seconds) for o in (LIGHT, HEAVY))
    p = problem([(HEAVY, LIGHT), other] * 5, budget=10 + 7 * 4 + 9)
    assert solve(p).choice == (1, 1, 1, 1, 1, 1, 0, 1, 0, 1)


def test_where_gradients_outgrow_what_is_kept_the_heaviest_come_first():
    """The trap: the first layers' backward pass is high when they keep little, with all other gradients beside it."""
    light, heavy = option(7, 1, 1, 30), option(0, 5, 5, 14)
    p = problem([(heavy, light)] * 4, [10] * 4, head=36)
    p = replace(p, budget_bytes=peak(p, (0, 0, 1, 1)))
    assert peak(p, (1, 1, 0, 0)) > p.budget_bytes
    assert solve(p).choice == (0, 0, 1, 1)


def test_where_not_all_kinds_can_rise_each_is_put_as_it_fits():
    """One kind can only fall, as above, and the other rises; an order that fits neither found is left alone."""
    light, heavy = option(7, 1, 1, 30), option(0, 5, 5, 14)
    p = problem([(heavy, light)] * 4 + [(HEAVY, LIGHT)] * 3, [10] * 4 + [0] * 3, head=36)
    assert mix._tidied(p, (0, 0, 1, 1, 0, 1, 0), peak(p, (0, 0, 1, 1, 0, 1, 0))) == (0, 0, 1, 1, 1, 0, 0)
    assert mix._tidied(p, (0, 1, 0, 1, 0, 1, 1), peak(p, (0, 1, 0, 1, 0, 1, 1))) == (0, 0, 1, 1, 1, 1, 0)
    assert mix._tidied(p, (0, 0, 1, 1, 1, 1, 0), 10**9) == (1, 1, 0, 0, 1, 1, 0)
    assert mix._tidied(p, (0, 1, 0, 1, 1, 1, 0), 0) == (0, 1, 0, 1, 1, 1, 0)


def test_the_bound_knows_how_much_may_be_allocated_when_an_option_begins():
    """The fast option of the last layer leaves the first no room: the bound is the best choice itself, not 0."""
    first = [option(10, 0, 0, 0), option(0, 10, 10, 10)]
    last = [option(0, 0, 100, 100), option(100, 0, 0, 0)]
    search = mix._search(problem([first, last]))
    bound = search._bounds(100)[-1].at(np.array([100]))
    assert bound[0] / search.units_per_s == pytest.approx(10 * MS)


def test_times_are_added_as_decimals():
    """The trap: 0.1 + 0.2 > 0.3 in binary, and the lower peak would lose to a rounding error."""
    first = [option(100, 10, 10, 10), option(300, 0, 0, 0)]
    second = [option(200, 0, 1, 1), option(0, 0, 12, 12)]
    found = solve(problem([first, second], budget=15))
    assert (found.choice, found.peak_bytes) == ((0, 0), 11)


def forward_program(p):
    """The least milliseconds by a plain table over kept bytes, first layer to last: no bounds, no dominance."""
    best = {0: 0}
    for i, layer in enumerate(p.options):
        above = p.standing_bytes + p.loss_left_bytes + sum(p.gradient_bytes[i + 1 :])
        following = {}
        for kept, milliseconds in best.items():
            for o in layer:
                if max(p.standing_bytes + kept + o.forward_bytes, above + kept + o.backward_bytes) <= p.budget_bytes:
                    cost = milliseconds + round(o.seconds / MS)
                    after = kept + o.kept_bytes
                    following[after] = min(cost, following.get(after, cost))
        best = following
    fitting = [ms for kept, ms in best.items() if p.standing_bytes + kept + p.head_bytes <= p.budget_bytes]
    return min(fitting, default=None)


def deep_problem(seed, layers=24):
    """Small numbers of bytes, so that a table over them stays small; seconds from equal to wildly different."""
    r = random.Random(seed)
    most_ms = [3, 1000, 10**9][seed % 3]

    def options():
        found = []
        for _ in range(5):
            kept = r.randrange(30)
            cost = r.randrange(most_ms) if seed % 2 else (30 - kept) * (most_ms // 3)
            found.append(option(cost, kept, kept + r.randrange(20), kept + r.randrange(60)))
        return tuple(found)

    kinds = [options() for _ in range(3)]
    own = [r.choice(kinds) if seed % 4 else options() for _ in range(layers)]
    return problem(own, [r.randrange(40) for _ in own], standing=9, head=r.randrange(200), loss_left=r.randrange(9))


@pytest.mark.parametrize("widths", [dynamic_program._WIDTHS, (1, 5, 10**6)], ids=["usual", "narrow first"])
def test_deep_models_agree_with_a_plain_table(monkeypatch, widths):
    """Two dozen layers, which the bounds and the passes cut short; the traps are a bound too high, a label lost."""
    monkeypatch.setattr(dynamic_program, "_WIDTHS", widths)
    for seed in range(8):
        p = deep_problem(seed)
        low, high = smallest(p).peak_bytes, peak(p, [len(layer) - 1 for layer in p.options])
        for share in (0, 0.03, 0.3, 0.7):
            within = replace(p, budget_bytes=int(low + share * max(0, high - low)))
            found = solve(within)
            assert round(found.seconds / MS) == forward_program(within), (seed, share)
            assert found.unproven_seconds == 0 and found.peak_bytes <= within.budget_bytes
        assert forward_program(replace(p, budget_bytes=low - 1)) is None


def test_deep_models_reach_as_low_as_their_time_allows(monkeypatch):
    """Few different times, so that many choices are as fast; the trap is a first, narrow pass that settles for one."""
    monkeypatch.setattr(dynamic_program, "_WIDTHS", (2, 10**6))
    for seed in range(3, 63, 6):
        p = deep_problem(seed, layers=12)
        lowest = smallest(p).peak_bytes
        for more in (20, 60):
            found = mix._search(p).fastest(lowest + more)
            at_once = [forward_program(replace(p, budget_bytes=found.reach_bytes - less)) for less in (0, 1)]
            assert at_once[0] == round(found.time / mix._search(p).units_per_s / MS) != at_once[1], seed


def test_a_search_cut_short_says_what_it_may_have_missed(monkeypatch):
    monkeypatch.setattr(dynamic_program, "_WIDTHS", (2,))
    missed = 0
    for seed in range(12):
        p = deep_problem(seed)
        p = replace(p, budget_bytes=smallest(p).peak_bytes + 40)
        found, best = solve(p), forward_program(p) * MS
        assert found.seconds - found.unproven_seconds <= best + 1e-9 and best <= found.seconds + 1e-9
        missed += found.seconds > best + 1e-9
    assert missed, "not one case was cut short to its harm"


def large_problem(seed, *, alike):
    """128 layers of 15 options, with ten-digit bytes."""
    r = random.Random(seed)

    def options():
        kept = sorted(r.randrange(10**9, 10**10) for _ in range(15))
        seconds = sorted((r.uniform(0, 0.01) for _ in range(15)), reverse=True)
        return tuple(
            Option(
                seconds=s, kept_bytes=k, forward_bytes=k + r.randrange(10**9), backward_bytes=k + r.randrange(10**10)
            )
            for s, k in zip(seconds, kept, strict=True)
        )

    kind = options()
    layers = [kind if alike else options() for _ in range(128)]
    return problem(layers, [r.randrange(10**9) for _ in layers], standing=10**10, head=2 * 10**9, loss_left=10**9)


@pytest.mark.parametrize("alike", [True, False])
def test_128_layers_of_15_options_take_a_moment(alike):
    """0.1 s each here, proven; the trap is a table that grows with every layer."""
    for seed in range(2):
        p = large_problem(seed, alike=alike)
        low, high = mix.lowest_peak(p), peak(p, [14] * 128)
        for share in (0.1, 0.5):
            found = solve(replace(p, budget_bytes=int(low + share * (high - low))))
            assert found.unproven_seconds == 0
