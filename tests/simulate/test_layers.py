"""Few layers stand for all: every layer must find one that is what it is and sits between the same neighbours."""

from __future__ import annotations

import random

import pytest

from gcbench.simulate.trace.representative_layers import Sample, sample

EDGE = "|"


def views(labels, beside=None, radius=1):
    """What a layer's events depend on: itself, and what lies to both sides of it."""
    padded = [EDGE] * radius + list(labels if beside is None else beside) + [EDGE] * radius
    return [(label, *padded[place : place + 2 * radius + 1]) for place, label in enumerate(labels)]


def assert_represents_all(labels, beside=None, radius=1):
    """The layers kept, run one after the other, show what all of them show, and each layer has its like among them."""
    chosen = sample(labels, beside=beside, radius=radius)
    kept = list(chosen.representatives)
    assert kept == sorted(set(kept))
    assert len(chosen.represented_by) == len(labels)
    assert set(chosen.represented_by) <= set(kept)
    beside = labels if beside is None else beside
    everywhere = views(labels, beside, radius)
    among_the_kept = views([labels[n] for n in kept], [beside[n] for n in kept], radius)
    assert set(among_the_kept) == set(everywhere)
    # In the trace the neighbours of a kept layer are the kept ones, so its view there is the one that counts.
    shown = dict(zip(kept, among_the_kept, strict=True))
    assert [shown[played] for played in chosen.represented_by] == everywhere
    return chosen


def test_of_layers_that_are_all_alike_three_are_kept():
    """The trap: two. The first and the last have one neighbour, and every other one has two."""
    assert sample("aaaaaaaa") == Sample(representatives=(0, 6, 7), represented_by=(0, 6, 6, 6, 6, 6, 6, 7))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_of_three_layers_or_fewer_none_can_go(number):
    assert sample("a" * number) == Sample(representatives=tuple(range(number)), represented_by=tuple(range(number)))


def test_no_layers_need_no_sample():
    assert sample("") == Sample(representatives=(), represented_by=())


def test_layers_that_are_all_different_are_all_kept():
    assert assert_represents_all("abcdefg").representatives == tuple(range(7))


def test_how_many_are_kept_of_two_in_turn_does_not_depend_on_the_depth():
    """Alternating attention, or every:2."""
    assert len(assert_represents_all("ab" * 4).representatives) == 4
    assert len(assert_represents_all("ab" * 40).representatives) == 4


def test_how_many_are_kept_of_a_period_of_four_does_not_depend_on_the_depth():
    """Three of one kind and one of another: the three have different neighbours."""
    assert (
        len(assert_represents_all("aaab" * 3).representatives)
        == len(assert_represents_all("aaab" * 30).representatives)
        == 8
    )


def test_an_irregular_tail_is_kept_whole():
    """The trap: stretches of a period are cut out up to the end, and the odd layers there with them."""
    chosen = assert_represents_all("abababababccab")
    assert {10, 11, 12, 13} <= set(chosen.representatives)
    assert len(chosen.representatives) < 12


def test_a_single_odd_layer_and_its_neighbours_are_kept():
    chosen = assert_represents_all("a" * 20 + "b" + "a" * 20)
    assert {19, 20, 21} <= set(chosen.representatives)
    assert len(chosen.representatives) == 7


ONE_LAYER_IN_DIFFERENT_COMPANY = "aabaa" + "ccbcc" + "aabaa"


def test_equal_layers_between_others_do_not_stand_for_each_other():
    """The trap: `b` for `b`. A boundary tensor is held by one layer or the next, by how that one is treated."""
    represented_by = assert_represents_all(ONE_LAYER_IN_DIFFERENT_COMPANY).represented_by
    assert represented_by[2] != represented_by[7]


def test_neighbours_that_only_differ_in_what_does_not_matter_to_others_are_no_difference():
    """`beside` says that all are alike to each other: then `b` is `b`."""
    labels = ONE_LAYER_IN_DIFFERENT_COMPANY
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
