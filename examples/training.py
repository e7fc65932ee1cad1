"""The parts of training: the mesh, the state and its jitted step, validation, checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from model import ModelConfig, Transformer
from settings import SettingError, Settings
from text import PADDING, Batch

from jax_flash import zigzag_positions


@dataclass
class History:
    """Losses and times so far. They are saved with the weights, so that a resumed run reports all of them."""

    losses: list[float] = field(default_factory=list)  # per training step, in nats per byte
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per byte)
    seconds: dict[str, float] = field(default_factory=dict)  # by activity
    tokens: int = 0  # tokens trained on

    @property
    def step(self) -> int:
        """The number of training steps so far."""
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the training steps, without compilation, validation and checkpoints."""
        return self.tokens / max(self.seconds.get("training", 0.0), 1e-9)

    def add(self, loss: float, tokens: int) -> None:
        """Records one step; raises FloatingPointError if its loss is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of training step {self.step + 1} is {loss}; lower --learning-rate"
            )
        self.losses.append(loss)
        self.tokens += tokens

    def spend(self, what: str, since: float) -> None:
        """Adds the time since `since` (of `time.monotonic`) to `seconds[what]`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - since

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Adds the duration of the `with` block to `seconds[what]`."""
        start = time.monotonic()
        yield
        self.spend(what, since=start)


def make_mesh(axes: dict[str, int]) -> Mesh:
    """A mesh of the first devices; raises SettingError if there are too few."""
    count = int(np.prod(list(axes.values())))
    if count > jax.device_count():
        raise SettingError(
            f"--mesh {axes} needs {count} devices; {jax.default_backend()} has {jax.device_count()}"
        )
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def model_config(settings: Settings) -> ModelConfig:
    """The part of the settings that the model sees."""
    return ModelConfig(
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        head_dim=settings.head_dim,
        hidden=settings.hidden,
        dtype=settings.dtype,
        remat=settings.remat,
        attention=None if settings.attention == "auto" else settings.attention,
        sequence_devices=settings.mesh_axes["sequence"],
        sequence_mode=settings.sequence_mode,
    )


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with gradient clipping, and a cosine learning rate with warmup that ends at a tenth of the peak."""
    peak, steps = settings.learning_rate, max(settings.steps, settings.warmup + 1)
    rate = optax.warmup_cosine_decay_schedule(peak / settings.warmup, peak, settings.warmup, steps, peak / 10)
    adamw = optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def nats(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(−Σ log p(target), number of targets) over a batch."""
    logits = model(batch.tokens, batch.positions, batch.cu_seqlens)
    counts = batch.targets != PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, batch.targets, 0))
    return jnp.where(counts, losses, 0).sum(), counts.sum()


class Trainer:
    """A model and its optimizer on a mesh: `create` a state, `step` it, `evaluate` it.

    A state is the `nnx.State` of (model, optimizer), sharded as the weights' annotations say.
    """

    def __init__(self, settings: Settings, mesh: Mesh):
        self.settings, self.mesh = settings, mesh
        with jax.set_mesh(mesh):
            self.graph, shapes = nnx.split(nnx.eval_shape(self._create))
        self.shardings = nnx.get_named_sharding(shapes, mesh)
        self.abstract_state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self.shardings,
        )
        self._step = jax.jit(self._train_step, donate_argnums=0, out_shardings=(self.shardings, None))
        self._evaluate = jax.jit(lambda state, batch: nats(nnx.merge(self.graph, state)[0], batch))

    def create(self) -> nnx.State:
        """The state before the first step, created in its sharding."""
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda: nnx.state(self._create()), out_shardings=self.shardings)()

    def compile(self, batch: Batch, held_out: Batch) -> None:
        """Compiles `step` and `evaluate` for batches of these shapes, so that their times exclude compilation."""
        self._step = self.lower_step(batch).compile()
        with jax.set_mesh(self.mesh):
            self._evaluate = self._evaluate.lower(self.abstract_state, self.place(held_out)).compile()

    def lower_step(self, batch: Batch) -> jax.stages.Lowered:
        """The program of `step`, from a state and a placed batch, before XLA compiles it."""
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.abstract_state, self.place(batch))

    def step(self, state: nnx.State, batch: Batch) -> tuple[nnx.State, jax.Array]:
        """One AdamW step: (the next state, the loss before it in nats per byte). `state` is donated."""
        return self._step(state, self.place(batch))

    def evaluate(self, state: nnx.State, batches: Sequence[Batch]) -> float:
        """Nats per byte of the batches' targets."""
        # One batch at a time: forced host devices can deadlock when programs with collectives overlap.
        sums = [jax.device_get(self._evaluate(state, self.place(batch))) for batch in batches]
        total, count = np.sum(sums, axis=0)
        return float(total / count)

    def place(self, batch: Batch) -> Batch:
        """The batch on the devices: rows split over the mesh axis "data", tokens over "sequence", for a ring
        in zigzag order."""
        devices = self.mesh.shape["sequence"]
        rows, tokens = (
            NamedSharding(self.mesh, PartitionSpec("data", *axis)) for axis in ((), ("sequence",))
        )
        if devices > 1 and self.settings.sequence_mode == "ring":
            order = np.asarray(zigzag_positions(batch.tokens.shape[1], devices))
            batch = Batch(*(x[:, order] for x in batch[:3]), batch.cu_seqlens)
        return jax.device_put(batch, Batch(tokens, tokens, tokens, rows))

    def _create(self) -> tuple[Transformer, nnx.Optimizer[Transformer]]:
        model = Transformer(model_config(self.settings), rngs=nnx.Rngs(self.settings.seed))
        return model, nnx.Optimizer(model, make_optimizer(self.settings), wrt=nnx.Param)

    def _train_step(self, state: nnx.State, batch: Batch) -> tuple[nnx.State, jax.Array]:
        def mean_loss(model: Transformer) -> jax.Array:
            total, count = nats(model, batch)
            return total / count

        model, optimizer = nnx.merge(self.graph, state)
        loss, gradients = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss


class Checkpoints:
    """Saves and restores the newest state and history of a run, in `checkpoint/` under `settings.out`."""

    def __init__(self, settings: Settings):
        directory = Path(settings.out).absolute() / "checkpoint"
        if not settings.resume:
            shutil.rmtree(directory, ignore_errors=True)
        self.settings, self.directory = settings, directory
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(directory, options=options)

    def save(self, state: nnx.State, history: History) -> None:
        """Writes both and removes the previous checkpoint; does nothing if this step is saved already."""
        if self.manager.latest_step() == history.step:
            return
        record = {"history": asdict(history), "settings": self.settings.curve()}
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
        self.manager.save(history.step, args=ocp.args.Composite(**items))

    def restore(self, abstract_state: nnx.State) -> tuple[nnx.State, History]:
        """The newest checkpoint, in the sharding of `abstract_state`.

        Raises SettingError if there is none, or if its settings give another loss curve.
        """
        step = self.manager.latest_step()
        if step is None:
            raise SettingError(
                f"--resume needs a checkpoint, but {self.directory} holds none; leave --resume out"
            )
        items = {"state": ocp.args.StandardRestore(abstract_state), "record": ocp.args.JsonRestore()}
        self._check(self.manager.restore(step, args=ocp.args.Composite(record=items["record"])).record)
        restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        return restored.state, History(**restored.record["history"])

    def _check(self, record: dict[str, Any]) -> None:
        for name, value in self.settings.curve().items():
            if (saved := record["settings"].get(name)) != value:
                raise SettingError(
                    f"--resume: {name} is {value}, but the checkpoint's run has {saved} and must keep it"
                )
