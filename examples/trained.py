"""What generate.py serves by default: the byte-level model of train_lm.py's newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from logit_check import LogitCheck, check_logits
from model import Transformer
from scheduler import Request, ServingConfig
from serving import Server, serve_transformer
from settings import SettingError, Settings
from text import BOS, load_documents
from training import Checkpoints, Trainer, make_mesh, model_config


class Trained:
    """The model in the directory of a training run; raises SettingError if there is none."""

    stop: frozenset[int] = frozenset()  # no token ends a text

    def __init__(self, out: str, attention: str, mesh: str):
        self.settings = _settings(out, attention, mesh)
        self.model, self.mesh = _restore(self.settings)
        self.config = model_config(self.settings)
        self.max_length = self.settings.row_length  # the positions that the model was trained on

    def __str__(self) -> str:
        s = self.settings
        return f"{s.out}: {s.layers} × {s.width}, {s.dtype}, attention {s.attention}, {s.mesh}"

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        return [BOS, *prompt.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no character yet are "\\ufffd"."""
        return bytes(token for token in tokens if token != BOS).decode(errors="replace")

    def documents(self) -> list[list[int]]:
        """The tokens of held-out documents."""
        return [[BOS, *document] for document in load_documents()[1]]

    def server(self, serving: ServingConfig) -> Server:
        """A server of the model."""
        return serve_transformer(self.model, self.config, serving, self.mesh)

    def check(self, requests: list[Request]) -> LogitCheck:
        """The distance of the served logits from those of the training forward."""
        return check_logits(self.model, self.config, self.mesh, requests)


def _settings(out: str, attention: str, mesh: str) -> Settings:
    directory = Path(out).absolute() / "checkpoint"
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        if not directory.is_dir() or manager.latest_step() is None:
            raise SettingError(
                f"--out is {out}, which holds no checkpoint; train one with "
                f"`python examples/train_lm.py --out {out}` (or `make demo`)"
            )
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        curve = manager.restore(manager.latest_step(), args=items).record["settings"]
    settings = Settings(**curve, attention=attention, mesh=mesh, out=out, resume=True)
    for name in ("heads", "hidden"):
        if (count := getattr(settings, name)) % settings.mesh_axes["heads"]:
            raise SettingError(f"--mesh is {mesh}, which does not divide the model's {count} {name}")
    return settings


def _restore(settings: Settings) -> tuple[Transformer, Mesh]:
    trainer = Trainer(settings, make_mesh(settings.mesh_axes))
    state, _ = Checkpoints(settings).restore(trainer.abstract_state)
    model, _ = nnx.merge(trainer.graph, state)
    return model, trainer.mesh
