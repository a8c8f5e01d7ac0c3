"""Values of fake tensors that are known, and code that may go on because of them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gcbench.simulate.trace.recorder import Recorder


@pytest.fixture
def recorder():
    with FakeTensorMode(), Recorder() as watching:
        yield watching


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, 3),
        lambda: torch.zeros(2, 3).new_ones(2, 3),
        lambda: torch.ones_like(torch.zeros(2, 3)),
        lambda: torch.full((2, 3), 1),
        lambda: torch.ones(2, 3).to(torch.bool),
        lambda: torch.ones(2, 3)[:, -2:].clone(),
        lambda: torch.ones(2, 3) == 1,
    ],
)
def test_ones_are_all_true_however_they_are_asked(recorder, make):
    mask = make()
    assert bool(mask.all())
    assert bool(mask.sum() == mask.numel())
    assert not bool(mask.sum() == mask.numel() - 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, 3),
        lambda: torch.full((2, 3), 2),
        lambda: torch.ones(2, 3) * 2,
        lambda: torch.ones(2, 3).tril_(),
        lambda: torch.ones(2, 3) == 0,
        lambda: torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]),
    ],
)
def test_what_may_be_no_ones_is_not_answered(recorder, make):
    with pytest.raises(DataDependentOutputException):
        bool(make().all())


def test_ones_that_are_written_through_a_view_are_forgotten(recorder):
    mask = torch.ones(2, 3)
    mask[0].zero_()
    with pytest.raises(DataDependentOutputException):
        bool(mask.all())


def test_no_number_between_0_and_1_is_below_0(recorder):
    drawn = torch.rand([])
    assert not bool(drawn < 0.0)
    for asks in (lambda: drawn < 0.1, lambda: torch.randn([]) < 0.0, lambda: torch.rand([1]) < 0.0):
        with pytest.raises(DataDependentOutputException):
            bool(asks())


def test_a_number_that_the_host_draws_is_not_in_the_cards_memory():
    for on_host in (False, True):
        with FakeTensorMode(), Recorder(draws_on_host=on_host) as watching:
            kept = torch.rand([])
            assert not bool(kept < 0.0)
        assert [block.nbytes for block in watching.trace.blocks] == ([0, 0] if on_host else [4, 1])
