"""Models of many families, four layers each and small enough to train in milliseconds, as config.json contents."""

from __future__ import annotations

import json
from pathlib import Path

NUM_LAYERS = 4
MAX_SEQ_LEN = 128

LLAMA_LIKE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_SEQ_LEN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GPT_LIKE = {
    "vocab_size": 256,
    "n_embd": 32,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": MAX_SEQ_LEN,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CHECKPOINTING: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE},
    # Dropout is on by default, at 0.1 in three places: the recompute has to draw the same masks again.
    "gpt2": {"model_type": "gpt2", **_GPT_LIKE},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **LLAMA_LIKE},
    # Refuses sdpa, caps its logits and alternates two kinds of attention.
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 16, **LLAMA_LIKE},
    "gpt_neox": {"model_type": "gpt_neox", **LLAMA_LIKE},
    "opt": {
        "model_type": "opt",
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        **LLAMA_LIKE,
        "pad_token_id": 1,
    },
    # No positions, so no maximum length.
    "bloom": {"model_type": "bloom", "vocab_size": 256, "hidden_size": 32, "n_layer": NUM_LAYERS, "n_head": 4},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **LLAMA_LIKE},
    # No attention at all.
    "mamba": {
        "model_type": "mamba",
        "vocab_size": 256,
        "hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "state_size": 4,
        "pad_token_id": 0,
    },
}
"""Families that can checkpoint."""

REFUSING: dict[str, dict[str, object]] = {
    "ctrl": {"model_type": "ctrl", "dff": 64, **_GPT_LIKE},
    "openai-gpt": {"model_type": "openai-gpt", **_GPT_LIKE},
}
"""Families whose transformers code does not support it."""

CONFIGS = CHECKPOINTING | REFUSING

MODEL_MODULES = tuple(
    f"transformers.models.{name.replace('-', '_')}.modeling_{name.replace('-', '_')}"
    for name in ("openai" if name == "openai-gpt" else name for name in CONFIGS)
)


def write_model(folder: Path, family: str, **changes: object) -> Path:
    """A folder with the family's config.json, as `save_pretrained` would leave it without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[family], **changes}), encoding="utf-8")
    return folder
