"""What `generate.py --model PATH` serves: a Hugging Face checkpoint of a model of models/."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from logit_check import LogitCheck, compare
from models import CausalLM, load
from models.cache import PagedCache, Pool, make_pools
from scheduler import Batch, Request, ServingConfig
from serving import Server
from settings import SettingError
from text import load_documents


class Pretrained:
    """A checkpoint's model and its tokenizer; raises SettingError if it cannot be served.

    Without a tokenizer.json, prompts and texts are the numbers of tokens.
    """

    def __init__(self, path: str, attention: str, dtype: str):
        self.path, self.attention = path, attention
        changes: dict[str, Any] = {"attention": None if attention == "auto" else attention}
        if dtype != "auto":
            changes["dtype"] = dtype
        try:
            self.model = load(path, **changes)
        except ValueError as error:
            raise SettingError(f"--model: {error}") from None
        self.config = self.model.config
        self.max_length, self.stop = self.config.max_position_embeddings, self.config.stop_tokens
        self.tokenizer = _tokenizer(Path(path) / "tokenizer.json")

    def __str__(self) -> str:
        c = self.config
        sizes = f"{c.num_hidden_layers} × {c.hidden_size}"
        return f"{self.path}: {type(self.model).__name__}, {sizes}, {c.dtype}, attention {self.attention}"

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        if self.tokenizer is not None:
            return list(self.tokenizer.encode(prompt).ids)
        tokens = [int(word) if word.isdigit() else -1 for word in prompt.split()]
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise SettingError(
                f"--prompt is {prompt!r}; {self.path} has no tokenizer.json, so a prompt is numbers below "
                f"{self.config.vocab_size}"
            )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no character yet are "\\ufffd"."""
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(list(tokens)))
        return "".join(f"{token} " for token in tokens)

    def documents(self) -> list[list[int]]:
        """The tokens of some texts, random ones without a tokenizer."""
        if self.tokenizer is not None:
            return [self.encode(document.decode()) for document in load_documents()[1]]
        draw = random.Random(0)
        return [[draw.randrange(self.config.vocab_size) for _ in range(256)] for _ in range(8)]

    def server(self, serving: ServingConfig) -> Server:
        """A server of the model."""
        shapes = self.model.kv_shapes

        def forward(model: CausalLM, pools: list[Pool], batch: Batch) -> tuple[jax.Array, list[Pool]]:
            cache = PagedCache(shapes, pools, batch)
            return model(batch.tokens, cache), cache.pools

        def make_cache(sharding: jax.sharding.NamedSharding) -> list[Pool]:
            return make_pools(shapes, serving.pages, serving.page_size, self.config.dtype, sharding)

        mesh = jax.make_mesh((1,), ("heads",), (AxisType.Auto,), devices=jax.devices()[:1])
        return Server(self.model, forward, make_cache, serving, mesh)

    def check(self, requests: list[Request]) -> LogitCheck:
        """The distance of the served logits from those of whole sequences, which costs a second model in float32."""
        with jax.default_matmul_precision("highest"):
            exact = load(self.path, attention=self.config.attention, dtype="float32")
            reference = whole_logits(exact, requests)
        return compare(requests, reference, whole_logits(self.model, requests))


def whole_logits(model: CausalLM, requests: list[Request]) -> np.ndarray:
    """The logits of every generated token, from whole sequences without a cache: [tokens, vocabulary]."""
    forward = nnx.jit(lambda model, tokens: model(tokens))
    # The last token was never fed to the model.
    longest = max(len(request.tokens) for request in requests) - 1
    rows = []
    for request in requests:
        tokens = np.zeros(longest, np.int32)
        read = request.tokens[:-1]
        tokens[: len(read)] = read
        logits = np.asarray(forward(model, jnp.asarray(tokens)[None]))[0]
        rows.append(
            logits[len(read) - len(request.generated) : len(read)] if request.generated else logits[:0]
        )
    return np.concatenate(rows)


def _tokenizer(file: Path) -> Any:
    """The tokenizer of tokenizer.json, or None if there is no such file."""
    if not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise SettingError(
            f"--model: {file} needs the package `tokenizers`; pip install tokenizers"
        ) from None
    return Tokenizer.from_file(str(file))
