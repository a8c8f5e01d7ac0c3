"""The bookkeeping of the CUDA device, tested with a scripted allocator and no GPU."""

from __future__ import annotations

import pytest
import torch

from gcbench.core.units import GIB, MIB
from gcbench.devices.backends import cuda


class ScriptedAllocator:
    """Fakes torch.cuda's statistics: peaks count from the last reset, as in the caching allocator."""

    def __init__(self, monkeypatch):
        self.allocated = self.peak = 0
        self.reserved = self.reserved_peak = 0
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: self.reserved_peak)

    def reset(self, index):
        self.peak, self.reserved_peak = self.allocated, self.reserved

    def reach(self, allocated, *, then, reserved=0):
        self.peak, self.allocated = max(self.peak, allocated), then
        self.reserved = max(self.reserved, reserved)
        self.reserved_peak = max(self.reserved_peak, self.reserved)


@pytest.fixture
def allocator(monkeypatch):
    return ScriptedAllocator(monkeypatch)


def test_each_phase_has_its_own_peak(allocator):
    """The trap: without a reset at each phase, every later phase shows the highest peak so far."""
    probe = cuda.CudaMemoryProbe(0)
    allocator.reach(900, then=100)  # before the step: not part of it
    for phase, peak, then in (("forward", 400, 350), ("backward", 600, 200), ("optimizer", 300, 100)):
        probe.on_phase(phase)
        allocator.reach(peak, then=then)
    probe.close()
    peaks = probe.peaks()
    assert (peaks.forward_bytes, peaks.backward_bytes, peaks.optimizer_bytes) == (400, 600, 300)
    assert peaks.allocated_bytes == 600
    assert peaks.peak_phase == "backward"


def test_a_phase_counts_memory_allocated_before_it(allocator):
    probe = cuda.CudaMemoryProbe(0)
    for phase, peak, then in (("forward", 400, 350), ("backward", 320, 100), ("optimizer", 120, 100)):
        probe.on_phase(phase)
        allocator.reach(peak, then=then)
    probe.close()
    assert probe.peaks().backward_bytes == 350


def test_reserved_memory_is_that_of_the_step_alone(allocator):
    """The trap: building the model may have reserved more than any step does."""
    allocator.reach(0, then=0, reserved=5000)
    allocator.reserved = 1000
    probe = cuda.CudaMemoryProbe(0)
    for phase, reserved in (("forward", 2000), ("backward", 3000), ("optimizer", 1000)):
        probe.on_phase(phase)
        allocator.reach(10, then=10, reserved=reserved)
    probe.close()
    assert probe.peaks().reserved_bytes == 3000


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(error, verdict):
    assert cuda.CudaDevice.is_out_of_memory(None, error) is verdict


def test_the_memory_limit_is_a_fraction_of_the_card(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: said.append(args))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Card", (), {"total_memory": 80 * GIB}))
    device = object.__new__(cuda.CudaDevice)
    device.index = 0
    device.limit_memory(20 * GIB)
    device.limit_memory(200 * GIB)
    device.limit_memory(None)
    assert said == [(0.25, 0), (1.0, 0)]


def test_process_memory_is_the_card_s_used_memory_less_that_of_others(monkeypatch):
    answers = iter(["512", "4608", "[N/A]"])
    monkeypatch.setattr(cuda, "_nvidia_smi", lambda index, field: next(answers))
    monkeypatch.setattr(torch.cuda, "device_memory_used", unreported)
    device = opened(monkeypatch)
    device.used_by_others_bytes = device._used_bytes()
    assert device.process_bytes() == 4096 * MIB
    assert device.process_bytes() is None


def test_without_nvidia_smi_the_management_library_is_asked(monkeypatch):
    """The trap: a container may have the driver's library and not the program."""
    monkeypatch.setattr(cuda, "_nvidia_smi", lambda index, field: None)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 4608 * MIB + 512)
    device = opened(monkeypatch)
    device.used_by_others_bytes = 512 * MIB
    assert device.process_bytes() == 4096 * MIB + 512


def unreported(index):
    raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")


def opened(monkeypatch):
    """A device that was opened without a card."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    device = object.__new__(cuda.CudaDevice)
    device.index = 0
    return device
