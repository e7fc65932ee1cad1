"""The fields of Gemma 4's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from .config import Config

WINDOW, GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(Config):
    """The sizes of the layers without a window, and what only some of the models have."""

    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    final_logit_softcapping: float | None = None
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 256
    vocab_size_per_layer_input: int = 262_144
    enable_moe_block: bool = False
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0

    @classmethod
    def from_json(cls, json: Mapping[str, Any], **changes: Any) -> Self:
        """As `Config.from_json`; raises ValueError for a setting that this model does not have."""
        for name, known in {"use_bidirectional_attention": "vision", "attention_bias": False}.items():
            if json.get(name) not in (None, known):
                raise ValueError(f"{name} is {json[name]!r}; Gemma 4 has {known!r}")
        json = {**json, "hidden_act": json.get("hidden_activation")}
        kinds = [WINDOW if (i + 1) % 6 else GLOBAL for i in range(json["num_hidden_layers"])]
        json["layer_types"] = kinds = json.get("layer_types") or kinds
        if (layers := json.get("per_layer_config")) is not None:
            sizes = [dict(layers.get(str(i), {})) for i, kind in enumerate(kinds) if kind == GLOBAL]
            same = all(x == sizes[0] for x in sizes) and len(layers) == len(sizes)
            if not same or set(sizes[0]) - {"head_dim", "num_key_value_heads"}:
                raise ValueError(f"per_layer_config is {layers}; Gemma 4 has heads by layer_types")
            json["global_head_dim"] = sizes[0].get("head_dim", json.get("head_dim"))
            json["num_global_key_value_heads"] = sizes[0].get("num_key_value_heads")
        return super().from_json(json, **changes)

    def heads(self, layer: int) -> tuple[int, int]:
        """(KV heads, features of a head)."""
        if self.layer_types[layer] == WINDOW:
            return self.num_key_value_heads, self.head_dim
        of_global = self.num_global_key_value_heads if self.attention_k_eq_v else None
        return of_global or self.num_key_value_heads, self.global_head_dim

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer reads."""
        own = self.layer_types[: self.num_hidden_layers - self.num_kv_shared_layers]
        return layer if layer < len(own) else len(own) - 1 - own[::-1].index(self.layer_types[layer])
