"""One training step of examples/train_lm.py, for each implementation of attention and on each mesh."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .scaling import COPY_ENGINES, OPTIONS

EXAMPLES = Path(__file__).parent.parent / "examples"
SCALED = {"layers": 8, "width": 2048, "heads": 16, "head_dim": 128, "hidden": 8192, "dtype": "bfloat16"}
TOKENS = 65536  # tokens of a scaled-up step


def training_calls(implementations: Sequence[str]) -> dict[str, tuple[Any, list[Any]]]:
    """name → (a call that makes one step from the last state, its arguments)."""
    sys.path.insert(0, str(EXAMPLES))
    from settings import Settings
    from text import Packer, load_documents
    from training import Trainer, make_mesh

    calls = {}
    for name in implementations:
        settings = Settings(attention=name)
        trainer = Trainer(settings, make_mesh(settings.mesh_axes))
        batch = Packer(load_documents()[0], settings.rows, settings.row_length, settings.seed).batch(0)
        calls[name] = stepper(trainer, batch, trainer.lower_step(batch).compile()), [()]
    return calls


def stepper(trainer: Any, batch: Any, program: Any) -> Any:
    """A call that makes one step by a compiled program, from the state of the step before; it returns the loss."""
    state, placed = trainer.create(), trainer.place(batch)

    def step() -> Any:
        nonlocal state
        state, loss = program(state, placed)
        return loss

    return step


def scaled(
    meshes: dict[str, str], devices: int, tokens: int = TOKENS, **sizes: Any
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """A step and its compiled program for each mesh, by name, and the FLOP of a step.

    On a GPU the step over the sequence is compiled twice, to send by NCCL or by copy engines. The batch has as many
    rows as devices, but at least two. Each row is a document of random bytes, so that every mesh has the same work.
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

    trainers = {name: Trainer(s, make_mesh(s.mesh_axes)) for name, s in every.items()}
    lowered = {name: trainer.lower_step(batch) for name, trainer in trainers.items()}
    jobs: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in trainers}
    if jax.default_backend() == "gpu" and "sequence" in trainers:
        jobs[f"sequence, {COPY_ENGINES}"] = "sequence", OPTIONS[COPY_ENGINES]
    with ThreadPoolExecutor(None if jax.default_backend() == "gpu" else 1) as pool:
        compiled = pool.map(
            lambda job: lowered[job[0]].compile(compiler_options=job[1] or None), jobs.values()
        )
        programs = dict(zip(jobs, compiled, strict=True))
    steps = {name: stepper(trainers[jobs[name][0]], batch, program) for name, program in programs.items()}
    return steps, programs, step_flop(settings)


def step_flop(settings: Any) -> float:
    """The model's FLOP of a step: six per token for each weight of a matrix product, and those of attention."""
    heads = settings.heads * settings.head_dim
    weights = settings.layers * settings.width * (4 * heads + 2 * settings.hidden) + 256 * settings.width
    tokens = settings.rows * settings.row_length
    attention = 3.5 * 4 * heads * settings.row_length * (settings.row_length + 1) / 2
    return float(6 * weights * tokens + settings.layers * settings.rows * attention)
