"""Cards are found by any spelling of their names, and unknown or ambiguous names are refused with near ones."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from gcbench.core.errors import UnavailableError
from gcbench.devices import cards
from gcbench.devices.cards import Card

WITHOUT_A_NAME_OF_ITS_OWN = ("a800-40gb", "rtx-3080-12gb", "rtx-4060-ti-16gb", "rtx-5060-ti-16gb")
"""Cards whose name in torch is unknown or shared by two sizes."""

by_name = pytest.mark.parametrize("card", cards.cards(), ids=lambda card: card.name)


def test_no_spelling_means_two_cards() -> None:
    """The trap: "A10 24 GB" and "a10-24gb" are one spelling once punctuation is gone."""
    spellings = [cards._plain(spelling) for card in cards.cards() for spelling in {*card.spellings}]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    "spelling", ["rtx-4090", "RTX4090", "rtx 4090", "RTX_4090", " 4090 ", "NVIDIA GeForce RTX 4090", "rtx-4090-24GB"]
)
def test_any_spelling_finds_the_card(spelling: str) -> None:
    assert cards.find(spelling).name == "rtx-4090"


@by_name
def test_torch_s_name_of_the_card_finds_it(card: Card) -> None:
    assert (card.full_name is None) == (card.name in WITHOUT_A_NAME_OF_ITS_OWN)
    assert cards.find(card.title) is card


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("a100", "'a100' comes in several sizes; near names: a100-40gb, a100-40gb-pcie, a100-80gb-pcie, a100-80gb;"),
        ("V100", "'V100' comes in several sizes; near names: v100-16gb, v100-32gb;"),
        ("4060ti", "near names: rtx-4060-ti-16gb;"),
        ("rtx 4090 ti", "near names: rtx-4090;"),
        ("rtx-4900", "near names: rtx-4090, "),
        ("xyzzy", "gcbench devices lists all known devices;"),
    ],
)
def test_an_unknown_or_ambiguous_name_gets_near_ones(typed: str, near: str) -> None:
    """The trap: a100 alone could be 40 or 80 GB, so it must not be guessed."""
    with pytest.raises(UnavailableError) as raised:
        cards.find(typed)
    message = str(raised.value)
    assert near in message and repr(typed) in message
    assert message.endswith(
        "or set only its memory, like --device-memory 48GiB, or describe it with --device-file FILE.toml: a [[card]] "
        "with its name and memory_bytes"
    )


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("A40", "a40"),
        ("a40-48gb", "a40"),
        ("a800", "a800-80gb"),
        ("2080ti", "rtx-2080-ti"),
        ("RTX3080", "rtx-3080"),
        ("3080 12GB", "rtx-3080-12gb"),
        ("rtx6000ada", "rtx-6000-ada"),
        ("4070 Ti SUPER", "rtx-4070-ti-super"),
        ("a100-80g", "a100-80gb"),
        ("H100 80GB HBM3", "h100"),
        ("H100-SXM", "h100"),
        ("Tesla P100", "p100-16gb"),
        ("AMD Instinct MI210", "mi210"),
        ("Radeon 7900 XTX", "rx-7900-xtx"),
    ],
)
def test_a_name_as_people_write_it_finds_the_card(typed: str, name: str) -> None:
    """With or without the vendor's words, in any case, with or without the marketed size."""
    assert cards.find(typed).name == name


def test_a_size_that_a_card_does_not_have_finds_none() -> None:
    """The trap: a name with its size cut off would be another card."""
    for typed in ("h100-96gb", "rtx-4090-48gb", "l4-48gb"):
        assert cards.known(typed) is None


@pytest.mark.parametrize("typed", ["m3-max", "mps", "Apple M2 Ultra", "M1", "tpu-v4", "gaudi2"])
def test_a_processor_without_cuda_is_refused_with_a_remedy(typed: str) -> None:
    with pytest.raises(UnavailableError, match="use --device cpu with --device-memory 36GiB"):
        cards.find(typed)


def test_a_quadro_m4000_is_not_an_apple_gpu() -> None:
    with pytest.raises(UnavailableError, match="there is no device 'M4000'"):
        cards.find("M4000")


def test_a_card_can_be_pickled() -> None:
    card = cards.find("h100")
    assert pickle.loads(pickle.dumps(card)) == card
    assert hash(card) == hash(pickle.loads(pickle.dumps(card)))


def test_importing_reads_no_file_and_no_torch() -> None:
    code = "import sys, gcbench.devices.cards as c; print(c._built_in.cache_info().currsize, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 False\n"


def test_a_card_to_emulate_may_be_described_in_a_file(tmp_path: Path) -> None:
    """Where the command takes such a file, and only there, it is the remedy for an unknown name."""
    file = tmp_path / "cards.toml"
    file.write_text('[[card]]\nname = "mine"\nmemory_bytes = 12000000000\n')
    assert cards.find_to_emulate("mine", file).memory_bytes == 12_000_000_000
    with pytest.raises(UnavailableError, match="near names: h100; name one of them, or describe it with --device-file"):
        cards.find_to_emulate("h1000", takes_file=True)
    with pytest.raises(UnavailableError, match="only cards of the catalogue can be emulated"):
        cards.find_to_emulate("h1000")
