"""Intervals against published and hand-computed values, and their coverage in simulations."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from fixtures_report import round_result

from gcbench.core.records import Turn
from gcbench.report import stats
from gcbench.report.stats import PROCESSOR_TIME, WALL_TIME, change, change_basis

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975.
NIST_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize(("df", "published"), NIST_T_975.items())
def test_t_quantiles_are_the_published_ones(df, published):
    assert stats.t_quantile(0.975, df) == pytest.approx(published, abs=6e-4)


def test_t_quantile_accepts_fractional_degrees_of_freedom():
    """Welch's are not whole; rounding them would jump. With df = 1 and df = 2 there are closed forms on both sides."""
    assert stats.t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    p = 0.95
    assert stats.t_quantile(0.975, 2) == pytest.approx(p * math.sqrt(2 / (1 - p * p)), rel=1e-9)
    assert stats.t_quantile(0.975, 2) < stats.t_quantile(0.975, 1.5) < stats.t_quantile(0.975, 1)


def test_t_quantile_of_non_integer_df_is_the_numeric_integral():
    """The distribution function at the quantile, integrated from the density with Simpson's rule."""
    df, steps = 2.7, 20_000
    quantile = stats.t_quantile(0.975, df)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    width = quantile / steps
    weights = [1, *([4, 2] * (steps // 2))[: steps - 1], 1]
    area = (
        sum(weight * scale * (1 + (i * width) ** 2 / df) ** (-(df + 1) / 2) for i, weight in enumerate(weights))
        * width
        / 3
    )
    assert 0.5 + area == pytest.approx(0.975, abs=1e-9)


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (15, 4), (20, 6), (30, 10), (100, 40)])
def test_median_ranks_are_the_binomial_ones(n, rank):
    """The tabled ranks of the sign-test interval for the median, and the exact coverage on both sides of 95 %."""
    assert stats.median_rank(n) == rank

    def coverage(r):
        return 1 - 2 * sum(math.comb(n, i) for i in range(r)) / 2**n

    assert coverage(rank) >= 0.95 > coverage(rank + 1)


def test_five_values_cannot_enclose_the_median_with_order_statistics():
    with pytest.raises(ValueError, match="it takes 6"):
        stats.median_rank(5)


def test_a_round_counts_once_however_many_samples_it_has():
    """Counting every step as independent makes intervals far too narrow."""
    rounds = [round_result(0, [1.0, 1.1, 9.0]), round_result(1, [2.0]), round_result(2)]
    assert stats.units(rounds) == (1.1, 2.0)


def test_the_samples_of_a_single_round_are_no_independent_values():
    """The trap: twenty steps of one process give a narrow interval, and two rounds of them none."""
    assert stats.units([round_result(0, [1.0, 3.0, 2.0]), round_result(1)]) == (2.0,)
    found = stats.step_time([round_result(0, [1.0, 1.1, 1.2] * 10)])
    assert found is not None
    assert (found.centre, found.interval) == (1.1, None)


def test_two_values_have_no_interval():
    """By t with one degree of freedom it says nothing: "−100 to 3256277426 %" of two noisy rounds."""
    found = stats.estimate([0.9, 1.1])
    assert found is not None
    assert (found.centre, found.low, found.high, found.num_units) == (1.0, None, None, 2)
    both = [round_result(0, [1.0]), round_result(1, [1.2])]
    paid = stats.overhead([round_result(0, [2.0]), round_result(1, [1.3])], both)
    assert paid is not None
    assert paid.interval is None


@pytest.mark.parametrize(("n", "shown"), [(2, 0.36), (3, 0.94)])
def test_three_rounds_show_what_two_do_not(n, shown):
    """The figures of `MIN_ROUNDS`: an overhead of 30 % in rounds that scatter by 6 %, with the t interval of both."""
    source = random.Random(11)
    hits = 0
    for _ in range(2000):
        logs = [source.gauss(math.log(1.3), 0.06) for _ in range(n)]
        half = stats.t_quantile(0.975, n - 1) * statistics.stdev(logs) / math.sqrt(n)
        hits += statistics.fmean(logs) - half > 0
    assert hits / 2000 == pytest.approx(shown, abs=0.04)


def test_the_interval_of_three_values_is_computed_by_hand():
    """Logarithms 0, ln 2, ln 4: mean ln 2, deviation ln 2, half width 4.3027 ln 2 / sqrt 3 = 1.72190."""
    found = stats.estimate([4.0, 1.0, 2.0])
    assert found is not None
    assert found.centre == 2.0
    assert found.low == pytest.approx(2 * math.exp(-1.72190), rel=1e-4)
    assert found.high == pytest.approx(2 * math.exp(1.72190), rel=1e-4)


def test_the_interval_of_eight_values_is_its_extremes_and_of_nine_is_not():
    eight = stats.estimate([8, 1, 7, 2, 6, 3, 5, 4])
    nine = stats.estimate([9, 8, 1, 7, 2, 6, 3, 5, 4])
    assert eight is not None
    assert nine is not None
    assert (eight.low, eight.centre, eight.high) == (1, 4.5, 8)
    assert (nine.low, nine.centre, nine.high) == (2, 5, 8)


def test_equal_values_have_an_interval_that_still_contains_them():
    """Logarithms and back lose the last bit, and an interval beside its own centre would be drawn backwards."""
    found = stats.estimate([0.3, 0.3, 0.3])
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.centre <= found.high


def test_the_interval_of_a_change_contains_its_centre():
    """A third of the steps are outliers: the mean logarithm and its interval leave the ratio of the medians behind."""
    a = [round_result(i, [1.0 if i < 20 else math.e]) for i in range(30)]
    found = stats.change(a, [round_result(i, [1.0]) for i in range(30)])
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.centre == 0 <= found.high


def test_one_value_has_no_interval_and_none_has_no_estimate():
    one = stats.estimate([0.5])
    assert one is not None
    assert (one.centre, one.low, one.high, one.interval) == (0.5, None, None, None)
    assert stats.estimate([]) is None
    assert stats.step_time([round_result(0)]) is None


@pytest.mark.parametrize("n", [3, 8])
def test_intervals_cover_the_median_of_lognormal_noise(n):
    """The promise itself: of 3000 simulated runs at least 93 % enclose the true median, 1.0."""
    source = random.Random(20261102 + n)
    hits = 0
    for _ in range(3000):
        found = stats.estimate([source.lognormvariate(0, 0.2) for _ in range(n)])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert hits / 3000 >= 0.93


def test_intervals_of_a_change_cover_the_true_change():
    """Two runs of three and four rounds with unequal noise; the true change is +10 %."""
    source = random.Random(7)
    hits = 0
    for _ in range(1500):
        a = [round_result(i, [source.lognormvariate(0, 0.05)]) for i in range(3)]
        b = [round_result(i, [1.1 * source.lognormvariate(0, 0.15)]) for i in range(4)]
        found = stats.change(a, b)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.1 <= found.high
    assert hits / 1500 >= 0.93


def test_overhead_is_computed_within_a_round_so_that_drift_cancels():
    """A machine that slows down threefold over the run; the ratio of overall medians would have a huge interval."""
    off = [round_result(i, [1.0 + i] * 3) for i in range(3)]
    mine = [round_result(i, [1.25 * (1.0 + i)] * 3) for i in range(3)]
    found = stats.overhead(mine, off)
    assert found is not None
    assert found.centre == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25)
    assert found.high == pytest.approx(0.25)


def test_rounds_on_one_side_only_are_ignored():
    """Pairing by position would set round 1 against round 0."""
    off = [round_result(1, [2.0]), round_result(2, [4.0])]
    mine = [round_result(0, [50.0]), round_result(1, [3.0]), round_result(2, [6.0]), round_result(3, [70.0])]
    found = stats.overhead(mine, off)
    assert found is not None
    assert found.centre == pytest.approx(0.5)
    assert found.num_units == 2


def test_no_common_round_means_no_overhead():
    assert stats.overhead([round_result(0, [1.0])], [round_result(1, [1.0])]) is None
    assert stats.overhead([], [round_result(1, [1.0])]) is None


def test_a_single_common_round_has_an_overhead_without_an_interval():
    found = stats.overhead([round_result(0, [1.1, 2.4, 3.9])], [round_result(0, [1.0, 2.0, 3.0])])
    assert found is not None
    assert found.centre == pytest.approx(0.2)
    assert (found.num_units, found.interval) == (1, None)


def test_one_sample_on_each_side_has_an_overhead_without_an_interval():
    found = stats.overhead([round_result(0, [1.5])], [round_result(0, [1.0])])
    assert found is not None
    assert (found.centre, found.low, found.high) == (0.5, None, None)


def test_the_change_between_runs_is_welchs_by_hand():
    """Logarithms -0.1, 0, 0.1 and 0.1, 0.3, 0.5: variances 0.01 and 0.04, difference of means 0.3.

    Standard error sqrt(0.01/3 + 0.04/3) = 0.129099; df = 0.0166667^2 / (0.0033333^2/2 + 0.0133333^2/2) = 2.94118.
    """
    a = [round_result(i, [math.exp(x)]) for i, x in enumerate((-0.1, 0.0, 0.1))]
    b = [round_result(i, [math.exp(x)]) for i, x in enumerate((0.1, 0.3, 0.5))]
    found = stats.change(a, b)
    assert found is not None
    half = stats.t_quantile(0.975, 2.9411764706) * 0.1290994449
    assert found.low == pytest.approx(math.exp(0.3 - half) - 1, rel=1e-6)
    assert found.high == pytest.approx(math.exp(0.3 + half) - 1, rel=1e-6)
    assert found.centre == pytest.approx(math.exp(0.3) - 1)


def test_a_change_with_too_few_rounds_on_a_side_has_no_interval():
    """A wide guess would be read as a measurement."""
    found = stats.change([round_result(i, [1.0]) for i in range(8)], [round_result(0, [1.2]), round_result(1, [1.3])])
    assert found is not None
    assert found.centre == pytest.approx(0.25)
    assert found.interval is None


def test_a_change_without_times_is_none():
    assert stats.change([round_result(0)], [round_result(0, [1.0])]) is None


def in_turns(walls, users):
    turns = tuple(
        Turn(number=number, step_times_s=(wall,), user_s=user, system_s=0.0)
        for number, (wall, user) in enumerate(zip(walls, users, strict=True))
    )
    return [replace(round_result(0, walls), turns=turns)]


def test_a_change_is_of_processor_time_where_both_runs_have_it():
    """The trap: a run beside a busy process, reported as twice as slow."""
    before = in_turns([4.0, 4.1, 4.0, 4.2], [7.0, 7.1, 7.0, 7.05])
    beside = in_turns([8.0, 9.5, 7.0, 12.0], [7.1, 7.0, 7.05, 7.0])
    assert change_basis(before, beside) == PROCESSOR_TIME
    assert abs(change(before, beside).centre) < 0.02
    old = [round_result(number, [wall]) for number, wall in enumerate((4.0, 4.1, 4.2))]
    assert change_basis(before, old) == WALL_TIME
    assert change(old, before).centre == pytest.approx(4.05 / 4.1 - 1)


def test_turns_of_one_process_share_what_differs_between_processes():
    """The trap: two runs alike, each with turns equal to a thousandth, shown to differ by 1 %."""
    one, other = (
        in_turns([4.0] * 5, [7.0, 7.001, 7.0, 7.002, 7.0]),
        in_turns([4.0] * 5, [7.07, 7.071, 7.07, 7.07, 7.071]),
    )
    found = change(one, other)
    assert found.low < 0 < found.high
    far = change(one, in_turns([4.0] * 5, [7.7, 7.701, 7.7, 7.7, 7.7]))
    assert far.low > 0.05
