"""Serve text from train_lm.py's model with continuous batching on a paged cache; takes seconds on two CPU cores.

    python examples/generate.py                                   # requests arrive over time, on held-out text
    python examples/generate.py --prompt "The 'for' statement"    # your own prompt; repeat the option for more
    python examples/generate.py --pages 24                        # a small cache: requests wait for pages
    python examples/generate.py --mesh heads=2                    # splits heads, and the cache, over two devices

Prints each request's text as it is generated, the use of the cache's pages, tokens/s, and the distance of the logits
from those of the training forward. The exit status is 1 if that distance is too large, and 2 if there is no checkpoint
or a setting is wrong.
"""

from __future__ import annotations

import argparse
import codecs
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from settings import SettingError, Settings
from train_lm import force_host_devices

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from model import Transformer
    from scheduler import Request, ServingConfig
    from serving import Server


class Arrival(NamedTuple):
    """A request, and the step before which it arrives."""

    step: int
    request: Request


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    options = parse_options(argv)
    force_host_devices(math.prod(Settings(mesh=options.mesh).mesh_axes.values()))
    try:
        return generate(options, time.monotonic())
    except SettingError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; exits with status 2 and a message if it is not valid."""
    parser = argparse.ArgumentParser(
        description="Serve text from train_lm.py's model with jax_flash's paged cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--prompt", action="append", help="text to continue, instead of held-out documents")
    for name, default, text in (
        ("--requests", 16, "number of requests without --prompt"),
        ("--max-tokens", 96, "most bytes to generate for a request (lengths vary without --prompt)"),
        ("--temperature", 0.7, "temperature of sampling; 0 always takes the likeliest byte"),
        ("--seed", 0, "seed of the requests and of sampling"),
        ("--page-size", 16, "tokens per page of the cache"),
        ("--pages", 96, "pages of the cache"),
        ("--slots", 8, "requests that run at the same time"),
        ("--chunk", 64, "most tokens in a step with prompts"),
        ("--mesh", "heads=1", "devices to split the heads over"),
        ("--out", Settings.out, "directory of the training run, with its checkpoint"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=text)
    choices = ("auto", "cpu", "cuda", "xla")
    parser.add_argument("--attention", default="auto", choices=choices, help="implementation of attention")
    options = parser.parse_args(argv)
    if problem := _problem(options):
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str | None:
    for name in ["requests", "max_tokens", "page_size", "pages", "slots"]:
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1"
    if options.chunk < options.slots:
        return f"--chunk is {options.chunk}; it must be at least --slots, which is {options.slots}"
    if not 0 <= options.temperature < math.inf:
        return f"--temperature is {options.temperature}; it must be finite and at least 0"
    try:
        axes = Settings(mesh=options.mesh).mesh_axes
    except ValueError as error:
        return str(error)
    if axes["data"] > 1 or axes["sequence"] > 1:
        return f"--mesh is {options.mesh!r}; serving splits only the heads over devices, as in heads=2"
    return None


def generate(options: argparse.Namespace, started: float) -> int:
    """Loads the model, serves the requests and checks the logits; returns the exit status."""
    from logit_check import check_logits
    from scheduler import ServingConfig
    from serving import Server
    from training import model_config

    model, settings, mesh = load(options)
    serving = ServingConfig(
        pages=options.pages,
        page_size=options.page_size,
        slots=options.slots,
        chunk=options.chunk,
        max_length=settings.row_length,  # the positions that the model was trained on
        temperature=options.temperature,
        seed=options.seed,
    )
    arrivals = make_arrivals(options, serving)
    server = Server(model, model_config(settings), serving, mesh)
    print(describe(options, settings, server, time.monotonic() - started), flush=True)
    serve(server, arrivals)

    requests = [arrival.request for arrival in arrivals]
    print(summary(server, requests), flush=True)
    check = check_logits(model, model_config(settings), mesh, requests)
    print(check)
    return 0 if check.passed else 1


def load(options: argparse.Namespace) -> tuple[Transformer, Settings, Mesh]:
    """The model of the newest checkpoint in --out, its settings and the mesh; raises SettingError if there is none."""
    import orbax.checkpoint as ocp
    from flax import nnx
    from training import Checkpoints, Trainer, make_mesh

    directory = Path(options.out).absolute() / "checkpoint"
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        if not directory.is_dir() or manager.latest_step() is None:
            raise SettingError(
                f"--out is {options.out}, which holds no checkpoint; train one with "
                f"`python examples/train_lm.py --out {options.out}` (or `make demo`)"
            )
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        curve = manager.restore(manager.latest_step(), args=items).record["settings"]
    here = {"attention": options.attention, "mesh": options.mesh, "out": options.out, "resume": True}
    settings = Settings(**curve, **here)
    for name in ("heads", "hidden"):
        if (count := getattr(settings, name)) % settings.mesh_axes["heads"]:
            raise SettingError(f"--mesh is {options.mesh}, which does not divide the model's {count} {name}")
    trainer = Trainer(settings, make_mesh(settings.mesh_axes))
    state, _ = Checkpoints(settings).restore(trainer.abstract_state)
    model, _ = nnx.merge(trainer.graph, state)
    return model, settings, trainer.mesh


def make_arrivals(options: argparse.Namespace, serving: ServingConfig) -> list[Arrival]:
    """The --prompt texts, all at step 0, or beginnings of held-out documents, of random lengths at random steps."""
    from scheduler import Request
    from text import BOS, load_documents

    if options.prompt:
        prompts = [[BOS, *prompt.encode()] for prompt in options.prompt]
        arrivals = [Arrival(0, Request(i, p, options.max_tokens)) for i, p in enumerate(prompts)]
    else:
        random = np.random.default_rng(options.seed)
        _, held_out = load_documents()
        documents = random.permutation(np.array(held_out, object))[:4]  # few, so that prefixes are shared
        longest = max(1, min(256, serving.capacity - options.max_tokens - 1))
        arrivals, step = [], 0
        for number in range(options.requests):
            prompt = documents[random.integers(len(documents))][: random.integers(longest // 4, longest) + 1]
            max_tokens = int(random.integers(options.max_tokens // 3, options.max_tokens)) + 1
            arrivals.append(Arrival(step, Request(number, [BOS, *prompt], max_tokens)))
            step += int(random.geometric(1 / 6)) - 1
    for arrival in arrivals:
        try:
            serving.check(arrival.request)
        except ValueError as error:
            raise SettingError(str(error)) from None
    return arrivals


def serve(server: Server, arrivals: list[Arrival]) -> None:
    """Serves every request from its arrival to its end, and prints its text."""
    transcript = Transcript([arrival.request for arrival in arrivals])
    coming = deque(arrivals)
    while coming or server.scheduler.busy:
        while coming and (coming[0].step <= server.usage.steps or not server.scheduler.busy):
            server.submit(coming.popleft().request)
        server.step()
        transcript.update(server)


class Transcript:
    """Prints requests in order: the first unfinished one as its bytes are generated, the others after it."""

    def __init__(self, requests: list[Request]):
        self._requests, self._shown = deque(requests), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def update(self, server: Server) -> None:
        """Prints the bytes generated since the last call."""
        while self._requests and len(self._requests[0].generated) > self._shown:
            request = self._requests[0]
            if not self._shown:
                self._start(request)
            new = bytes(request.generated[self._shown :])
            print(printable(self._decoder.decode(new)), end="", flush=True)
            self._shown += len(new)
            if request.finished:
                self._requests.popleft()
                self._shown = 0
                self._decoder.reset()
                print(f"\n   └ {server.usage.tokens_per_second:,.0f} tokens/s; {server.pages()}")

    def _start(self, request: Request) -> None:
        shared = f", {request.reused} tokens from shared pages" if request.reused else ""
        prompt = bytes(request.prompt[1:])
        print(f"\n── {request.number}: {len(prompt)} bytes of prompt{shared}")
        print("…" * (len(prompt) > 72) + printable(prompt[-72:].decode(errors="replace")), end="»")


def printable(text: str) -> str:
    """The text with every control character replaced by a dot."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def describe(options: argparse.Namespace, settings: Settings, server: Server, seconds: float) -> str:
    """Two lines about the model and the cache, printed before serving."""
    size = sum(pool.nbytes for pool in server.cache) / 2**20
    return (
        f"{settings.out}: {settings.layers} × {settings.width}, {settings.dtype}, attention {settings.attention}, "
        f"{settings.mesh}; loaded and compiled in {seconds:.1f} s\n"
        f"cache: {options.pages} pages of {options.page_size} tokens, {size:.1f} MiB; at most {options.slots} requests "
        f"at a time, {options.chunk} tokens in a step"
    )


def summary(server: Server, requests: list[Request]) -> str:
    """What was served, how fast, and how the cache was used."""
    usage, again = server.usage, server.scheduler.preempted
    reused = sum(request.reused for request in requests)
    return (
        f"\n{len(requests)} requests in {usage.steps} steps and {usage.seconds:.1f} s: {usage.new_tokens:,} tokens "
        f"generated, {usage.tokens_per_second:,.0f} tokens/s; {usage.prompt_tokens:,} prompt tokens computed, "
        f"{reused:,} found in shared pages\n"
        f"cache: at most {usage.peak_pages} pages in use and {usage.peak_shared} shared, {again} restarts of a request "
        f"for lack of pages; at the end {server.pages()}"
    )


if __name__ == "__main__":
    sys.exit(main())
