"""One step of the example's training (examples/train_lm.py), for each implementation of attention."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"


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
