"""The cells that predictions are held to: families, precisions, optimizers, attention, both batch regimes, LoRA.

Small enough that a CPU measures the grid in minutes, large enough that what a trace cannot see is not what decides:
where activations set the peak (`wide`), and where parameters and the optimizer do (`deep in parameters`), with
vocabularies from a thousand to 150,000 words. On CUDA the same families in larger sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

STRATEGIES = ("off", "per-layer", "every:2", "every:4")
ALL = (
    *STRATEGIES,
    "segment:2",
    "first:1",
    "last:1",
    "selective:attention",
    "selective:matmul",
    "every:2+selective:matmul",
    "reentrant",
)
"""On some cases, of every family of layers: every strategy that a prediction knows."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload, measured with every strategy. `settings` are those of `gcbench run`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def _case(name: str, model: str, batch: int, seq_len: int, layers: int = 4, **settings: Any) -> Case:
    changes = settings.pop("set", None)
    strategies = settings.pop("strategies", STRATEGIES)
    extra = {"set": changes} if changes else {}
    return Case(
        name=name,
        settings={
            "model": model,
            "batch_size": batch,
            "seq_len": seq_len,
            "layers": layers,
            "strategies": list(strategies),
            **extra,
            **settings,
        },
    )


_SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
_EXPERTS = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def cpu_cases() -> Iterator[Case]:
    """For a CPU: seconds a cell."""
    llama = {**_SMALL, "head_dim": 64}
    yield _case("llama, activations", "llama-3.2-1b", 8, 256, set={**llama, "vocab_size": 8192}, strategies=ALL)
    yield _case("llama, large vocabulary", "llama-3.2-1b", 4, 64, set=llama)
    yield _case("llama, parameters", "llama-3.2-1b", 1, 32, layers=6, set={**llama, "vocab_size": 1024})
    yield _case("llama, eager", "llama-3.2-1b", 4, 256, set=llama | {"vocab_size": 8192}, attn_implementation="eager")
    small = llama | {"vocab_size": 8192}
    for precision in ("bf16", "bf16-mixed"):
        yield _case(f"llama, {precision}", "llama-3.2-1b", 8, 256, set=small, precision=precision, strategies=ALL)
    for optim in ("adamw_torch_fused", "sgd", "adafactor"):
        yield _case(f"llama, {optim}", "llama-3.2-1b", 2, 64, set=llama | {"vocab_size": 16384}, optim=optim)
    yield _case("llama, LoRA", "llama-3.2-1b", 8, 128, set=llama | {"vocab_size": 8192}, lora_r=8, strategies=ALL)
    yield _case(
        "llama, LoRA on every linear layer, bf16",
        "llama-3.2-1b",
        8,
        128,
        set=llama | {"vocab_size": 8192},
        lora_r=16,
        lora_target_modules=["all-linear"],
        precision="bf16",
    )
    yield _case("gpt2, activations", "gpt2", 4, 128, layers=4, strategies=ALL)
    yield _case("gpt2, eager, bf16-mixed", "gpt2", 4, 128, attn_implementation="eager", precision="bf16-mixed")
    yield _case("gpt2, parameters", "gpt2", 1, 16, layers=6, optim="adamw_torch_fused")
    yield _case("qwen3", "qwen3-0.6b", 4, 128, set=_SMALL | {"head_dim": 64, "vocab_size": 32000})
    yield _case("gemma 2", "gemma-2-2b", 4, 128, set=_SMALL | {"head_dim": 64, "vocab_size": 32000}, strategies=ALL)
    yield _case("gemma 3, bf16", "gemma-3-1b", 4, 256, layers=7, set=_SMALL | {"vocab_size": 16384}, precision="bf16")
    yield _case("pythia", "pythia-160m", 8, 128, strategies=ALL)
    yield _case("pythia, adafactor, bf16-mixed", "pythia-70m", 8, 128, optim="adafactor", precision="bf16-mixed")
    yield _case("opt", "opt-125m", 4, 128)
    yield _case(
        "bloom-like falcon", "falcon-7b", 4, 128, set={"hidden_size": 512, "num_attention_heads": 8}, strategies=ALL
    )
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    yield _case("phi-2", "phi-2", 4, 128, set={"hidden_size": 640, "intermediate_size": 2048, **heads})
    yield _case("olmo 2, sgd", "olmo-2-1b", 4, 128, set=_SMALL | {"vocab_size": 32000, "pad_token_id": 0}, optim="sgd")
    yield _case(
        "mixtral", "mixtral-8x7b", 4, 128, set=_SMALL | {"intermediate_size": 512, "head_dim": 64}, strategies=ALL
    )
    yield _case("qwen3 moe, bf16", "qwen3-30b-a3b", 4, 128, set=_EXPERTS | {"vocab_size": 32000}, precision="bf16")
    yield _case("mamba", "mamba-130m", 2, 24, set={"vocab_size": 16384}, strategies=ALL)


def cuda_cases() -> Iterator[Case]:
    """For a card: real sizes where 40 GiB allow it; a second or two a cell."""
    for batch, seq_len in ((1, 512), (4, 1024)):
        yield _case(f"llama 1b, bf16, {batch} × {seq_len}", "llama-3.2-1b", batch, seq_len, 16, precision="bf16")
    yield _case("llama 1b, fp32", "llama-3.2-1b", 2, 512, 16)
    yield _case("llama 1b, bf16-mixed", "llama-3.2-1b", 2, 1024, 16, precision="bf16-mixed")
    yield _case("llama 1b, eager, bf16", "llama-3.2-1b", 2, 1024, 16, precision="bf16", attn_implementation="eager")
    for optim in ("adamw_torch_fused", "sgd", "adafactor"):
        yield _case(f"llama 1b, bf16, {optim}", "llama-3.2-1b", 2, 1024, 16, precision="bf16", optim=optim)
    yield _case(
        "llama 8b, four layers, bf16", "llama-3.1-8b", 4, 4096, 4, precision="bf16", strategies=(*ALL, "offload")
    )
    yield _case(
        "llama 8b, LoRA, bf16", "llama-3.1-8b", 1, 2048, 16, precision="bf16", lora_r=16, strategies=(*ALL, "offload")
    )
    yield _case("gpt2, fp32", "gpt2", 16, 1024, 12)
    yield _case("gpt2, bf16-mixed", "gpt2", 16, 1024, 12, precision="bf16-mixed", strategies=(*ALL, "offload"))
    yield _case("gpt2, fp16-mixed", "gpt2", 4, 1024, 12, precision="fp16-mixed")
    yield _case("gpt2, parameters", "gpt2", 1, 128, 12)
    yield _case("qwen3 0.6b, bf16", "qwen3-0.6b", 4, 1024, 28, precision="bf16")
    yield _case("gemma 2, bf16", "gemma-2-2b", 2, 1024, 8, precision="bf16", strategies=(*ALL, "offload"))
    yield _case("gemma 3, bf16", "gemma-3-1b", 4, 1024, 12, precision="bf16")
    yield _case("pythia 1b, fp32", "pythia-1b", 4, 512, 16)
    yield _case("opt 1.3b, bf16", "opt-1.3b", 4, 1024, 24, precision="bf16")
    yield _case("falcon 7b, four layers, bf16", "falcon-7b", 4, 1024, 4, precision="bf16")
    yield _case("phi-2, bf16-mixed", "phi-2", 2, 1024, 8, precision="bf16-mixed")
    yield _case("olmo 2, bf16", "olmo-2-1b", 4, 1024, 16, precision="bf16")
    yield _case("qwen3 moe, bf16", "qwen3-30b-a3b", 2, 1024, 4, precision="bf16", strategies=(*ALL, "offload"))
    yield _case("mamba, bf16", "mamba-130m", 4, 64, 12, precision="bf16")


def emulated_cases() -> Iterator[Case]:
    """For an emulated card, where a cell takes half a second: more settings, and sizes that run out of memory."""
    yield from cuda_cases()
    every_one = (*ALL, "offload", "every:2+offload", "segment:3", "selective:mm/addmm")
    small = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    # Every strategy, in each precision and with both kinds of attention code
    yield _case("smollm2, fp32", "smollm2-360m", 2, 512, 8, strategies=every_one)
    yield _case("smollm2, bf16-mixed", "smollm2-360m", 2, 1024, 8, precision="bf16-mixed", strategies=every_one)
    yield _case("smollm2, fp16-mixed", "smollm2-360m", 2, 1024, 8, precision="fp16-mixed", strategies=every_one)
    yield _case("gpt2, bf16", "gpt2", 4, 512, 8, precision="bf16", strategies=every_one)
    yield _case(
        "gpt2, eager, bf16-mixed",
        "gpt2",
        4,
        512,
        6,
        precision="bf16-mixed",
        attn_implementation="eager",
        strategies=ALL,
    )
    yield _case("gpt2, eager, fp32", "gpt2", 4, 512, 6, attn_implementation="eager", strategies=ALL)
    # Optimizers, where the passes set the peak and where the update does
    for optim in ("adamw_torch_fused", "sgd", "adafactor"):
        yield _case(f"gpt2, fp32, {optim}", "gpt2", 4, 512, 6, optim=optim)
        yield _case(
            f"qwen2.5 0.5b, fp16-mixed, {optim}", "qwen2.5-0.5b", 1, 1024, 8, precision="fp16-mixed", optim=optim
        )
        yield _case(f"smollm2, bf16-mixed, {optim}", "smollm2-135m", 4, 512, 10, precision="bf16-mixed", optim=optim)
    # LoRA
    for precision in ("bf16", "fp16-mixed", "bf16-mixed", "fp32"):
        yield _case(
            f"llama 1b, LoRA, {precision}", "llama-3.2-1b", 1, 1024, 8, precision=precision, lora_r=16, strategies=ALL
        )
    yield _case(
        "qwen2.5 0.5b, LoRA on every linear layer, fp16-mixed",
        "qwen2.5-0.5b",
        1,
        512,
        12,
        precision="fp16-mixed",
        lora_r=8,
        lora_target_modules=["all-linear"],
        optim="adamw_torch_fused",
        strategies=("off", "per-layer", "offload"),
    )
    yield _case("gpt2, LoRA, fp16-mixed", "gpt2", 2, 1024, 12, precision="fp16-mixed", lora_r=8)
    # Other layers: sliding windows, biases, one key head, rotary halves, experts, an odd length
    window = small | {"sliding_window": 256, "head_dim": 64}
    yield _case(
        "mistral, a window of 256, bf16-mixed", "mistral-7b-v0.1", 2, 1024, 4, set=window, precision="bf16-mixed"
    )
    yield _case("mistral, a window of 256, fp32", "mistral-7b-v0.1", 2, 500, 4, set=window, strategies=ALL)
    yield _case(
        "gemma 2, eager, fp16-mixed", "gemma-2-2b", 1, 700, 4, precision="fp16-mixed", attn_implementation="eager"
    )
    yield _case("gemma 3 270m, bf16-mixed", "gemma-3-270m", 2, 777, 8, precision="bf16-mixed", strategies=ALL)
    yield _case("qwen2.5 0.5b, bf16", "qwen2.5-0.5b", 4, 1000, 12, precision="bf16", strategies=every_one)
    yield _case("qwen3 0.6b, fp16-mixed", "qwen3-0.6b", 2, 512, 8, precision="fp16-mixed", optim="adafactor")
    yield _case("pythia 410m, bf16-mixed", "pythia-410m", 4, 512, 8, precision="bf16-mixed", strategies=ALL)
    yield _case("phi-2, fp32", "phi-2", 1, 512, 4, strategies=ALL)
    yield _case("phi-3 mini, bf16", "phi-3-mini", 1, 1024, 4, precision="bf16", strategies=ALL)
    yield _case(
        "falcon, fp16-mixed",
        "falcon-7b",
        2,
        512,
        4,
        set={"hidden_size": 1024, "num_attention_heads": 16},
        precision="fp16-mixed",
        strategies=ALL,
    )
    yield _case("opt 125m, fp32, eager", "opt-125m", 4, 512, 12, attn_implementation="eager", set={"layerdrop": 0.0})
    yield _case(
        "opt 125m, bf16-mixed", "opt-125m", 4, 512, 12, precision="bf16-mixed", set={"layerdrop": 0.0}, strategies=ALL
    )
    yield _case("olmo 2, fp32, sgd", "olmo-2-1b", 1, 512, 4, optim="sgd")
    yield _case("tinyllama, fp32, short", "tinyllama-1.1b", 1, 64, 6)
    experts = small | {"intermediate_size": 1024, "head_dim": 64, "vocab_size": 32000}
    yield _case("mixtral, bf16", "mixtral-8x7b", 2, 512, 4, set=experts, precision="bf16", strategies=ALL)
    yield _case("mixtral, fp32", "mixtral-8x7b", 1, 512, 4, set=experts)
    # Sizes about the memory of 16, 24 and 80 GiB
    for batch in (2, 3, 4, 5, 6, 7, 8):
        yield _case(f"llama 1b, bf16, at the limit, {batch}", "llama-3.2-1b", batch, 1024, 16, precision="bf16")
    for batch in (2, 4, 6, 8, 10, 12, 16, 20):
        yield _case(f"qwen2.5 0.5b, bf16, at the limit, {batch}", "qwen2.5-0.5b", batch, 1024, 24, precision="bf16")
    for batch in (1, 2, 3, 4, 6, 8):
        yield _case(
            f"llama 1b, bf16-mixed, at the limit, {batch}", "llama-3.2-1b", batch, 1024, 16, precision="bf16-mixed"
        )
    for batch in (8, 12, 16, 20, 40, 44, 48):
        yield _case(f"gpt2, fp32, at the limit, {batch}", "gpt2", batch, 1024, 12)
    for batch in (1, 2, 4, 6, 8, 10, 12):
        yield _case(
            f"llama 3b, LoRA, bf16, at the limit, {batch}", "llama-3.2-3b", batch, 2048, 28, precision="bf16", lora_r=16
        )
    for batch in (1, 2, 3):
        yield _case(f"llama 8b, bf16, at the limit, {batch}", "llama-3.1-8b", batch, 4096, 32, precision="bf16")


def cases(device: str) -> tuple[Case, ...]:
    """The grid for a kind of device: `cpu`, `cuda` or `emulated`."""
    return tuple({"cpu": cpu_cases, "cuda": cuda_cases, "emulated": emulated_cases}[device]())
