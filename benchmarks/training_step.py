"""One step of the example's training (examples/train_lm.py): for each implementation of attention, and on each mesh."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

EXAMPLES = Path(__file__).parent.parent / "examples"
SCALED = {"layers": 8, "width": 2048, "heads": 16, "head_dim": 128, "hidden": 8192, "dtype": "bfloat16"}
TOKENS = 65536  # of a scaled-up step


def training_calls(implementations: Sequence[str]) -> dict[str, tuple[Any, list[Any]]]:
    """name → (a call that makes one step from the state of the one before, its arguments)."""
    sys.path.insert(0, str(EXAMPLES))
    from settings import Settings
    from text import Packer, load_documents
    from training import Trainer, make_mesh

    calls = {}
    for name in implementations:
        settings = Settings(attention=name)
        trainer = Trainer(settings, make_mesh(settings.mesh_axes))
        batch = Packer(load_documents()[0], settings.rows, settings.row_length, settings.seed).batch(0)
        trainer.compile(batch, batch)
        calls[name] = _stepper(trainer, batch), [()]
    return calls


def _stepper(trainer: Any, batch: Any) -> Any:
    state = trainer.create()

    def step() -> Any:
        nonlocal state
        state, loss = trainer.step(state, batch)
        return loss

    return step


def scaled_calls(
    meshes: dict[str, str], devices: int, tokens: int = TOKENS, **sizes: Any
) -> tuple[dict[str, tuple[Any, list[Any]]], float]:
    """name → (a call that makes one step on the mesh of that name, no arguments); and the FLOP of a step.

    As many rows as devices, two at least, each one document of random bytes, so that every mesh has the same work.
    """
    sys.path.insert(0, str(EXAMPLES))
    from settings import Settings
    from text import Batch
    from training import Trainer, make_mesh

    rows = max(2, devices)
    given = SCALED | {"rows": rows, "row_length": tokens // rows} | sizes
    every = {name: Settings(mesh=mesh or "data=1", **given) for name, mesh in meshes.items()}
    settings = next(iter(every.values()))
    shape = settings.rows, settings.row_length
    data = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ends = np.broadcast_to(np.array([0, shape[1]], np.int32), (shape[0], 2))
    batch = Batch(data[:, :-1], data[:, 1:], positions, ends)

    def make(settings: Any) -> Any:
        trainer = Trainer(settings, make_mesh(settings.mesh_axes))
        trainer.compile(batch)
        return trainer

    with ThreadPoolExecutor(None if jax.default_backend() == "gpu" else 1) as pool:
        trainers = dict(zip(every, pool.map(make, every.values()), strict=True))
    calls = {name: (_stepper(trainer, batch), [()]) for name, trainer in trainers.items()}
    return calls, step_flop(settings)


def step_flop(settings: Any) -> float:
    """The model's FLOP of a step: six for each weight of a product and token, and attention's."""
    heads = settings.heads * settings.head_dim
    weights = settings.layers * settings.width * (4 * heads + 2 * settings.hidden) + 256 * settings.width
    tokens = settings.rows * settings.row_length
    attention = 3.5 * 4 * heads * settings.row_length * (settings.row_length + 1) / 2
    return float(6 * weights * tokens + settings.layers * settings.rows * attention)
