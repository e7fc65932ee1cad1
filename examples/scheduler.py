"""Continuous batching on the host: which requests a step serves, and which pages of the cache they use.

A step serves tokens of running requests whose keys are not yet in the cache: the newest token of a request that is
decoding, and a chunk of the prompt of one that has just joined. Requests join in order of arrival, as long as there
are slots, pages and tokens left in the step. When a decoding request finds no free page, the request that joined last
is preempted: it returns its pages and starts over later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jax_flash.paged.allocator import PageAllocator

NO_PAGE = -1  # marks unused entries of block_tables


@dataclass(eq=False)
class Request:
    """A prompt to continue, and the progress so far."""

    number: int  # also the seed of its random stream, so that its text does not depend on other requests
    prompt: list[int]
    max_tokens: int
    stop: frozenset[int] = frozenset()  # tokens that end the text
    tokens: list[int] = field(init=False)  # the prompt, then the generated tokens
    cached: int = 0  # tokens whose keys are in the cache
    reused: int = 0  # cached tokens that another request had computed
    pages: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # [vocabulary] per generated token

    def __post_init__(self) -> None:
        if not self.prompt or self.max_tokens < 1:
            raise ValueError(
                f"request {self.number} has {len(self.prompt)} prompt tokens and max_tokens "
                f"{self.max_tokens}; each must be at least 1"
            )
        self.tokens = list(self.prompt)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.prompt) :]

    @property
    def finished(self) -> bool:
        """Whether all tokens have been generated, or one that ends the text."""
        return len(self.tokens) == len(self.prompt) + self.max_tokens or (
            len(self.tokens) > len(self.prompt) and self.tokens[-1] in self.stop
        )


@dataclass(frozen=True)
class ServingConfig:
    """Sizes of the cache and of a step, and the sampling."""

    pages: int = 64
    page_size: int = 16
    slots: int = 8  # requests that run at the same time, at most
    chunk: int = 64  # tokens in a step, at most
    max_length: int = 1024  # tokens in a request, generated ones included, as trained
    temperature: float = 0.0  # 0 takes the likeliest token
    seed: int = 0

    def __post_init__(self) -> None:
        if self.chunk < self.slots:  # all slots must be able to decode in one step
            raise ValueError(f"chunk is {self.chunk}; it must be at least slots, which is {self.slots}")

    @property
    def capacity(self) -> int:
        """Tokens that a request may have, the generated ones included."""
        return min(self.max_length, self.pages * self.page_size)

    def check(self, request: Request) -> None:
        """Raises ValueError if the request could never be served."""
        if len(request.prompt) + request.max_tokens > self.capacity:
            raise ValueError(
                f"request {request.number} has {len(request.prompt)} prompt tokens and {request.max_tokens} tokens to "
                f"generate; the model and the cache have room for {self.capacity} together"
            )


class Chunk(NamedTuple):
    """`count` tokens of a request that a step serves, from `request.cached` on."""

    request: Request
    count: int

    @property
    def samples(self) -> bool:
        """Whether the request's next token is sampled after it."""
        return self.request.cached + self.count == len(self.request.tokens)


class Batch(NamedTuple):
    """The packed tokens of a step: `t` tokens of at most `s` requests; all arrays are int32."""

    tokens: np.ndarray  # [t]
    positions: np.ndarray  # [t]        within the request
    cu_seqlens: np.ndarray  # [s+1]     where each request's tokens start; unused entries repeat the end
    block_tables: np.ndarray  # [s, most pages of a request]
    cached: np.ndarray  # [s]           keys in the cache before the step
    numbers: np.ndarray  # [s]          of the requests


class PrefixIndex:
    """Finds full pages by their content: their tokens and the page before them.

    A page is in the index while it has an owner. The owner of a page owns all pages before it, so that the number of
    the preceding page identifies the whole prefix.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self._pages: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the longest indexed prefix of the tokens, which never includes the last token."""
        found: list[int] = []
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            page = self._pages.get(self._key(tokens, found, start))
            if page is None:
                break
            found.append(page)
        return found

    def add(self, tokens: Sequence[int], pages: Sequence[int], start: int, stop: int) -> None:
        """Adds those of a request's pages that tokens [start, stop) complete."""
        for number in range(start // self.page_size, stop // self.page_size):
            key = self._key(tokens, pages[:number], number * self.page_size)
            if key not in self._pages:
                self._pages[key] = pages[number]
                self._keys[pages[number]] = key

    def forget(self, pages: Sequence[int]) -> None:
        """Removes pages that were freed."""
        for page in pages:
            if page in self._keys:
                del self._pages[self._keys.pop(page)]

    def _key(self, tokens: Sequence[int], before: Sequence[int], start: int) -> tuple[int, tuple[int, ...]]:
        return before[-1] if before else NO_PAGE, tuple(tokens[start : start + self.page_size])


class Scheduler:
    """Plans steps: call `plan`, run the model on its `batch`, then `commit` the sampled tokens."""

    def __init__(self, config: ServingConfig):
        self.config, self.page_size = config, config.page_size
        self.allocator = PageAllocator(config.pages)
        self.prefixes = PrefixIndex(config.page_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order they joined
        self.preempted = 0  # how often a request was preempted

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Queues a request; raises ValueError if it could never be served."""
        self.config.check(request)
        self.waiting.append(request)

    def plan(self) -> list[Chunk]:
        """The next step: every decoding request takes one token, and prompts share the remaining tokens in order."""
        chunks: list[Chunk] = []
        left = self.config.chunk
        for request in tuple(self.running):
            if request in self.running and self._has_room(request):
                left -= self._add(chunks, request, left)
        while left and self.waiting and len(self.running) < self.config.slots and self._join(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            left -= self._add(chunks, self.running[-1], left)
        return chunks

    def batch(self, chunks: Sequence[Chunk], width: int) -> Batch:
        """The arrays of the step, with the tokens padded to `width`."""
        tokens, positions = np.zeros((2, width), np.int32)
        cu_seqlens = np.zeros(self.config.slots + 1, np.int32)
        tables = np.full((self.config.slots, -(-self.config.max_length // self.page_size)), NO_PAGE, np.int32)
        cached, numbers = np.zeros((2, self.config.slots), np.int32)
        start = 0
        for slot, (request, count) in enumerate(chunks):
            rows, places = slice(start, start + count), slice(request.cached, request.cached + count)
            tokens[rows] = request.tokens[places]
            positions[rows] = np.arange(places.start, places.stop)
            tables[slot, : len(request.pages)] = request.pages
            cached[slot], numbers[slot] = request.cached, request.number
            start += count
            cu_seqlens[slot + 1 :] = start
        return Batch(tokens, positions, cu_seqlens, tables, cached, numbers)

    def commit(self, chunks: Sequence[Chunk], sampled: np.ndarray) -> list[Request]:
        """Appends the sampled tokens, one per chunk, to their requests; returns the requests that have a new token."""
        advanced = []
        for chunk, token in zip(chunks, sampled.tolist()):
            request, samples = chunk.request, chunk.samples
            request.cached += chunk.count
            if samples:
                request.tokens.append(token)
                advanced.append(request)
            if request.finished:
                self.running.remove(request)
                self._give_back(request)
        return advanced

    def _add(self, chunks: list[Chunk], request: Request, left: int) -> int:
        """Serves up to `left` tokens. Their pages can be shared at once, because a step writes before it reads."""
        count = min(left, len(request.tokens) - request.cached)
        chunks.append(Chunk(request, count))
        self.prefixes.add(request.tokens, request.pages, request.cached, request.cached + count)
        return count

    def _join(self, request: Request) -> bool:
        """Gets pages for all tokens so far, sharing indexed ones; returns False and takes none if too few are free."""
        known = self.prefixes.find(request.tokens)
        missing = self._pages_for(request) - len(known)
        if missing > self.allocator.free:
            return False
        self.allocator.share(known)
        request.pages = known + self.allocator.allocate(missing)
        request.cached = len(known) * self.page_size
        request.reused += request.cached
        return True

    def _has_room(self, request: Request) -> bool:
        """Gets the page that the newest token may need, preempting the request that joined last if none is free."""
        while len(request.pages) < self._pages_for(request):
            if self.allocator.free:
                request.pages += self.allocator.allocate()
            else:
                youngest = self.running.pop()
                self._give_back(youngest)
                self.waiting.appendleft(youngest)
                self.preempted += 1
                if youngest is request:
                    return False
        return True

    def _pages_for(self, request: Request) -> int:
        return -(-len(request.tokens) // self.page_size)

    def _give_back(self, request: Request) -> None:
        self.prefixes.forget(self.allocator.release(request.pages))
        request.pages, request.cached = [], 0
