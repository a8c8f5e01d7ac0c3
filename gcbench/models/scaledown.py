"""Scale any causal LM down: fewer layers and less width, with every kind of layer retained. No torch.

Fields are recognised by their names and by how their values relate to each other, not by model family, so new
families are scaled too. The result trains a step in a fraction of a second on a CPU; its time and memory do not
predict those of the original model.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gcbench.core.records import Json

WIDTH = 64
"""Hidden size of every part of a model, so that parts with equal widths still have equal widths."""
HEADS = 4
VOCAB = 512
MAX_LAYERS = 8

_CAPS = {
    r"vocab(?!_offset)": VOCAB,
    r"^original_max_position_embeddings$": 64,
    r"^rel_extent$": 512,
    r"^(num|n|moe_num)_(local_|routed_)?experts$|^zero_expert_num$": 8,
    r"^num_experts_per_tok(en)?$|^moe_(top_?)?k$|^(n_group|num_expert_group|index_topk_blocks|split_ngram_parts)$": 2,
    r"rank$|^(mamba_d_state|(ssm_)?state_size)$": 16,
    # Shorter than any sequence worth training on, so that a window still cuts and a chunk has a next one. The last is
    # DeepSeek-V4's tokens to a block, by kind of attention.
    r"window(_size|_len)?$|^local_attention$|chunk_(size|length)$|^block_size$|^index_topk$|_attention$": 8,
    r"^index_block_size$": 4,
    r"^topk_group$": 1,
}
_POSITIONS = re.compile(
    r"^(max|n)_(positions|position_embeddings|seq_len|(source|target)_positions)$|^(n_ctx|context_length|model_max_length)$"
)
_MOST_POSITIONS = 512
_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim")
_WIDTHS = re.compile(
    r"hidden_size|(intermediate|embedding|feed_forward)_size|d_model|n_embd|(emb|embd|embds|embed|embedding|proj)_dim"
    r"|ff(n|w)?_dim|dim_ff|^d_?ff$|ffn_hidden|_inner|mlp_dim|lru_width|d_ssm|(in|out|input|output)_dim$|^input_size$"
)
_HEADS = re.compile(r"(?<![a-z])(?<!\bd_)(?<!_d_)(?<!dim_)heads?(_per_layer)?$")
_HEAD_DIMS = re.compile(r"head_?dim$|(^|_)d_head$|^dim_head$|^d_kv$|head_size$|^kv_channels$|^rotary_dim$")
_HEAD_DIM = ("head_dim", "d_head", "dim_head", "attention_head_size")
_GROUPS = re.compile(r"^(o_groups|num_query_groups|(mamba_)?n_?groups)$")
_MAMBA_HEAD_DIM = ("mamba_d_head", "mamba_head_dim", "mamba_headdim")
_DEPTH = re.compile(
    r"^(conf_)?(num|n)_((hidden|encoder|decoder|global)_)?layers?(_per_stack)?$|^(en|de)coder_layers$|^num_blocks$|^depth$"
)
_INDICES = re.compile(r"(idxs|_ids|indices|indexes|layers)$")
_PERIODS = re.compile(r"_(pattern|period|interval|step|group_size|every_n_layers|per_attn_res_block)$")
_TOKENS = re.compile(r"token_(id|ids|index)$")


def scaled_down(values: Mapping[str, Json], *, layers: int = 4, seq_len: int = 0) -> dict[str, Json]:
    """Return the config's values with fewer layers and less width, as a new dict; no value grows.

    Fields that are left to their defaults are filled in. `layers` is the depth, unless that is too few for a layer of
    each kind: then it goes up to MAX_LAYERS. Positions for `seq_len` tokens stay. Lists with an entry per layer keep
    those of the layers that stay. A part that is at most WIDTH wide keeps its widths.
    """
    filled = _filled(values)
    tokens = {token for name, value in _fields(filled) if _TOKENS.search(name) for token in _ints(value)}
    large = sorted((token for token in tokens if token >= VOCAB), reverse=True)
    aims = _Aims(
        layers=layers,
        hidden={width for name, value in _fields(filled) if name in _HIDDEN for width in _ints(value) if width > WIDTH},
        tokens={token: VOCAB - 1 - place for place, token in enumerate(large)},
        positions=max(_MOST_POSITIONS, seq_len),
    )
    return _Part.of(filled, None).scaled(filled, aims)


def _filled(values: Mapping[str, Json]) -> dict[str, Json]:
    """The values with those that the config class adds; as they are for a type that transformers does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    filled = copy.deepcopy(dict(values))
    if filled["model_type"] in CONFIG_MAPPING:
        filled = CONFIG_MAPPING[filled["model_type"]].from_dict(filled).to_dict()
    return json.loads(json.dumps(filled, default=str))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class _Aims:
    """What all parts go by: the depth, the hidden sizes there are, the new ids of tokens, the most positions."""

    layers: int
    hidden: set[int]
    tokens: dict[int, int]
    positions: int


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The sizes of one (nested) config that decide on its others.

    Attributes:
        hidden: its width; 0 when unknown.
        heads: the most heads of each family of them ("" is attention).
        head_dim: the width of an attention head, and what becomes of it.
        inner: the width of its state-space layers; 0 when they have no heads.
    """

    hidden: int
    heads: dict[str, int] = field(default_factory=dict)
    head_dim: tuple[int, int] = (1, 1)
    inner: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Json], outer: _Part | None) -> _Part:
        hidden = _first(values, _HIDDEN)
        is_mamba = "num_heads" in values and "expand" in values
        heads: dict[str, int] = {}
        for name in filter(_HEADS.search, values):
            family = "mamba" if is_mamba else _family(name)
            heads[family] = max([heads.get(family, 1), *_ints(values[name])])
        if outer is not None and _depth(values) is None and not (hidden and heads):
            return outer  # a part of a layer, as dbrx has for its attention and for its experts
        inner = _first(values, ("head_dim",) if is_mamba else _MAMBA_HEAD_DIM) * heads.get("mamba", 0)
        count = heads.get("", heads.get("decoder", 0))
        if not count:
            return cls(hidden=hidden, heads=heads, inner=inner)
        old = _first(values, _HEAD_DIM) or max(1, hidden // count)
        new = WIDTH // _fewer_heads(count, count) if old * count == hidden else WIDTH // HEADS
        return cls(hidden=hidden, heads=heads, head_dim=(old, min(old, new)), inner=inner)

    def scaled(self, values: Mapping[str, Json], aims: _Aims) -> dict[str, Json]:
        kept = _kept_layers(values, aims.layers)
        depth = _depth(values) or 0
        result: dict[str, Json] = {}
        for name, value in values.items():
            if name == "per_layer_config" and isinstance(value, dict):  # from a layer's number to what it has different
                fields = {place: value[key] for key in value for place, layer in enumerate(kept) if int(key) == layer}
                result[name] = {f"{i:02}": self.scaled(own, aims) for i, own in fields.items() if isinstance(own, dict)}
            elif isinstance(value, dict):
                result[name] = (self if "rope" in name else _Part.of(value, self)).scaled(value, aims)
            elif (flags := _flags(name, value, depth)) is not None:
                places: list[Json] = [place for place, layer in enumerate(kept) if flags[layer]]
                result[name] = places if isinstance(value, list) else len(places) - (name == "moe_layer_end_index")
            elif isinstance(value, list) and len(value) == depth:
                result[name] = [self._size(name, value[layer], aims) for layer in kept]
            elif isinstance(value, int) and _DEPTH.search(name):
                result[name] = min(value, max(1, value * len(kept) // max(1, depth)))
            else:
                result[name] = self._size(name, value, aims)
        return result

    def _size(self, name: str, value: Json, aims: _Aims) -> Json:
        if isinstance(value, list):
            if name in ("long_factor", "short_factor") and self.hidden > WIDTH:  # one for each pair of rotated channels
                return value[: max(1, len(value) * self.head_dim[1] // self.head_dim[0])]
            return [self._size(name, entry, aims) for entry in value]
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if _TOKENS.search(name):
            return aims.tokens.get(value, value)
        if _POSITIONS.search(name):
            return min(value, aims.positions)
        uncapped = value if self.hidden <= WIDTH else self._width(name, value, aims)
        return min(value, next((most for pattern, most in _CAPS.items() if re.search(pattern, name)), uncapped))

    def _width(self, name: str, value: int, aims: _Aims) -> int:
        """What becomes of a width, of a number of heads and of a head's width; any other value stays."""
        if _HEADS.search(name) or _GROUPS.search(name):
            family = "" if name in ("o_groups", "num_query_groups") else _family(name)
            if family not in self.heads and "mamba" in self.heads:
                family = "mamba"
            return _fewer_heads(value, self.heads.get(family, value))
        if self.inner and (name in _MAMBA_HEAD_DIM or (name == "head_dim" and "" not in self.heads)):
            return self.inner * WIDTH // self.hidden // _fewer_heads(self.heads["mamba"], self.heads["mamba"])
        if _HEAD_DIMS.search(name):
            return max(2, value * self.head_dim[1] // self.head_dim[0] // 2 * 2)
        if name == "mrope_section":
            return max(1, value * self.head_dim[1] // self.head_dim[0])
        if value in aims.hidden and (_WIDTHS.search(name) or name.endswith(("_dim", "_size"))):
            return WIDTH
        return max(16, -(-value * WIDTH // self.hidden // 8) * 8) if _WIDTHS.search(name) else value


def _fewer_heads(count: int, most: int) -> int:
    """What becomes of `count` heads where there are `most`: a power of two, in proportion; several stay several."""
    top = 1 << min(HEADS, most).bit_length() - 1
    return min(top, count, max(2, 1 << max(1, top * count // most).bit_length() - 1))


def _family(name: str) -> str:
    """Which heads a field counts: attention's (""), or another part's ("linear", "index", "mamba", …)."""
    common = {"num", "n", "key", "value", "kv", "query", "attention", "attn", "per", "layer", "heads", "head"}
    return "_".join(word for word in name.split("_") if word not in common)


def _depth(values: Mapping[str, Json]) -> int | None:
    names = [name for name, value in values.items() if _DEPTH.search(name) and isinstance(value, int)]
    if names:
        return _first(values, sorted(names, key=lambda name: (name != "num_hidden_layers", "decoder" not in name)))
    kinds = values.get("layers_block_type")  # what nemotron_h has instead
    return len(kinds) if isinstance(kinds, list) else None


def _flags(name: str, value: Json, depth: int) -> list[bool] | None:
    """Whether each layer is one of those that a field singles out: by a list of numbers, or as the first or last."""
    if isinstance(value, list):
        numbers = _ints(value)
        if not _INDICES.search(name) or len(numbers) < len(value) or numbers != sorted(set(numbers) & {*range(depth)}):
            return None
        return [layer in numbers for layer in range(depth)]
    if not isinstance(value, int):
        return None
    if name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers"):
        return [layer < value for layer in range(depth)]
    if name == "moe_layer_end_index":
        return [layer <= value for layer in range(depth)]
    return [layer >= depth - value for layer in range(depth)] if name == "num_kv_shared_layers" else None


def _kept_layers(values: Mapping[str, Json], layers: int) -> list[int]:
    """The numbers of the layers that stay: the first ones if every kind is among them, else the first of each kind."""
    depth, most = _depth(values), max(layers, MAX_LAYERS)
    if not depth:
        return []
    columns = {name: _flags(name, value, depth) or value for name, value in values.items()}
    per_layer = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == depth}
    own = values.get("per_layer_config")
    different = {int(key): fields for key, fields in own.items()} if isinstance(own, dict) else {}
    kinds = [str([*(column[i] for column in per_layer.values()), different.get(i)]) for i in range(depth)]
    # zamba's hybrid layers share their weights with one another, for which it takes two.
    firsts = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < (2 if "'hybrid'" in kind else 1)]
    periods = [len(v) for k, v in values.items() if k.endswith("_types") and isinstance(v, list) and len(v) < depth]
    if not any(isinstance(column[0], str) for column in per_layer.values()):  # which would say what the period means
        periods += [v for k, v in values.items() if _PERIODS.search(k) and isinstance(v, int)]
    fewest = min(depth, max([layers, *(period for period in periods if period <= most)]))
    if firsts[-1] < most:
        return list(range(max(fewest, firsts[-1] + 1)))
    others = [i for i in range(depth) if i not in firsts]
    return sorted([*firsts[:most], *others[: max(0, fewest - len(firsts))]])


def _fields(values: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """All fields, those of nested configs too."""
    for name, value in values.items():
        yield from _fields(value) if isinstance(value, dict) else [(name, value)]


def _first(values: Mapping[str, Json], names: Sequence[str]) -> int:
    return next((value for name in names if isinstance(value := values.get(name), int)), 0)


def _ints(value: Json) -> list[int]:
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, int) and not isinstance(entry, bool)]
