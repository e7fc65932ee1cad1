"""The settings of a run and their command line options. Standard library only: jax comes later."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any


class SettingError(ValueError):
    """A setting that this machine, or the checkpoint to resume from, does not allow."""


def option(default: Any, text: str, curve: bool = True, **parsing: Any) -> Any:
    """A field of `Settings` and its command line option; `curve`: whether it shapes the loss curve."""
    return field(default=default, metadata={"text": text, "curve": curve, "parsing": parsing})


@dataclass(frozen=True)
class Settings:
    """Everything that a run is made from. The run's JSON holds all of it."""

    steps: int = option(400, "training steps; the learning rate decays over them")
    rows: int = option(2, "packed rows in a step")
    row_length: int = option(1024, "tokens in a row")
    seed: int = option(0, "of the weights and the order of documents")
    layers: int = option(4, "transformer blocks")
    width: int = option(256, "of the residual stream")
    heads: int = option(4, "attention heads")
    head_dim: int = option(64, "of each head; even")
    hidden: int = option(1024, "units of each MLP")
    learning_rate: float = option(2e-3, "at its peak")
    warmup: int = option(40, "steps up to the peak")
    weight_decay: float = option(0.1, "AdamW's")
    dtype: str = option(
        "float32", "of the computation; weights stay float32", choices=("float32", "bfloat16")
    )
    target: float = option(0.3, "nats per byte that validation must end below the bigram model")
    attention: str = option(
        "auto", "who computes attention", curve=False, choices=("auto", "cpu", "cuda", "xla")
    )
    remat: bool = option(False, "recompute the blocks in the backward pass, attention excepted", curve=False)
    mesh: str = option("data=1,model=1", "devices: rows over data, heads over model", curve=False)
    out: str = option("out/train_lm", "where checkpoint, plot and JSON go", curve=False)
    resume: bool = option(False, "go on from the checkpoint in --out", curve=False)
    seconds: float = option(280.0, "end early, with all results, by about this time", curve=False)
    stop_at: int | None = option(None, "end early at this step, to be resumed", curve=False, type=int)
    evaluate_every: int = option(80, "steps between validations", curve=False)
    checkpoint_every: int = option(200, "steps between checkpoints", curve=False)

    @property
    def mesh_axes(self) -> dict[str, int]:
        """The sizes of the mesh axes, 1 for one left out; raises ValueError where `mesh` names no mesh."""
        axes = {"data": 1, "model": 1}
        for part in self.mesh.split(","):
            axis, _, size = part.partition("=")
            if axis not in axes or not size.isdigit() or int(size) < 1:
                raise ValueError(f"got {self.mesh!r}; allowed is data=N,model=M with N and M of at least 1")
            axes[axis] = int(size)
        return axes

    def curve(self) -> dict[str, Any]:
        """The settings that the loss curve follows from (to rounding, on another device or mesh)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["curve"]}

    def is_default_run(self) -> bool:
        """Whether the target applies: nothing that shapes the curve was changed, nor was the end."""
        return (
            self.curve() == Settings().curve() and self.stop_at is None and self.seconds >= Settings.seconds
        )

    def to_json(self) -> dict[str, Any]:
        """All settings, as JSON holds them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Settings from the command line; exits with status 2 and a sentence where they make no sense."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level language model on Python's documentation with jax_flash.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields(Settings):
        name, default = "--" + f.name.replace("_", "-"), f.default
        parsing = dict(f.metadata["parsing"])
        if isinstance(default, bool):
            parsing["action"] = "store_true"
        else:
            parsing.setdefault("type", type(default))
        parser.add_argument(name, default=default, help=f.metadata["text"], **parsing)
    settings = Settings(**vars(parser.parse_args(argv)))
    if problem := _problem(settings):
        parser.error(problem)
    return settings


def _problem(s: Settings) -> str | None:
    counts = "steps rows row_length layers width heads head_dim hidden warmup evaluate_every checkpoint_every"
    for name in counts.split():
        if getattr(s, name) < 1:
            return f"--{name.replace('_', '-')}: got {getattr(s, name)}; it must be at least 1"
    if s.head_dim % 2:
        return f"--head-dim: got {s.head_dim}; rotary positions need an even number"
    try:
        axes = s.mesh_axes
    except ValueError as error:
        return f"--mesh: {error}"
    for count, axis in (("rows", "data"), ("heads", "model"), ("hidden", "model")):
        if getattr(s, count) % axes[axis]:
            return f"--{count}: got {getattr(s, count)}, which --mesh {axis}={axes[axis]} does not divide"
    return None
