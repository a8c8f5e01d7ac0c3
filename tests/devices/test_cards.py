"""The device catalogue: figures that would betray a mistake, finding by any spelling, and users' own files."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.units import GIB, MIB
from gcbench.devices import cards
from gcbench.devices.cards import PRECISIONS, Card

# What the box says, in the binary units that it means.
MARKETED_GIB = {
    "t4": 16,
    "v100-16gb": 16,
    "v100-32gb": 32,
    "a10": 24,
    "a10g": 24,
    "l4": 24,
    "l40s": 48,
    "rtx-3060": 12,
    "rtx-3090": 24,
    "rtx-4060": 8,
    "rtx-4080": 16,
    "rtx-4090": 24,
    "rtx-5090": 32,
    "rtx-a6000": 48,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "a100-80gb-pcie": 80,
    "h100": 80,
    "h100-pcie": 80,
    "h200": 141,
    "b200": 180,
    "mi300x": 192,
    "p100-16gb": 16,
    "a30": 24,
    "a40": 48,
    "l40": 48,
    "l20": 48,
    "a800-40gb": 40,
    "a800-80gb": 80,
    "a800-80gb-pcie": 80,
    "a100-40gb-pcie": 40,
    "h800": 80,
    "h20": 96,
    "h100-nvl": 94,
    "gh200": 96,
    "b300": 288,
    "gb200": 186,
    "titan-rtx": 24,
    "rtx-8000": 48,
    "rtx-a4000": 16,
    "rtx-a5000": 24,
    "rtx-4000-ada": 20,
    "rtx-6000-ada": 48,
    "rtx-pro-6000": 96,
    "rtx-2080-ti": 11,
    "rtx-3070": 8,
    "rtx-3080": 10,
    "rtx-3080-12gb": 12,
    "rtx-3080-ti": 12,
    "rtx-3090-ti": 24,
    "rtx-4060-ti-16gb": 16,
    "rtx-4070": 12,
    "rtx-4070-super": 12,
    "rtx-4070-ti": 12,
    "rtx-4070-ti-super": 16,
    "rtx-4080-super": 16,
    "rtx-5060-ti-16gb": 16,
    "rtx-5070": 12,
    "rtx-5070-ti": 16,
    "rtx-5080": 16,
    "mi210": 64,
    "mi250x": 64,
    "mi325x": 256,
    "mi355x": 288,
    "rx-7900-xtx": 24,
}

# Dense, with fp32 accumulation, typed from the datasheets and whitepapers a second time.
DENSE_BF16_TFLOPS = {
    "a10": 125,
    "l4": 121,
    "l40s": 362,
    "rtx-3090": 71,
    "rtx-4080": 97.5,
    "rtx-4090": 165.2,
    "rtx-5090": 209.5,
    "rtx-a6000": 154.8,
    "a100-40gb": 312,
    "a100-80gb": 312,
    "a100-80gb-pcie": 312,
    "h100": 989.4,
    "h100-pcie": 756,
    "h200": 989.5,
    "b200": 2250,
    "mi300x": 1307.4,
    "a30": 165,
    "a40": 149.7,
    "l40": 181.05,
    "l20": 119.5,
    "a800-40gb": 312,
    "a800-80gb": 312,
    "a800-80gb-pcie": 312,
    "a100-40gb-pcie": 312,
    "h800": 989.4,
    "h20": 148,
    "h100-nvl": 835.5,
    "gh200": 990,
    "b300": 2250,
    "gb200": 2500,
    "rtx-a4000": 76.7,
    "rtx-a5000": 111.1,
    "rtx-4000-ada": 106.9,
    "rtx-6000-ada": 364.25,
    "rtx-pro-6000": 503.8,
    "mi210": 181,
    "mi250x": 191.5,
    "mi325x": 1307.4,
    "mi355x": 2516.6,
    "rx-7900-xtx": 122.8,
}

# fp32 operations per SM and clock, and the boost clock in GHz, by the vendors' architecture papers.
FP32_PER_SM_CLOCK = {
    "t4": (128, 1.59),
    "v100-16gb": (128, 1.53),
    "v100-32gb": (128, 1.53),
    "a10": (256, 1.695),
    "l4": (256, 2.04),
    "l40s": (256, 2.52),
    "rtx-3060": (256, 1.777),
    "rtx-3090": (256, 1.695),
    "rtx-4060": (256, 2.46),
    "rtx-4080": (256, 2.505),
    "rtx-4090": (256, 2.52),
    "rtx-5090": (256, 2.407),
    "rtx-a6000": (256, 1.8),
    "a100-40gb": (128, 1.41),
    "a100-80gb": (128, 1.41),
    "a100-80gb-pcie": (128, 1.41),
    "h100": (256, 1.98),
    "h100-pcie": (256, 1.755),
    "h200": (256, 1.98),
    "b200": (256, 1.98),
    "mi300x": (256, 2.1),
    "p100-16gb": (128, 1.303),
    "a30": (128, 1.44),
    "a40": (256, 1.74),
    "l40": (256, 2.49),
    "l20": (256, 2.52),
    "a800-40gb": (128, 1.41),
    "a800-80gb": (128, 1.41),
    "a800-80gb-pcie": (128, 1.41),
    "a100-40gb-pcie": (128, 1.41),
    "h800": (256, 1.98),
    "h20": (256, 1.98),
    "h100-nvl": (256, 1.785),
    "gh200": (256, 1.98),
    "gb200": (256, 2.062),
    "titan-rtx": (128, 1.77),
    "rtx-8000": (128, 1.77),
    "rtx-a4000": (256, 1.56),
    "rtx-a5000": (256, 1.695),
    "rtx-4000-ada": (256, 2.175),
    "rtx-6000-ada": (256, 2.505),
    "rtx-pro-6000": (256, 2.617),
    "rtx-2080-ti": (128, 1.545),
    "mi210": (256, 1.7),
    "mi250x": (256, 1.7),
    "mi325x": (256, 2.1),
    "mi355x": (256, 2.4),
    "rx-7900-xtx": (256, 2.5),
}

WITHOUT_TF32 = ("mi210", "mi250x", "mi355x", "rx-7900-xtx")
WITHOUT_A_NAME_OF_ITS_OWN = ("a800-40gb", "rtx-3080-12gb", "rtx-4060-ti-16gb", "rtx-5060-ti-16gb")
"""Two sizes of them have one name in torch, or it is not known."""

TEXTS = {"name", "aliases", "full_name", "vendor", "sources"}

by_name = pytest.mark.parametrize("card", cards.cards(), ids=lambda card: card.name)


def write(folder: Path, text: str) -> Path:
    path = folder / "cards.toml"
    path.write_text(text)
    return path


def test_the_cards_people_use_are_there_by_vendor_and_memory() -> None:
    known = cards.cards()
    assert len(known) >= 18
    assert {card.name for card in known} == set(MARKETED_GIB)
    assert [(card.vendor, card.memory_bytes) for card in known] == sorted((c.vendor, c.memory_bytes) for c in known)


def test_no_spelling_means_two_cards() -> None:
    """The trap: "A10 24 GB" and "a10-24gb" are one spelling once punctuation is gone."""
    spellings = [cards._plain(spelling) for card in cards.cards() for spelling in {*card.spellings}]
    assert len(spellings) == len(set(spellings))


@by_name
def test_usable_memory_is_a_little_less_than_the_box_says(card: Card) -> None:
    assert 0.90 <= card.memory_bytes / (MARKETED_GIB[card.name] * GIB) <= 1.01


@by_name
def test_every_figure_has_its_source_and_no_source_is_left_over(card: Card) -> None:
    given = {f.name for f in fields(card) if f.name not in TEXTS and getattr(card, f.name) not in (None, {})}
    assert set(card.sources) == given
    for key, source in card.sources.items():
        assert "https://" in source, key


@by_name
def test_measured_is_below_the_datasheet_or_a_geforce_above_its_rated_clock(card: Card) -> None:
    assert set(card.achievable_matmul_flops) <= set(card.matmul_flops)
    slack = 1.15 if "GeForce" in (card.full_name or "") else 1.0
    for precision, measured in card.achievable_matmul_flops.items():
        assert 0.4 * card.matmul_flops[precision] < measured <= slack * card.matmul_flops[precision], precision
    if card.achievable_bandwidth_bytes_per_s is not None:
        assert card.bandwidth_bytes_per_s is not None
        assert 0.6 < card.achievable_bandwidth_bytes_per_s / card.bandwidth_bytes_per_s < 1


@pytest.mark.parametrize(("name", "tflops"), DENSE_BF16_TFLOPS.items())
def test_bf16_peaks_are_the_dense_ones(name: str, tflops: float) -> None:
    """The trap: NVIDIA prints rates with sparsity, twice as high, and GeForce rates with fp16 accumulation, too."""
    assert cards.find(name).matmul_flops["bf16"] == pytest.approx(tflops * 1e12, rel=1e-12)


@by_name
def test_the_precisions_stand_in_the_ratios_of_the_hardware(card: Card) -> None:
    """One sparse figure among dense ones breaks a ratio."""
    peak = card.matmul_flops
    if "bf16" in peak:
        assert peak["bf16"] == peak["fp16"]
    if "bf16" in peak and card.name not in WITHOUT_TF32:
        assert peak["tf32"] == pytest.approx(peak["bf16"] / 2, rel=0.03)
    if len(peak) > 1:
        assert peak["fp32"] <= peak.get("tf32", peak["fp16"])


@pytest.mark.parametrize(("name", "per_clock", "ghz"), [(n, *rate) for n, rate in FP32_PER_SM_CLOCK.items()])
def test_fp32_peak_is_sms_times_clock(name: str, per_clock: int, ghz: float) -> None:
    """A wrong SM count, or a peak with tensor cores under fp32, does not survive this."""
    card = cards.find(name)
    assert card.num_sms is not None
    assert card.matmul_flops["fp32"] == pytest.approx(card.num_sms * per_clock * ghz * 1e9, rel=0.02)


def test_turing_and_volta_have_no_bf16_rate() -> None:
    for name in ("t4", "v100-16gb", "v100-32gb", "rtx-2080-ti", "titan-rtx", "rtx-8000"):
        assert set(cards.find(name).matmul_flops) == {"fp32", "fp16"}


@pytest.mark.parametrize(
    "spelling", ["rtx-4090", "RTX4090", "rtx 4090", "RTX_4090", " 4090 ", "NVIDIA GeForce RTX 4090", "rtx-4090-24GB"]
)
def test_any_spelling_finds_the_card(spelling: str) -> None:
    assert cards.find(spelling).name == "rtx-4090"


@by_name
def test_what_torch_calls_the_card_finds_it(card: Card) -> None:
    assert (card.full_name is None) == (card.name in WITHOUT_A_NAME_OF_ITS_OWN)
    assert cards.find(card.title) is card


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("a100", "'a100' comes in several sizes; near names: a100-40gb, a100-40gb-pcie, a100-80gb-pcie, a100-80gb;"),
        ("V100", "'V100' comes in several sizes; near names: v100-16gb, v100-32gb;"),
        ("4060ti", "near names: rtx-4060-ti-16gb;"),
        ("rtx 4090 ti", "near names: rtx-4090;"),
        ("rtx-4900", "near names: rtx-4090, "),
        ("xyzzy", "gcbench devices lists all that are known;"),
    ],
)
def test_an_unknown_or_ambiguous_name_gets_near_ones(asked: str, near: str) -> None:
    """The trap: a100 alone could be 40 or 80 GB, so it must not be guessed."""
    with pytest.raises(UnavailableError) as raised:
        cards.find(asked)
    message = str(raised.value)
    assert near in message and repr(asked) in message
    assert message.endswith(
        "or give its memory alone, like --device-memory 48GiB, or describe it with --device-file FILE.toml: a [[card]] "
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
    """With or without the vendor's words, in any case, with the size on the box or without."""
    assert cards.find(typed).name == name


def test_a_size_that_a_card_does_not_have_finds_none() -> None:
    """The trap: a name with its size cut off would be another card."""
    for typed in ("h100-96gb", "rtx-4090-48gb", "l4-48gb"):
        assert cards.known(typed) is None


@pytest.mark.parametrize("typed", ["m3-max", "mps", "Apple M2 Ultra", "M1", "tpu-v4", "gaudi2"])
def test_a_processor_without_cuda_is_told_what_to_take(typed: str) -> None:
    with pytest.raises(UnavailableError, match="take --device cpu with --device-memory 36GiB"):
        cards.find(typed)


def test_a_quadro_m4000_is_no_apple() -> None:
    with pytest.raises(UnavailableError, match="there is no device 'M4000'"):
        cards.find("M4000")


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


def test_all_mistakes_of_a_users_file_are_told_at_once(tmp_path: Path) -> None:
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
        ", card 1 (one): sources: 'me' is not a table from a key to where its figure was published",
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


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path: Path) -> None:
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


def test_memory_keeps_the_digits_of_its_source() -> None:
    assert cards.find("rtx-4060").memory_bytes == 7807 * MIB
    assert cards.find("a100-40gb").memory_bytes == 42_298_834_944


def test_a_card_travels_to_another_process() -> None:
    card = cards.find("h100")
    assert pickle.loads(pickle.dumps(card)) == card
    assert hash(card) == hash(pickle.loads(pickle.dumps(card)))


def test_importing_reads_no_file_and_no_torch() -> None:
    code = "import sys, gcbench.devices.cards as c; print(c._built_in.cache_info().currsize, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 False\n"


def test_precisions_are_those_of_the_catalogue() -> None:
    assert {precision for card in cards.cards() for precision in card.matmul_flops} == set(PRECISIONS)
