"""Serve text from train_lm.py's model, or from a checkpoint, with continuous batching on a paged cache.

    python examples/generate.py                                   # requests arrive over time, on held-out text
    python examples/generate.py --prompt "The 'for' statement"    # your own prompt; repeat the option for more
    python examples/generate.py --pages 24                        # a small cache: requests wait for pages
    python examples/generate.py --mesh heads=2                    # splits heads, and the cache, over two devices
    python examples/generate.py --model PATH                      # a Hugging Face checkpoint of a model of models/

Prints each request's text as it is generated, the use of the cache's pages, tokens/s, and the distance of the logits
from those of the training forward. The exit status is 1 if that distance is too large, and 2 if there is no checkpoint
or a setting is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from settings import SettingError, Settings
from train_lm import force_host_devices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from logit_check import LogitCheck
    from scheduler import Request, ServingConfig
    from serving import Server


class Source(Protocol):
    """A model and its text: `trained.Trained` or `pretrained.Pretrained`."""

    max_length: int
    stop: frozenset[int]

    def encode(self, prompt: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def documents(self) -> list[list[int]]: ...
    def server(self, serving: ServingConfig) -> Server: ...
    def check(self, requests: list[Request]) -> LogitCheck: ...


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
        ("--max-tokens", 96, "most tokens to generate for a request (lengths vary without --prompt)"),
        ("--temperature", 0.7, "temperature of sampling; 0 always takes the likeliest byte"),
        ("--seed", 0, "seed of the requests and of sampling"),
        ("--page-size", 16, "tokens per page of the cache"),
        ("--pages", 96, "pages of the cache"),
        ("--slots", 8, "requests that run at the same time"),
        ("--chunk", 64, "most tokens in a step with prompts"),
        ("--mesh", "heads=1", "devices to split the heads over"),
        ("--out", Settings.out, "directory of the training run, with its checkpoint"),
        (
            "--model",
            None,
            "a Hugging Face checkpoint to serve instead: a folder with config.json and safetensors",
        ),
    ):
        parser.add_argument(name, type=str if default is None else type(default), default=default, help=text)
    choices = ("auto", "cpu", "cuda", "xla")
    parser.add_argument("--attention", default="auto", choices=choices, help="implementation of attention")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="auto", choices=dtypes, help="of --model; auto: as its config.json says"
    )
    parser.add_argument(
        "--check",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="compare the logits with those of a forward without a cache, in float32",
    )
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
    if options.model is not None and axes["heads"] > 1:
        return f"--mesh is {options.mesh!r}; the models of --model run on one device"
    return None


def generate(options: argparse.Namespace, started: float) -> int:
    """Loads the model, serves the requests and checks the logits; returns the exit status."""
    from scheduler import ServingConfig

    source = load(options)
    serving = ServingConfig(
        pages=options.pages,
        page_size=options.page_size,
        slots=options.slots,
        chunk=options.chunk,
        max_length=min(source.max_length, options.pages * options.page_size),
        temperature=options.temperature,
        seed=options.seed,
    )
    arrivals = make_arrivals(options, source, serving)
    server = source.server(serving)
    print(describe(options, source, server, time.monotonic() - started), flush=True)
    serve(source, server, arrivals)

    requests = [arrival.request for arrival in arrivals]
    print(summary(server, requests), flush=True)
    if not options.check:
        return 0
    check = source.check(requests)
    print(check)
    return 0 if check.passed else 1


def load(options: argparse.Namespace) -> Source:
    """The model of --model, or of the newest checkpoint in --out; raises SettingError if there is none."""
    if options.model is not None:
        from pretrained import Pretrained

        return Pretrained(options.model, options.attention, options.dtype)
    from trained import Trained

    return Trained(options.out, options.attention, options.mesh)


def make_arrivals(options: argparse.Namespace, source: Source, serving: ServingConfig) -> list[Arrival]:
    """The --prompt texts, all at step 0, or beginnings of documents, of random lengths at random steps."""
    from scheduler import Request

    if options.prompt:
        prompts = [source.encode(prompt) for prompt in options.prompt]
        arrivals = [Arrival(0, Request(i, p, options.max_tokens, source.stop)) for i, p in enumerate(prompts)]
    else:
        random = np.random.default_rng(options.seed)
        documents = source.documents()
        # Few documents, so that prompts share prefixes.
        documents = [documents[i] for i in random.permutation(len(documents))[:4]]
        longest = max(1, min(256, serving.capacity - options.max_tokens - 1))
        arrivals, step = [], 0
        for number in range(options.requests):
            prompt = documents[random.integers(len(documents))][: random.integers(longest // 4, longest) + 2]
            max_tokens = int(random.integers(options.max_tokens // 3, options.max_tokens)) + 1
            arrivals.append(Arrival(step, Request(number, prompt, max_tokens, source.stop)))
            step += int(random.geometric(1 / 6)) - 1
    for arrival in arrivals:
        try:
            serving.check(arrival.request)
        except ValueError as error:
            raise SettingError(str(error)) from None
    return arrivals


def serve(source: Source, server: Server, arrivals: list[Arrival]) -> None:
    """Serves every request from its arrival to its end, and prints its text."""
    transcript = Transcript(source, [arrival.request for arrival in arrivals])
    coming = deque(arrivals)
    while coming or server.scheduler.busy:
        while coming and (coming[0].step <= server.usage.steps or not server.scheduler.busy):
            server.submit(coming.popleft().request)
        server.step()
        transcript.update(server)


class Transcript:
    """Prints requests in order: the first unfinished one as its text is generated, the others after it."""

    def __init__(self, source: Source, requests: list[Request]):
        self._source, self._requests = source, deque(requests)
        self._shown: str | None = None  # of the first request; None before its first token

    def update(self, server: Server) -> None:
        """Prints the text generated since the last call."""
        while self._requests and (request := self._requests[0]).generated:
            text = self._source.decode(request.generated)
            if not request.finished:
                text = text.rstrip("\ufffd")  # the beginning of a character
            if self._shown is None:
                self._start(request)
                self._shown = ""
            print(printable(text[len(self._shown) :]), end="", flush=True)
            self._shown = text
            if not request.finished:
                return
            self._requests.popleft()
            self._shown = None
            print(f"\n   └ {server.usage.tokens_per_second:,.0f} tokens/s; {server.pages()}")

    def _start(self, request: Request) -> None:
        shared = f", {request.reused} tokens from shared pages" if request.reused else ""
        prompt = self._source.decode(request.prompt)
        print(f"\n── {request.number}: {len(request.prompt)} tokens of prompt{shared}")
        print("…" * (len(prompt) > 72) + printable(prompt[-72:]), end="»")


def printable(text: str) -> str:
    """The text with every control character replaced by a dot."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def describe(options: argparse.Namespace, source: Source, server: Server, seconds: float) -> str:
    """Two lines about the model and the cache, printed before serving."""
    import jax

    size = sum(pool.nbytes for pool in jax.tree.leaves(server.cache)) / 2**20
    return (
        f"{source}; loaded and compiled in {seconds:.1f} s\n"
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
