"""A random server over one paged cache, against a dense reference in numpy.

Requests of random lengths join, decode, share a prefix with copies of its last page, lose their last tokens and end.
After each step the pools hold exactly what was written, and attention is that of contiguous keys. What must not be read
is poisoned: freed pages and free slots hold NaN, and unused table entries name any page, of other requests too. One
compiled step serves all steps of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import IMPLEMENTATION
from pages import FLOAT8, GARBAGE, require
from test_append import rotated

from jax_flash import append_kv, masks, paged_attention

SLOTS, ENTRIES, WIDTH, STEPS = 3, 4, 12, 14  # requests at once, pages of one, tokens of a step


@dataclass(frozen=True)
class Config:
    """A pool and a call. `scales`: None, or those of a float8 pool: "head", "page" or "dynamic"."""

    name: str
    dtype: str = "float32"
    size: int = 4
    layout: str = "nhd"
    hq: int = 4
    hk: int = 2
    d: int = 16
    dv: int = 16
    latent: bool = False
    float8: str | None = None
    scales: str | None = None
    rotary: bool = False
    causal: bool = True
    window: int | None = None  # keys to the left of the row's own, as an array in a mask
    first: int = 0  # keys that the window does not hide
    draft: int = 0
    options: dict[str, Any] = field(default_factory=dict)


CONFIGS = [
    Config("plain"),
    Config("window as data, one KV head", "bfloat16", 5, "hnd", hq=4, hk=1, d=24, dv=40, window=6),
    Config("first and window, sinks by token", size=3, window=4, first=2, options={"sinks": "token"}),
    Config("latent", "bfloat16", 8, hq=8, hk=1, d=40, dv=32, latent=True, options={"num_splits": 3}),
    Config("rotary, softcap", "float16", 1, "hnd", rotary=True, options={"softcap": 3.0}),
    Config("drafts, slopes", size=16, hq=6, hk=3, d=13, dv=9, draft=4, options={"alibi_slopes": "head"}),
    Config("float8 by head", "bfloat16", 4, float8=FLOAT8[0], scales="head", options={"sinks": "head"}),
    Config("float8 by page", "float16", 8, "hnd", float8=FLOAT8[1], scales="page", causal=False),
    Config("float8, dynamic", "float32", 4, float8=FLOAT8[0], scales="dynamic", window=9),
]


def same(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Equal elements, NaN among them, whatever its bits."""
    a, b = (z.astype(np.float64) for z in (x, y))
    return (a == b) | (np.isnan(a) & np.isnan(b))


class Server:
    """The model: pools [p, ps, hk, d] in numpy, and each request's pages and length."""

    def __init__(self, config: Config, seed: int):
        self.c, self.rng = config, np.random.default_rng(seed)
        self.count = SLOTS * ENTRIES - 2
        self.stored = np.dtype(getattr(ml_dtypes, config.float8 or config.dtype, config.dtype))
        widths = (config.d, 0 if config.latent else config.dv)
        self.pools = [np.full((self.count, config.size, config.hk, w), np.nan, self.stored) for w in widths]
        self.scales = [np.full((self.count, config.hk), np.nan, np.float32) for _ in "kv"]
        if config.scales == "head":
            of_head = self.rng.uniform(0.01, 0.1, (2, config.hk)).astype(np.float32)
            self.scales = [np.repeat(x[None], self.count, 0) for x in of_head]
        elif config.float8 is None:
            self.scales = [np.ones_like(x) for x in self.scales]
        self.free, self.owners = list(range(self.count)), [0] * self.count
        self.pages: list[list[int]] = [[] for _ in range(SLOTS)]
        self.lengths = [0] * SLOTS

    # Requests.

    def take(self) -> int:
        page = self.free.pop(int(self.rng.integers(len(self.free))))
        self.owners[page] = 1
        if self.c.scales == "page":
            for scale in self.scales:
                scale[page] = self.rng.uniform(0.01, 0.1, self.c.hk)
        return page

    def give_back(self, page: int) -> None:
        """The last owner's page is poisoned, its scales too where pages have their own."""
        self.owners[page] -= 1
        if self.owners[page] == 0:
            self.free.append(page)
            for pool, scale in zip(self.pools, self.scales):
                pool[page] = np.nan
                if self.c.scales in ("page", "dynamic"):
                    scale[page] = np.nan

    def cut(self, z: int, length: int) -> None:
        """The request keeps its first tokens; free slots of a page that is its own are poisoned."""
        used = -(-length // self.c.size)
        for page in self.pages[z][used:]:
            self.give_back(page)
        self.pages[z], self.lengths[z] = self.pages[z][:used], length
        if length % self.c.size and self.owners[self.pages[z][-1]] == 1:
            for pool in self.pools:
                pool[self.pages[z][-1], length % self.c.size :] = np.nan

    def fork(self, parent: int, child: int) -> None:
        self.cut(child, 0)
        self.pages[child], self.lengths[child] = list(self.pages[parent]), self.lengths[parent]
        for page in self.pages[parent]:
            self.owners[page] += 1

    def room(self, z: int, tokens: int) -> int:
        """Gets pages for new tokens, first a copy of a shared page; returns for how many tokens there are some."""
        size, pages, length = self.c.size, self.pages[z], self.lengths[z]
        tokens = min(tokens, ENTRIES * size - length)
        if tokens and length % size and self.owners[pages[-1]] > 1:
            if not self.free:
                return 0
            copy = self.take()
            for x in (*self.pools, *self.scales):
                x[copy] = x[pages[-1]]
            self.give_back(pages[-1])
            pages[-1] = copy
        while self.free and len(pages) * size < length + tokens:
            pages.append(self.take())
        return min(tokens, len(pages) * size - length)

    def change(self) -> None:
        """Ends, cuts and forks requests."""
        for z in range(SLOTS):
            chance = self.rng.random()
            if chance < 0.1 or self.lengths[z] == ENTRIES * self.c.size:
                self.cut(z, 0)
            elif chance < 0.25:
                self.cut(z, int(self.rng.integers(self.lengths[z] + 1)))
            elif chance < 0.4:
                self.fork((z + 1) % SLOTS, z)

    def tables(self) -> np.ndarray:
        tables = self.rng.choice([*GARBAGE, *range(self.count)], (SLOTS, ENTRIES)).astype(np.int32)
        for z, pages in enumerate(self.pages):
            tables[z, : len(pages)] = pages
        return tables

    # The reference.

    def keys(self, z: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values of a request, [length, hk, d]."""
        found = []
        for pool, scale in zip(self.pools, self.scales):
            wide = pool[self.pages[z]].astype(np.float64) * scale[self.pages[z], None, :, None].astype(
                np.float64
            )
            found.append(wide.reshape(wide.shape[0] * self.c.size, *wide.shape[2:])[: self.lengths[z]])
        return found[0], found[0][..., : self.c.dv] if self.c.latent else found[1]

    def attend(
        self, z: int, q: np.ndarray, arrays: dict[str, np.ndarray], start: int, low: Any = None
    ) -> Any:
        """out [nq, hq, dv] and lse [hq, nq] of a request's rows, with S and P rounded to `low`."""
        c, (keys, values) = self.c, self.keys(z)
        nq, nk = len(q), len(keys)
        i, j = np.arange(nq)[:, None], np.arange(nk)[None]
        diagonal = i + nk - nq
        seen = j <= diagonal if c.causal else np.ones((nq, nk), bool)
        if c.window is not None:
            seen = seen & ((j >= diagonal - c.window) | (j < c.first)) & (j <= diagonal)
        if 0 < nq <= c.draft:
            new = np.arange(nk) >= nk - nq
            seen = seen & ~(
                new & ~arrays["draft_mask"][z][:nq, np.maximum(np.arange(nk) - (nk - nq), 0) % c.draft]
            )
        group = np.arange(c.hq) // (c.hq // c.hk)
        rounded = (lambda x: x) if low is None else lambda x: x.astype(low).astype(np.float64)
        s = np.einsum("ihd,jhd->hij", q.astype(np.float64), keys[:, group]) * c.d**-0.5
        if cap := c.options.get("softcap"):
            s = cap * np.tanh(s / cap)
        if "alibi_slopes" in arrays:
            s = s - arrays["alibi_slopes"][:, None, None] * np.abs(diagonal - j)
        s = np.where(seen, rounded(s), -np.inf)
        sinks = np.full((c.hq, nq), -np.inf)
        if "sinks" in arrays:
            x = arrays["sinks"]
            sinks = np.broadcast_to(x[:, None] if x.ndim == 1 else x[start : start + nq].T, sinks.shape)
        with np.errstate(divide="ignore"):
            lse = np.logaddexp.reduce(np.concatenate([s, sinks[..., None]], -1), -1)
        p = np.exp(s - np.where(np.isneginf(lse), 0, lse)[..., None])
        return np.einsum("hij,jhd->ihd", rounded(p), values[:, group]), lse

    def accept(
        self,
        got: list[np.ndarray],
        scales: dict[str, Any],
        counts: list[int],
        starts: np.ndarray,
        new: Any,
        rotary: Any,
    ) -> None:
        """The pools after a step: new tokens in their slots, and nothing else has changed."""
        if self.c.scales == "dynamic":
            # A page whose scale has grown is requantised; its tokens are checked by attention.
            for n, name in enumerate(("k_scale", "v_scale")):
                after = np.array(scales[name])
                grown = ~same(after, self.scales[n]).all(-1)
                self.pools[n][grown] = got[n][grown]
                self.scales[n] = after
        for z, count in enumerate(counts):
            for t in range(count):
                rows = [None if x is None else x[starts[z] + t].astype(np.float64) for x in new]
                if rotary is not None:
                    rows[0] = rotated(rows[0], self.lengths[z] + t, *rotary, False)
                self.write(z, t, tuple(x for x in rows if x is not None), got)
            self.lengths[z] += count
        for pool, x in zip(self.pools, got):
            assert same(pool, x).all(), "a slot that no token went to has changed"

    def write(self, z: int, t: int, row: tuple[np.ndarray, ...], got: list[np.ndarray]) -> None:
        """Takes a new token's slot over from the result, after a check that it holds the token."""
        position = self.lengths[z] + t
        at = self.pages[z][position // self.c.size], position % self.c.size
        for n, (pool, wanted) in enumerate(zip(self.pools, row)):
            stored = got[n][at].astype(np.float64) * self.scales[n][at[0]][:, None]
            error = np.abs(stored - wanted)
            if self.c.float8 is None and not (self.c.rotary and n == 0):
                assert not error.any(), f"token {t} of request {z} is not what was appended"
            elif self.c.float8 is None:
                assert (error <= 2 * float(ml_dtypes.finfo(self.stored).eps) * np.abs(wanted) + 1e-3).all()
            else:
                relative = 1 / 8 if self.c.float8 == FLOAT8[1] else 1 / 16
                limit = relative * np.abs(wanted) + self.scales[n][at[0]][:, None] / 512
                assert (error <= limit).all(), (
                    f"token {t} of request {z} is stored with an error of {error.max()}"
                )
            pool[at] = got[n][at]


def program(c: Config, implementation: str) -> Any:
    """The compiled step: append, then attend."""
    dynamic = c.scales == "dynamic"
    angles = np.arange(ENTRIES * c.size)[:, None] / 10.0 ** np.linspace(0, 2, c.d // 2)[None]
    rotary = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if c.rotary else None
    static = {name: x for name, x in c.options.items() if not isinstance(x, str)}

    def step(
        pools: Any, scales: Any, q: Any, k: Any, v: Any, tables: Any, lengths: Any, starts: Any, arrays: Any
    ) -> Any:
        common = dict(page_layout=c.layout, implementation=implementation)
        extra = {"scale": "dynamic"} if dynamic else {}
        k_pages, v_pages, lengths, *after = append_kv(
            *pools, k, v, tables, lengths, cu_seqlens=starts, rotary=rotary, **common, **extra, **scales
        )
        if dynamic:
            scales = dict(zip(("k_scale", "v_scale"), after))
        mask, first = None, lengths - jnp.diff(starts)
        if c.window is not None:
            mask = masks.window(jnp.int32(c.window), 0, first)
            mask = mask if c.first == 0 else (mask | masks.ranges(0, c.first)) & masks.causal(first)
        out = paged_attention(
            q, k_pages, v_pages, tables, lengths, cu_seqlens_q=starts, causal=c.causal, mask=mask, return_lse=True,
            value_dim=c.dv if c.latent else None, **common, **scales, **static, **arrays,
        )  # fmt: skip
        return (k_pages, v_pages), scales, lengths, out

    return jax.jit(step, donate_argnames=("pools", "scales")), rotary


def serve(c: Config, implementation: str, seed: int) -> None:
    server, (step, rotary) = Server(c, seed), program(c, implementation)
    rng, dtype = server.rng, np.dtype(getattr(ml_dtypes, c.dtype, c.dtype))
    heads_first = (lambda x: np.swapaxes(x, 1, 2)) if c.layout == "hnd" else lambda x: x

    def normal(*shape: int) -> np.ndarray:
        power = rng.integers(-3, 4) if c.scales == "dynamic" else 0
        return (rng.standard_normal(shape) * 2.0**power).astype(dtype)

    for _ in range(STEPS):
        server.change()
        left, counts = WIDTH, []
        for z in range(SLOTS):
            wanted = int(rng.choice([0, 1, 1, rng.integers(WIDTH), -server.lengths[z] % c.size]))
            counts.append(server.room(z, min(wanted, left)))
            left -= counts[-1]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        q, k = normal(WIDTH, c.hq, c.d), normal(WIDTH, c.hk, c.d)
        v = None if c.latent else normal(WIDTH, c.hk, c.dv)
        arrays = {"alibi_slopes": rng.uniform(0, 0.3, c.hq)} if "alibi_slopes" in c.options else {}
        if form := c.options.get("sinks"):
            arrays["sinks"] = rng.standard_normal((WIDTH, c.hq) if form == "token" else c.hq)
        arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
        if c.draft:
            arrays["draft_mask"] = rng.random((SLOTS, c.draft, c.draft)) < 0.6
        pools = [None if x.shape[-1] == 0 else jnp.asarray(heads_first(x)) for x in server.pools]
        given = server.scales if c.scales in ("page", "dynamic") else [x[0] for x in server.scales]
        scales = {} if c.float8 is None else dict(zip(("k_scale", "v_scale"), map(jnp.asarray, given)))
        before = np.asarray(server.lengths, np.int32)
        written, scales, lengths, (out, lse) = step(
            pools, scales, q, k, v, server.tables(), before, starts, arrays
        )  # fmt: skip
        assert lengths.tolist() == (before + counts).tolist()
        got = [x if y is None else heads_first(np.asarray(y)) for x, y in zip(server.pools, written)]
        server.accept(got, scales, counts, starts, (k, v), rotary)
        wanted = np.zeros(out.shape), np.full(lse.shape, -np.inf)
        low = np.zeros(out.shape)
        for z in range(SLOTS):
            rows = slice(starts[z], starts[z + 1])
            wanted[0][rows], wanted[1][:, rows] = server.attend(z, q[rows], arrays, starts[z])
            low[rows] = server.attend(z, q[rows], arrays, starts[z], low=dtype)[0].astype(dtype)
        # Keys and values of a pool with dynamic scales grow large, and what float32 rounds is relative to them.
        size = 1 if c.scales != "dynamic" else 2.0**6
        oracle.assert_out(
            np.asarray(out) / size, wanted[0] / size, low / size, softcap="softcap" in c.options
        )
        oracle.assert_lse(np.asarray(lse) / size, wanted[1] / size)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_a_server_with_random_requests_equals_contiguous_attention(config):
    require(IMPLEMENTATION)
    serve(config, IMPLEMENTATION, seed=CONFIGS.index(config))


@pytest.mark.parametrize("config", [CONFIGS[n] for n in (2, 8)], ids=lambda c: c.name)
def test_so_does_plain_jax(config):
    serve(config, "xla", seed=CONFIGS.index(config))
