"""The fields of a config.json that every decoder of this folder has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder's sizes, named as in Hugging Face's config.json; `attention` is the `implementation` of jax_flash."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    hidden_act: str = "silu"
    sliding_window: int | None = None  # tokens that layers of the type "sliding_attention" see
    layer_types: tuple[str, ...] | None = None  # None: all are "full_attention"
    dtype: str = "float32"  # of weights and computation; sums, norms' statistics and logits are float32
    attention: str | None = None
    norm_offset: ClassVar[float] = 0.0  # norms multiply by norm_offset + weight
    remat: bool = False  # recompute the blocks in the backward pass, except for attention

    @classmethod
    def from_json(cls, json: Mapping[str, Any], **changes: Any) -> Self:
        """The configuration of a config.json, of either generation of field names, with some fields changed.

        Raises ValueError if a field without a default is missing.
        """
        derived = {
            "head_dim": lambda: json["hidden_size"] // json["num_attention_heads"],
            "num_key_value_heads": lambda: json["num_attention_heads"],
            "rope_parameters": lambda: rope_parameters(json),
        }
        known = {"dtype": json["torch_dtype"]} if json.get("torch_dtype") else {}
        known |= {f.name: json[f.name] for f in fields(cls) if json.get(f.name) is not None}
        known |= changes
        absent = [f.name for f in fields(cls) if f.name not in known and f.default is MISSING]
        try:
            return cls(**known, **{name: derived[name]() for name in absent})
        except KeyError as missing:
            raise ValueError(f"config.json lacks {missing.args[0]}") from None

    def window(self, layer: int) -> int | None:
        """How many tokens a layer's queries see, themselves included; None if all before them."""
        sliding = self.layer_types is not None and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        ids = self.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)


def rope_parameters(json: Mapping[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, as checkpoints before 2026 have them, in the form of `rope_parameters`."""
    scaling = dict(json.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    return {
        "rope_theta": json.get("rope_theta", theta),
        "rope_type": kind,
        "original_max_position_embeddings": json.get("max_position_embeddings"),
        **scaling,
    }
