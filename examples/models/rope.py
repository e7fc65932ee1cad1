"""Rotary position embedding with the scalings of long-context checkpoints (Su et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import apply_rotary


@dataclass(frozen=True)
class Rope:
    """The angle of each pair of features per position, in radians, and a factor on cos and sin."""

    frequencies: tuple[float, ...]  # of features (i, i + d/2), or (2i, 2i + 1) where `interleaved`
    factor: float = 1.0
    interleaved: bool = False

    def __call__(self, positions: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        """Rotates queries and keys [..., t, h, d] by the angles of positions [t]."""
        angles = positions[:, None].astype(jnp.float32) * jnp.array(self.frequencies, jnp.float32)
        cos, sin = self.factor * jnp.cos(angles), self.factor * jnp.sin(angles)
        rows = jnp.arange(len(positions), dtype=jnp.int32)
        return [apply_rotary(x, rows, cos, sin, interleaved=self.interleaved) for x in arrays]


def make_rope(features: int, parameters: Mapping[str, Any], *, interleaved: bool = False) -> Rope:
    """The `rope_parameters` of a config.json, for `features` rotated ones; raises ValueError for an unknown type."""
    frequencies = parameters["rope_theta"] ** (-np.arange(0, features, 2) / features)
    kind = parameters.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(f"rope_type is {kind!r}; the examples have {', '.join(map(repr, SCALINGS))}")
    scaled, factor = SCALINGS[kind](frequencies, parameters)
    return Rope(tuple(scaled.tolist()), factor, interleaved)


def unscaled(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """θ^(−2i/d)."""
    return frequencies, 1.0


def linear(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Positions divided by a factor (Chen et al. 2023)."""
    return frequencies / parameters["factor"], 1.0


def proportional(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """The first, fast part of the frequencies; the other features stay as they are (Gemma 4)."""
    rotated = int(parameters.get("partial_rotary_factor", 1.0) * len(frequencies))
    kept = np.arange(len(frequencies)) < rotated
    return np.where(kept, frequencies / parameters.get("factor", 1.0), 0.0), 1.0


def llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Slow frequencies are divided by the factor, fast ones stay, and those between are interpolated (Llama 3.1)."""
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / parameters["factor"]), 1.0


def yarn(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """As `llama3`, but interpolated over the features, and with a factor on cos and sin (YaRN, Peng et al. 2023)."""
    factor, count = parameters["factor"], len(frequencies)

    def feature(turns: float) -> float:
        """The feature that makes this number of turns within the original length."""
        length = parameters["original_max_position_embeddings"]
        return count * math.log(length / (turns * 2 * math.pi)) / math.log(parameters["rope_theta"])

    first, last = feature(parameters.get("beta_fast") or 32), feature(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    kept = 1 - np.clip((np.arange(count) - first) / max(last - first, 1e-3), 0, 1)
    return frequencies * (kept + (1 - kept) / factor), attention_factor(parameters)


def attention_factor(parameters: Mapping[str, Any]) -> float:
    """YaRN's factor on cos and sin: `attention_factor`, or what the factor and `mscale` imply."""
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    mscale, of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and of_all:
        return magnitude(parameters["factor"], mscale) / magnitude(parameters["factor"], of_all)
    return magnitude(parameters["factor"])


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 1 + 0.1 · mscale · log(factor), by which scores sharpen as the context grows."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


SCALINGS = {
    "default": unscaled,
    "linear": linear,
    "llama3": llama3,
    "proportional": proportional,
    "yarn": yarn,
}
