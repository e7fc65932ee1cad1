"""Checks that serving computes what training did, by comparing its logits with those of the training forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from model import ModelConfig, Transformer
from scheduler import Request

TOLERANCE = 1e-4  # float32 sums in another order, through all layers


@dataclass(frozen=True)
class LogitCheck:
    """Distances from the training forward in full float32: the largest over all logits of all generated tokens.

    Both are relative to the largest logit. `training` is the distance of the training forward in its own precision,
    bfloat16 or TF32 (0 in float32). Serving rounds in other places and may be twice as far off.
    """

    serving: float
    training: float

    @property
    def allowed(self) -> float:
        """The largest distance that serving may have."""
        return TOLERANCE + 2 * self.training

    @property
    def passed(self) -> bool:
        """Whether the distance of serving is within what is allowed."""
        return self.serving <= self.allowed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "TOO FAR"
        return f"logits: within {self.serving:.1e} of the training forward's, {self.allowed:.1e} allowed: {verdict}"


def check_logits(model: Transformer, config: ModelConfig, mesh: Mesh, requests: list[Request]) -> LogitCheck:
    """Compares the logits recorded while serving with those of the model's forward, as in training."""
    with jax.set_mesh(mesh):
        exact_config = replace(config, dtype="float32")
        exact = nnx.eval_shape(lambda: Transformer(exact_config, rngs=nnx.Rngs(0)))
    with jax.default_matmul_precision("highest"):  # by default a GPU rounds float32 operands to TF32, 11 bits
        reference = training_logits(nnx.merge(nnx.graphdef(exact), nnx.state(model)), requests)
    return compare(requests, reference, training_logits(model, requests))


def compare(requests: list[Request], reference: np.ndarray, trained: np.ndarray) -> LogitCheck:
    """The distances of the logits recorded while serving, and of `trained` ones, from those in full float32."""
    largest = np.abs(reference).max()
    served = np.concatenate([request.logits for request in requests])
    return LogitCheck(*(float(np.abs(x - reference).max() / largest) for x in (served, trained)))


def training_logits(model: Transformer, requests: list[Request]) -> np.ndarray:
    """The training forward's logits of every generated token, request after request: [tokens, 256].

    All requests are packed into one row, as documents are in training.
    """
    # The last token was generated but never fed to the model.
    read = [request.tokens[:-1] for request in requests]
    bounds = np.cumsum([0, *map(len, read)])
    tokens = np.concatenate(read).astype(np.int32)
    positions = np.concatenate([np.arange(len(tokens)) for tokens in read]).astype(np.int32)
    forward = nnx.jit(Transformer.__call__)
    logits = np.asarray(forward(model, tokens[None], positions[None], bounds[None].astype(np.int32)))[0]
    stops = bounds[1:].tolist()
    return np.concatenate([logits[stop - len(r.generated) : stop] for r, stop in zip(requests, stops)])
