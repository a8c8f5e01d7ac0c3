"""Steps and phases from the events of a script, with the peaks of each."""

from __future__ import annotations

from collections import deque

from gcbench.dry_run.observer.phases import EVALUATION, SAVE, START, Phases


class Meter:
    """A card whose held bytes and peaks the test sets."""

    def __init__(self) -> None:
        self.held = 0
        self.peak = 0

    def use(self, peak: int, held: int) -> None:
        self.peak, self.held = max(self.peak, peak), held

    def take(self) -> dict[int, tuple[int, int]]:
        peak, self.peak = max(self.peak, self.held), self.held
        return {0: (peak, 10 * peak)}


def step(phases: Phases, meter: Meter, *, forward: int, backward: int, optimizer: int, held: int = 1) -> None:
    phases.forward_begins(with_gradients=True)
    meter.use(forward, forward)
    phases.backward_begins()
    meter.use(backward, held)
    phases.backward_ends()
    phases.optimizer_begins()
    meter.use(optimizer, held)
    phases.optimizer_ends()


def test_each_phase_has_its_own_peak():
    meter, seen = Meter(), deque[int]()
    phases = Phases(meter, lambda: seen.append(1))
    meter.use(5, 5)
    step(phases, meter, forward=20, backward=30, optimizer=25)
    step(phases, meter, forward=40, backward=35, optimizer=10)
    found = phases.as_json()
    assert found["first"]["peaks"] == {"forward": [20, 200], "backward": [30, 300], "optimizer": [25, 250]}
    assert found["later"]["number"] == 2
    assert found["later_peaks"]["forward"] == [40, 400]
    assert found["outside"] == {START: [5, 50]}
    assert found["num_steps"] == len(seen) == 2
    assert found["unfinished"] is None


def test_micro_batches_are_backward_passes_of_one_step():
    meter = Meter()
    phases = Phases(meter)
    for _ in range(3):
        phases.forward_begins(with_gradients=True)
        phases.backward_begins()
        phases.backward_ends()
    assert phases.done_steps == 0
    phases.optimizer_begins()
    phases.optimizer_ends()
    assert phases.as_json()["first"]["backwards"] == 3


def test_several_optimizers_in_a_row_are_one_step():
    meter = Meter()
    phases = Phases(meter)
    for _ in range(2):
        phases.forward_begins(with_gradients=True)
        phases.backward_begins()
        phases.backward_ends()
        for _ in range(2):
            phases.optimizer_begins()
            phases.optimizer_ends()
    assert phases.done_steps == 2


def test_optimizers_within_the_backward_pass_are_one_step():
    """The trap: with one optimizer per parameter, stepped by hooks, a step would be counted per parameter."""
    meter = Meter()
    phases = Phases(meter)
    for _ in range(2):
        phases.forward_begins(with_gradients=True)
        phases.backward_begins()
        for _ in range(5):
            phases.optimizer_begins()
            meter.use(50, 1)
            phases.optimizer_ends()
        phases.backward_ends()
    assert phases.done_steps == 2
    assert phases.as_json()["first"]["peaks"]["optimizer"][0] == 50


def test_the_next_batch_is_not_the_optimizers():
    """The trap: a large batch that is copied before the forward pass would be the peak of the step before."""
    meter = Meter()
    phases = Phases(meter)
    step(phases, meter, forward=2, backward=2, optimizer=2)
    meter.use(90, 90)
    step(phases, meter, forward=91, backward=91, optimizer=3)
    found = phases.as_json()
    assert found["first"]["peaks"]["optimizer"][0] == 2
    assert found["later_peaks"]["forward"][0] == 91


def test_what_is_only_held_between_steps_is_not_the_forward_passes():
    meter = Meter()
    phases = Phases(meter)
    step(phases, meter, forward=9, backward=9, optimizer=9, held=8)  # gradients are held until zero_grad
    meter.use(8, 1)
    phases.forward_begins(with_gradients=True)
    meter.use(3, 3)
    phases.backward_begins()
    assert phases.step.peaks["forward"][0] == 3


def test_evaluation_and_saving_are_outside_of_steps():
    meter = Meter()
    phases = Phases(meter)
    step(phases, meter, forward=2, backward=2, optimizer=2)
    for _ in range(3):
        phases.forward_begins(with_gradients=False)
        meter.use(70, 1)
    before = phases.save_begins()
    meter.use(33, 1)
    phases.save_ends(before)
    step(phases, meter, forward=2, backward=2, optimizer=2)
    found = phases.as_json()
    assert found["outside"][EVALUATION] == [70, 700]
    assert found["outside"][SAVE] == [33, 330]
    assert found["evaluations"] == 1
    assert found["first"]["peaks"]["forward"][0] == found["later_peaks"]["forward"][0] == 2


def test_an_unfinished_step_is_told_as_one():
    meter = Meter()
    phases = Phases(meter)
    phases.forward_begins(with_gradients=True)
    meter.use(8, 8)
    phases.measure()
    found = phases.as_json()
    assert found["num_steps"] == 0 and found["first"] is None
    assert found["unfinished"]["peaks"] == {"forward": [8, 80]}
