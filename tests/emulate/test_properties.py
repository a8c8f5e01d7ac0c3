"""What an emulated card says of itself."""

from __future__ import annotations

import pytest
from emulated_driver import EVERY_ARCHITECTURE, Call

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.devices import cards, contexts
from gcbench.emulate.properties import architectures, joined, properties, split


@pytest.mark.parametrize(
    ("capability", "best"),
    [
        ((9, 0), (9, 0)),
        ((8, 9), (8, 6)),  # an RTX 4090 runs what was compiled for 8.6
        ((8, 0), (8, 0)),
        ((12, 1), (12, 0)),
        ((13, 0), (12, 0)),  # through PTX
        ((7, 0), None),  # older than all
    ],
)
def test_a_card_runs_the_newest_kernels_of_its_generation_or_ptx(
    capability: tuple[int, int], best: tuple[int, int] | None
) -> None:
    built = architectures("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120")
    assert built.best(capability) == best


def test_letters_after_an_architecture_are_no_digits_of_it() -> None:
    assert architectures("sm_90a sm_100f").compiled == ((9, 0), (10, 0))


def test_every_nvidia_card_of_the_catalogue_is_emulated_or_says_that_torch_has_no_kernels_for_it() -> None:
    emulated = []
    for card in cards.cards():
        if card.vendor != "nvidia":
            continue
        try:
            values = properties(card, num_cards=1, built_for=EVERY_ARCHITECTURE, torch_version="2.13.0")
        except UnavailableError as err:
            assert "no kernels for" in str(err)
            assert card.compute_capability in ("6.0", "7.0")
        else:
            emulated.append(card.name)
            assert values["memory_bytes"] == str(card.memory_bytes)
            assert split(joined(values)) == values
    assert len(emulated) > 40


def test_a_card_of_amd_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(UnavailableError, match="predict it: gcbench predict --device mi300x"):
        properties(cards.find("mi300x"), num_cards=1, built_for=EVERY_ARCHITECTURE, torch_version="2.13.0")


@pytest.mark.parametrize("count", [0, 17])
def test_a_wrong_number_of_cards_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="take 1 to 16"):
        properties(cards.find("t4"), num_cards=count, built_for=EVERY_ARCHITECTURE, torch_version="2.13.0")


def test_the_context_is_that_of_the_capability_and_else_a_rule_of_thumb() -> None:
    assert contexts.context_bytes((9, 0)) == 804_257_792
    assert contexts.context_bytes((8, 7)) == 400_000_000


def test_the_driver_reports_what_it_was_given(call: Call) -> None:
    code = """
count, major, minor, sms = (c.c_int() for _ in range(4))
cuda.cuDeviceGetCount(c.byref(count))
cuda.cuDeviceComputeCapability(c.byref(major), c.byref(minor), 0)
cuda.cuDeviceGetAttribute(c.byref(sms), 16, 0)
name = c.create_string_buffer(64)
cuda.cuDeviceGetName(name, 64, 0)
print(count.value, major.value, minor.value, sms.value, name.value.decode())
"""
    assert call(code) == "2 7 5 40 Tesla T4"


def test_what_nobody_wrote_succeeds_and_what_is_unknown_is_not_found(call: Call) -> None:
    code = """
found, status = c.c_void_p(), c.c_int()
print(cuda.cuStreamSynchronize(None))
cuda.cuGetProcAddress_v2(b"cuMemAlloc", c.byref(found), 13000, c.c_uint64(0), c.byref(status))
print(status.value, found.value is not None)
cuda.cuGetProcAddress_v2(b"cuNothing", c.byref(found), 13000, c.c_uint64(0), c.byref(status))
cuda.emu_refused.restype = c.c_char_p
print(status.value, found.value, cuda.emu_refused(c.c_size_t(0)).decode())
"""
    assert call(code).split() == ["0", "0", "True", "1", "None", "cuNothing"]
