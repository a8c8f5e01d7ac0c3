"""A user's device file is read completely, and all its mistakes are reported at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.units import GIB
from gcbench.devices import cards
from gcbench.devices.cards import Card


def write(folder: Path, text: str) -> Path:
    path = folder / "cards.toml"
    path.write_text(text)
    return path


def test_a_users_card_needs_a_name_and_memory(tmp_path: Path) -> None:
    path = write(tmp_path, '[[card]]\nname = "Our Card"\nmemory_bytes = "24GiB"\n')
    assert cards.find("our-card", path) == Card(name="Our Card", memory_bytes=24 * GIB)
    assert cards.find("h100", path).full_name == "NVIDIA H100 80GB HBM3"
    with pytest.raises(UnavailableError, match="near names: Our Card;"):
        cards.find("ourcar", path)


def test_a_users_card_may_have_everything_and_replaces_a_built_in_one(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [[card]]
        name = "my-t4"
        aliases = ["T4"]
        full_name = "Tesla T4 (ours)"
        vendor = "nvidia"
        compute_capability = "7.5"
        memory_bytes = 15835594752
        num_sms = 40
        bandwidth_bytes_per_s = 320e9
        achievable_bandwidth_bytes_per_s = 240_000_000_000
        matmul_flops = { fp16 = 65e12 }
        achievable_matmul_flops = { fp16 = 41e12 }
        sources = { memory_bytes = "our own print-out" }
        """,
    )
    card = cards.find("t4", path)
    assert card.name == "my-t4"
    assert card.achievable_bandwidth_bytes_per_s == 240e9
    assert card.matmul_flops == {"fp16": 65e12}
    assert cards.find("t4").name == "t4"


def test_all_mistakes_of_a_users_file_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        colour = "green"
        [[card]]
        name = "one"
        memory_bytes = 24
        vendor = "intel"
        compute_capability = 9.0
        num_sms = 1.5
        bandwith_bytes_per_s = 936e9
        achievable_bandwidth_bytes_per_s = 936
        matmul_flops = { bf8 = 1e15 }
        achievable_matmul_flops = { bf16 = true }
        aliases = "uno"
        sources = "me"
        [[card]]
        memory_bytes = "lots"
        [[card]]
        name = "three"
        memory_bytes = "80GiB"
        [[card]]
        name = "four"
        aliases = ["THREE"]
        memory_bytes = "80GiB"
        """,
    )
    with pytest.raises(UsageError) as raised:
        cards.read(path)
    mistakes = [line.removeprefix(f"- {path}") for line in str(raised.value).splitlines()]
    assert mistakes == [
        ": there is no key 'colour'; write each device as a [[card]] table",
        ", card 1 (one): memory_bytes: 24 is 24 bytes; did you mean 24GiB?",
        ", card 1 (one): vendor: 'intel' is unknown; legal are nvidia, amd",
        ", card 1 (one): compute_capability: 9.0 is not a compute capability; "
        'write it in quotes, like "9.0" or "gfx942"',
        ", card 1 (one): num_sms: 1.5 is not a whole number of 1 or more",
        ", card 1 (one): bandwith_bytes_per_s: there is no such key; did you mean bandwidth_bytes_per_s? "
        f"legal are {', '.join(f.name for f in fields(Card))}",
        ", card 1 (one): achievable_bandwidth_bytes_per_s: 936 is not a number of bytes per second; "
        "write it like 936e9",
        ", card 1 (one): matmul_flops: {'bf8': 1000000000000000.0} is not a table by precision "
        "(fp32, tf32, bf16, fp16); write it like { bf16 = 312e12 }",
        ", card 1 (one): achievable_matmul_flops: True is not a number of operations per second; write it like 312e12",
        """, card 1 (one): aliases: 'uno' is not a list; write it like ["name", "other name"]""",
        ", card 1 (one): sources: 'me' is not a table; write it like { memory_bytes = \"its source\" }",
        ", card 2: memory_bytes: 'lots' is not an amount of memory; write it like 8GiB, 512MiB or 24GB",
        ', card 2: name is missing; write it like "my-card"',
        ", card 4 (four): 'three' also names card 3; rename one of them",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "describes no device; write [[card]], then its name and memory_bytes"),
        ("[card]\nname = 'x'", "card is not a list of tables; write [[card]] before each device"),
        ("[[card]\n", "is not valid TOML"),
    ],
)
def test_a_file_of_the_wrong_shape_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        cards.read(write(tmp_path, text))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no device file"):
        cards.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        cards.read(tmp_path / "bad.toml")


@pytest.mark.parametrize("raw", ["true", "0", "-1", '"24TB2"', '"1MiB"', '"99TiB"', "24.5"])
def test_memory_that_no_card_has_is_refused(tmp_path: Path, raw: str) -> None:
    with pytest.raises(UsageError, match="memory_bytes"):
        cards.read(write(tmp_path, f'[[card]]\nname = "x"\nmemory_bytes = {raw}\n'))


@pytest.mark.parametrize("raw", ["24", '"24"', '"24GiB"'])
def test_memory_by_its_short_name(tmp_path: Path, raw: str) -> None:
    """`memory = 24` is what people write."""
    path = write(tmp_path, f'[[card]]\nname = "x"\nmemory = {raw}\n')
    if raw == '"24GiB"':
        assert cards.find("x", path).memory_bytes == 24 * GIB
        return
    with pytest.raises(UsageError, match="is 24 bytes; did you mean 24GiB"):
        cards.read(path)
