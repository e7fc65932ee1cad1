"""The settings of a run and their command line options. It imports only the standard library; jax comes later."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any


class SettingError(ValueError):
    """A setting that this machine or the checkpoint to resume from does not allow."""


def option(default: Any, text: str, curve: bool = True, **parsing: Any) -> Any:
    """A field of `Settings` and its command line option. `curve` states whether it changes the loss curve."""
    return field(default=default, metadata={"text": text, "curve": curve, "parsing": parsing})


@dataclass(frozen=True)
class Settings:
    """All inputs of a run; run.json records them."""

    steps: int = option(400, "training steps; the learning rate decays over them")
    rows: int = option(2, "packed rows per step")
    row_length: int = option(1024, "tokens per row")
    seed: int = option(0, "seed of the weights and of the order of documents")
    layers: int = option(4, "transformer blocks")
    width: int = option(256, "width of the residual stream")
    heads: int = option(4, "attention heads")
    head_dim: int = option(64, "features per head, an even number")
    hidden: int = option(1024, "hidden units per MLP")
    learning_rate: float = option(2e-3, "learning rate at its peak")
    warmup: int = option(40, "steps until the peak of the learning rate")
    weight_decay: float = option(0.1, "weight decay of AdamW")
    dtype: str = option(
        "float32", "dtype of the computation; weights stay float32", choices=("float32", "bfloat16")
    )
    target: float = option(0.3, "nats per byte by which validation must end below the bigram model")
    attention: str = option(
        "auto", "implementation of attention", curve=False, choices=("auto", "cpu", "cuda", "xla")
    )
    remat: bool = option(
        False, "recompute the blocks in the backward pass, except for attention", curve=False
    )
    mesh: str = option(
        "data=1,heads=1,sequence=1",
        "devices: data splits rows, heads splits heads and hidden units, sequence splits each row",
        curve=False,
    )
    sequence_mode: str = option(
        "ring", "how attention sees a split row", curve=False, choices=("ring", "all_to_all")
    )
    out: str = option("out/train_lm", "directory for checkpoint, plot and JSON", curve=False)
    resume: bool = option(False, "continue from the checkpoint in --out", curve=False)
    seconds: float = option(280.0, "time limit after which the run ends early, with all results", curve=False)
    stop_at: int | None = option(
        None, "step at which the run ends early, to be resumed", curve=False, type=int
    )
    evaluate_every: int = option(80, "steps between validations", curve=False)
    checkpoint_every: int = option(200, "steps between checkpoints", curve=False)

    @property
    def mesh_axes(self) -> dict[str, int]:
        """The sizes of the mesh axes, 1 for an axis that is left out; raises ValueError if `mesh` is not valid."""
        axes = {"data": 1, "heads": 1, "sequence": 1}
        for part in self.mesh.split(","):
            axis, _, size = part.partition("=")
            if axis not in axes or not size.isdigit() or int(size) < 1:
                raise ValueError(
                    f"--mesh is {self.mesh!r}; it must be data=N,heads=M,sequence=L, each of at least 1 or left out"
                )
            axes[axis] = int(size)
        return axes

    @property
    def device_count(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh_axes.values())

    def curve(self) -> dict[str, Any]:
        """The settings that determine the loss curve, up to rounding on another device or mesh."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["curve"]}

    def is_default_run(self) -> bool:
        """Whether the target applies: every setting that changes the curve or ends the run early has its default."""
        return (
            self.curve() == Settings().curve() and self.stop_at is None and self.seconds >= Settings.seconds
        )

    def to_json(self) -> dict[str, Any]:
        """All settings, for run.json."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Parses the command line; exits with status 2 and a message if it is not valid."""
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
            return f"--{name.replace('_', '-')} is {getattr(s, name)}; it must be at least 1"
    if s.head_dim % 2:
        return f"--head-dim is {s.head_dim}; rotary positions need an even number"
    try:
        axes = s.mesh_axes
    except ValueError as error:
        return str(error)
    for count, axis in (("rows", "data"), ("heads", "heads"), ("hidden", "heads")):
        if getattr(s, count) % axes[axis]:
            return f"--{count} is {getattr(s, count)}, which --mesh {axis}={axes[axis]} does not divide"
    if axes["sequence"] > 1 and s.row_length % (2 * axes["sequence"]):
        return f"--row-length is {s.row_length}; --mesh sequence=N cuts rows into 2·N equal parts"
    return None
