"""Decoders in Flax NNX whose attention is jax_flash's, for training and for serving from a paged cache.

Each file is a model that loads its Hugging Face checkpoint:

    from models import load
    model = load("path/to/checkpoint", dtype="bfloat16")
    logits = model(tokens)  # [b, s] → [b, s, vocabulary]

`python examples/generate.py --model PATH` serves one. `make models` compares them all with `transformers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checkpoint
from .checkpoint import CheckpointError
from .decoder import CausalLM
from .deepseek_v3 import DeepSeekV3
from .gemma3 import Gemma3
from .gemma4 import Gemma4
from .gpt_oss import GptOss
from .llama3 import Llama3
from .qwen3 import Qwen3

MODELS: dict[str, type[CausalLM]] = {  # by `model_type`
    "deepseek_v3": DeepSeekV3,
    "gemma3_text": Gemma3,
    "gemma4_text": Gemma4,
    "gpt_oss": GptOss,
    "llama": Llama3,
    "qwen3": Qwen3,
}


def load(path: str | Path, **changes: Any) -> CausalLM:
    """The model of a checkpoint, with fields of its configuration changed, such as `dtype`; see `checkpoint.load`."""
    return checkpoint.load(path, MODELS, **changes)


__all__ = ["MODELS", "CausalLM", "CheckpointError", "load"]
