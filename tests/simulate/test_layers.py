"""A few layers represent all: each layer is represented by one of its kind between the same neighbours."""

from __future__ import annotations

import random

import pytest

from gcbench.simulate.trace.representative_layers import Sample, sample

EDGE = "|"


def views(labels, beside=None, radius=1):
    """What a layer's events depend on: itself, and its neighbours on both sides."""
    padded = [EDGE] * radius + list(labels if beside is None else beside) + [EDGE] * radius
    return [(label, *padded[place : place + 2 * radius + 1]) for place, label in enumerate(labels)]


def assert_represents_all(labels, beside=None, radius=1):
    """The chosen layers, run one after the other, show every neighbourhood, and each layer has its equal among them."""
    chosen = sample(labels, beside=beside, radius=radius)
    kept = list(chosen.representatives)
    assert kept == sorted(set(kept))
    assert len(chosen.represented_by) == len(labels)
    assert set(chosen.represented_by) <= set(kept)
    beside = labels if beside is None else beside
    everywhere = views(labels, beside, radius)
    among_the_chosen = views([labels[n] for n in kept], [beside[n] for n in kept], radius)
    assert set(among_the_chosen) == set(everywhere)
    # In the trace the neighbours of a chosen layer are the chosen ones, so its view there is the one that counts.
    shown = dict(zip(kept, among_the_chosen, strict=True))
    assert [shown[played] for played in chosen.represented_by] == everywhere
    return chosen


def test_three_layers_represent_any_number_of_identical_ones():
    """The trap: two. The first and the last have one neighbour, and every other one has two."""
    assert sample("aaaaaaaa") == Sample(representatives=(0, 6, 7), represented_by=(0, 6, 6, 6, 6, 6, 6, 7))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_three_layers_or_fewer_are_all_traced(number):
    assert sample("a" * number) == Sample(representatives=tuple(range(number)), represented_by=tuple(range(number)))


def test_no_layers_need_no_sample():
    assert sample("") == Sample(representatives=(), represented_by=())


def test_different_layers_are_all_traced():
    assert assert_represents_all("abcdefg").representatives == tuple(range(7))


def test_the_number_traced_of_two_alternating_kinds_does_not_depend_on_the_depth():
    """Alternating attention, or every:2."""
    assert len(assert_represents_all("ab" * 4).representatives) == 4
    assert len(assert_represents_all("ab" * 40).representatives) == 4


def test_the_number_traced_of_a_period_of_four_does_not_depend_on_the_depth():
    """Three of one kind and one of another: the three have different neighbours."""
    assert (
        len(assert_represents_all("aaab" * 3).representatives)
        == len(assert_represents_all("aaab" * 30).representatives)
        == 8
    )


def test_an_irregular_tail_is_traced_whole():
    """The trap: repetitions of a period are cut out up to the end, and the odd layers there with them."""
    chosen = assert_represents_all("abababababccab")
    assert {10, 11, 12, 13} <= set(chosen.representatives)
    assert len(chosen.representatives) < 12


def test_a_single_odd_layer_and_its_neighbours_are_traced():
    chosen = assert_represents_all("a" * 20 + "b" + "a" * 20)
    assert {19, 20, 21} <= set(chosen.representatives)
    assert len(chosen.representatives) == 7


ONE_KIND_BETWEEN_DIFFERENT_NEIGHBOURS = "aabaa" + "ccbcc" + "aabaa"


def test_equal_layers_between_different_neighbours_do_not_represent_each_other():
    """The trap: `b` for `b`. A layer's input is held by it or by the layer before, depending on their policies."""
    represented_by = assert_represents_all(ONE_KIND_BETWEEN_DIFFERENT_NEIGHBOURS).represented_by
    assert represented_by[2] != represented_by[7]


def test_neighbours_that_differ_in_nothing_others_depend_on_count_as_equal():
    """`beside` makes all neighbours equal: then `b` is `b`."""
    labels = ONE_KIND_BETWEEN_DIFFERENT_NEIGHBOURS
    represented_by = assert_represents_all(labels, beside="x" * len(labels)).represented_by
    assert represented_by[2] == represented_by[7] == represented_by[12]


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_every_neighbourhood_is_shown_whatever_the_sequence(radius):
    """The trap: a stretch that is cut out brings two layers together that are never neighbours."""
    rng = random.Random(radius)
    for _ in range(400):
        alphabet = "abcd"[: rng.randint(1, 4)]
        labels = [rng.choice(alphabet) for _ in range(rng.randint(1, 30))]
        if rng.random() < 0.5:  # as models are: a few layers over and over
            labels = (labels[: rng.randint(1, 5)] * 20)[: rng.randint(1, 40)] + labels[:3]
        coarse = [label in "ab" for label in labels]
        assert_represents_all(labels, radius=radius)
        assert_represents_all(labels, beside=coarse, radius=radius)


def test_nothing_that_could_go_is_kept():
    """Another pass over the sample finds nothing to cut: tracing costs by the layer."""
    rng = random.Random(7)
    for _ in range(200):
        labels = [rng.choice("abc") for _ in range(rng.randint(1, 30))]
        kept = [labels[n] for n in sample(labels).representatives]
        assert len(sample(kept).representatives) == len(kept)


def test_any_labels_will_do_that_can_be_compared():
    labels = [("attention", True), ("mamba", False)] * 5
    assert assert_represents_all(labels).representatives == assert_represents_all("ab" * 5).representatives
