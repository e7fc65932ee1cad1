"""Train a byte-level language model on Python's documentation with jax_flash; takes minutes on two CPU cores.

    python examples/train_lm.py                         # train, checkpoint, plot, compare with a bigram model
    python examples/train_lm.py --resume                # continue from the checkpoint of a run that was stopped
    python examples/train_lm.py --attention xla         # plain JAX attention, with the same loss curve
    python examples/train_lm.py --mesh data=2,heads=2   # splits rows over `data` and heads over `heads`
    python examples/train_lm.py --mesh sequence=2       # splits each row: attention runs as a ring
    python examples/train_lm.py --dtype bfloat16 --remat

Writes checkpoint/, loss.png and run.json to --out. The exit status is 1 if a run with the default settings missed its
target, and 2 if a setting is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from settings import SettingError, Settings, parse_settings

if TYPE_CHECKING:
    from flax import nnx
    from text import Batch, Packer
    from training import Checkpoints, History, Trainer

STARTED = time.monotonic()  # before the imports, so that the times include them


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Runs the command line `argv` from time `started` (of `time.monotonic`, default now); returns the exit status."""
    settings = parse_settings(argv)
    force_host_devices(settings.device_count)
    try:
        return train(settings, time.monotonic() if started is None else started)
    except SettingError as error:
        print(f"train_lm: {error}", file=sys.stderr)
        return 2


def force_host_devices(count: int) -> None:
    """Makes XLA present the CPU as several devices. It must be called before jax is imported."""
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if count > 1 and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={count}".strip()


def train(settings: Settings, started: float) -> int:
    """Trains, validates and reports; returns the exit status."""
    from report import Verdict, describe, plot, summary, write_json
    from text import Packer, bigram_loss, load_documents
    from training import Checkpoints, History, Trainer, make_mesh

    cpu_started = time.process_time()
    trainer = Trainer(settings, make_mesh(settings.mesh_axes))
    checkpoints = Checkpoints(settings)
    if settings.resume:
        state, history = checkpoints.restore(trainer.abstract_state)
    else:
        state, history = trainer.create(), History()
    history.spend("start", since=started)

    with history.timing("data"):
        training_text, held_out_text = load_documents()
        stream = Packer(training_text, settings.rows, settings.row_length, settings.seed)
        held_out = Packer(held_out_text, settings.rows, settings.row_length).all_batches()
        bigram = bigram_loss(training_text, held_out_text)
    print(describe(settings, trainer, training_text, held_out_text, bigram), flush=True)

    deadline = started + 0.9 * settings.seconds  # leaves time for the last validation, checkpoint and plot
    run_steps(trainer, checkpoints, state, history, stream, held_out, deadline)
    verdict = Verdict(history.validation[-1][1], bigram, settings.target)
    with history.timing("report"):
        plot(settings, history, verdict)
    cores_used = (time.process_time() - cpu_started) / (time.monotonic() - started)
    write_json(settings, history, verdict, cores_used)
    print(summary(settings, history, verdict, cores_used))
    return 1 if settings.is_default_run() and not verdict.reached else 0


def run_steps(
    trainer: Trainer,
    checkpoints: Checkpoints,
    state: nnx.State,
    history: History,
    stream: Packer,
    held_out: list[Batch],
    deadline: float,
) -> None:
    """Trains until the last step or the deadline; validates and saves at intervals and at the end."""
    from tqdm import tqdm

    def validate() -> None:
        with history.timing("validation"):
            history.validation.append((history.step, trainer.evaluate(state, held_out)))

    def save() -> None:
        with history.timing("checkpoints"):
            checkpoints.save(state, history)

    settings = trainer.settings
    last = min(settings.steps, settings.stop_at or settings.steps)
    with history.timing("compilation"):
        trainer.compile(stream.batch(0), held_out[0])
    with tqdm(total=settings.steps, initial=history.step, unit="step", dynamic_ncols=True) as bar:
        while history.step < last and time.monotonic() < deadline:
            with history.timing("training"):
                state, loss = trainer.step(state, stream.batch(history.step))
                history.add(float(loss), tokens=settings.rows * settings.row_length)
            bar.set_postfix_str(f"loss {history.losses[-1]:.3f}, {history.tokens_per_second:,.0f} tokens/s")
            bar.update()
            if history.step % settings.evaluate_every == 0:
                validate()
            if history.step % settings.checkpoint_every == 0:
                save()
    if not history.validation or history.validation[-1][0] != history.step:
        validate()
    save()


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
