"""The results of a run: loss.png, run.json and the verdict."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from settings import Settings
from text import Documents
from training import History, Trainer

import jax_flash

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Verdict:
    """Nats per byte of the model and of the bigram model on the same held-out bytes."""

    validation_loss: float
    bigram_loss: float
    target: float

    @property
    def margin(self) -> float:
        """How far the model is below the bigram model."""
        return self.bigram_loss - self.validation_loss

    @property
    def reached(self) -> bool:
        """Whether the margin is at least the target."""
        return self.margin >= self.target

    def __str__(self) -> str:
        return (
            f"validation loss {self.validation_loss:.3f} nats/byte, byte-bigram {self.bigram_loss:.3f}: "
            f"{abs(self.margin):.3f} {'below' if self.margin >= 0 else 'above'}"
        )

    def judged(self, settings: Settings) -> str:
        """The verdict, and for a default run whether it reached the target."""
        if not settings.is_default_run():
            return f"{self}; the target, {self.target} below, is for runs with the default settings"
        return f"{self}, target {self.target} {'reached' if self.reached else 'NOT reached'}"


def describe(
    settings: Settings, trainer: Trainer, train: Documents, held_out: Documents, bigram: float
) -> str:
    """Two lines about the text, the model and the run, printed before training."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(trainer.abstract_state[0]))
    documents, unseen = (
        f"{sum(map(len, texts)):,} bytes in {len(texts)} documents" for texts in (train, held_out)
    )
    weights = f"{count / 1e6:.1f} M weights"
    return (
        f"{documents} to learn from, {unseen} held out, {bigram:.3f} nats/byte for a byte-bigram model\n"
        f"{weights}, {settings.dtype}, attention {settings.attention}, {devices(settings)}: "
        f"{settings.steps} steps of {settings.rows} × {settings.row_length} tokens"
    )


def summary(settings: Settings, history: History, verdict: Verdict, cores_used: float) -> str:
    """The result of the run, and what its time was spent on."""
    more = "; --resume continues" if history.step < settings.steps else ""
    parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in history.seconds.items())
    return (
        f"{history.step} of {settings.steps} steps, {history.tokens_per_second:,.0f} tokens/s{more}\n"
        f"{sum(history.seconds.values()):.1f} s on {cores_used:.1f} of {cpu_cores()} CPU cores: {parts}\n"
        f"wrote {settings.out}/run.json, loss.png, checkpoint/\n{verdict.judged(settings)}"
    )


def devices(settings: Settings) -> str:
    """The devices in use, in words."""
    mesh = f" ({settings.mesh})" if settings.device_count > 1 else ""
    return f"{settings.device_count} × {jax.devices()[0].device_kind}{mesh}"


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "python": platform.python_version(),
        "packages": {"jax-flash": jax_flash.__version__} | {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpu_cores": cpu_cores(),
    }


def write_json(settings: Settings, history: History, verdict: Verdict, cores_used: float) -> None:
    """Writes run.json: every setting, version, loss and time of the run."""
    record = {
        "settings": settings.to_json(),
        "environment": environment(),
        "verdict": asdict(verdict) | {"margin": verdict.margin, "reached": verdict.reached},
        "tokens_per_second": history.tokens_per_second,
        "seconds": sum(history.seconds.values()),
        "cpu_cores_used": cores_used,
        "history": asdict(history),
    }
    (Path(settings.out) / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def plot(settings: Settings, history: History, verdict: Verdict) -> None:
    """Writes loss.png: training and validation loss over tokens seen, with the bigram model and the target."""
    million = 1e6 / (settings.rows * settings.row_length)  # steps
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    seen = np.arange(1, history.step + 1) / million
    axes.plot(seen, history.losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(seen, smooth(history.losses), color="tab:blue", label="training, smoothed")
    steps, losses = zip(*history.validation, strict=True)
    label = f"validation: {verdict.validation_loss:.3f}"
    axes.plot(np.array(steps) / million, losses, "o-", color="tab:orange", label=label)
    axes.axhline(
        verdict.bigram_loss, color="tab:red", linestyle="--", label=f"bigram: {verdict.bigram_loss:.3f}"
    )
    axes.axhline(verdict.bigram_loss - verdict.target, color="tab:green", linestyle=":", label="target")
    title = f"{settings.layers} × {settings.width}, {settings.dtype}, attention {settings.attention}"
    axes.set(xlabel="million bytes trained on", ylabel="nats per byte", title=f"{title}, {devices(settings)}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(settings.out) / "loss.png", dpi=120)


def smooth(values: list[float], weight: float = 0.9) -> np.ndarray:
    """Exponential moving average, with bias correction as in Adam."""
    total = norm = 0.0
    means = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm)
    return np.array(means)
