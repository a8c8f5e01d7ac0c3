"""Figures of the device catalogue, checked against second sources and hardware ratios that a mistake would break."""

from __future__ import annotations

from dataclasses import fields

import pytest

from gcbench.core.units import GIB, MIB
from gcbench.devices import cards
from gcbench.devices.cards import PRECISIONS, Card

# Marketed memory sizes, in GiB.
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

WITHOUT_TF32 = ("a10g", "mi210", "mi250x", "mi355x", "rx-7900-xtx")
"""No such format on AMD's cards; for the A10G, which NVIDIA has no datasheet of, no figure is published."""

TEXTS = {"name", "aliases", "full_name", "vendor", "sources"}

by_name = pytest.mark.parametrize("card", cards.cards(), ids=lambda card: card.name)


def test_the_cards_people_use_are_there_by_vendor_and_memory() -> None:
    known = cards.cards()
    assert len(known) >= 18
    assert {card.name for card in known} == set(MARKETED_GIB)
    assert [(card.vendor, card.memory_bytes) for card in known] == sorted((c.vendor, c.memory_bytes) for c in known)


@by_name
def test_usable_memory_is_a_little_less_than_the_marketed_size(card: Card) -> None:
    assert 0.90 <= card.memory_bytes / (MARKETED_GIB[card.name] * GIB) <= 1.01


@by_name
def test_every_figure_has_a_source_and_every_source_a_figure(card: Card) -> None:
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
def test_the_precisions_have_the_ratios_of_the_hardware(card: Card) -> None:
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
    """A wrong SM count, or a peak with tensor cores under fp32, fails this."""
    card = cards.find(name)
    assert card.num_sms is not None
    assert card.matmul_flops["fp32"] == pytest.approx(card.num_sms * per_clock * ghz * 1e9, rel=0.02)


def test_turing_and_volta_have_no_bf16_rate() -> None:
    for name in ("t4", "v100-16gb", "v100-32gb", "rtx-2080-ti", "titan-rtx", "rtx-8000"):
        assert set(cards.find(name).matmul_flops) == {"fp32", "fp16"}


def test_memory_keeps_the_digits_of_its_source() -> None:
    assert cards.find("rtx-4060").memory_bytes == 7807 * MIB
    assert cards.find("a100-40gb").memory_bytes == 42_298_834_944


def test_precisions_are_those_of_the_catalogue() -> None:
    assert {precision for card in cards.cards() for precision in card.matmul_flops} == set(PRECISIONS)
