"""Text that every Python installation has, as bytes: documents, packed rows, and a bigram baseline.

The text is Python's own documentation, `pydoc_data.topics`: about 80 documents of 200 to 60,000 bytes. A
document of L bytes is a sequence of L predictions: BOS → first byte, first byte → second byte, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

BOS = 256  # the token before a document's first byte
VOCABULARY = 257
PADDING = -1  # the target of a token without a prediction

Documents = Sequence[bytes]


def load_documents() -> tuple[list[bytes], list[bytes]]:
    """The training and the held-out documents.

    Some documents quote others at length ("compound" contains all of "if", "for", …). Documents that share text are
    therefore held out together, so that training reads almost no passage of the held-out ones.
    """
    groups = sorted(_groups_sharing_text(topics), key=lambda names: -sum(len(topics[name]) for name in names))
    held_out = {name for group in groups[3::8] for name in group}  # one in eight, large and small
    train = [topics[name].encode() for name in sorted(topics) if name not in held_out]
    return train, [topics[name].encode() for name in sorted(held_out)]


def _groups_sharing_text(texts: dict[str, str], length: int = 48) -> list[list[str]]:
    """The names, grouped: texts of a group share more than 200 passages of that length, or a tenth of either's."""
    passages = {
        name: {t[i : i + length] for i in range(len(t) - length)} for name, t in sorted(texts.items())
    }

    def alike(a: str, b: str) -> bool:
        threshold = min(200, len(passages[a]) / 10, len(passages[b]) / 10)
        return len(passages[a] & passages[b]) > threshold

    groups: list[list[str]] = []
    for name in passages:
        joined = [group for group in groups if any(alike(name, other) for other in group)]
        groups = [group for group in groups if group not in joined] + [[name, *chain(*joined)]]
    return groups


class Batch(NamedTuple):
    """Rows of packed documents: `r` rows of `t` tokens, at most `n` sequences per row; all arrays are int32."""

    tokens: np.ndarray  # [r, t]       the byte before each prediction, or BOS
    targets: np.ndarray  # [r, t]      the byte to predict, or PADDING
    positions: np.ndarray  # [r, t]    position within the sequence
    cu_seqlens: np.ndarray  # [r, n+1] where each sequence of the row starts; unused entries repeat the end


class Packer:
    """Cuts an endless stream of documents into rows without padding.

    A document that crosses the end of a row continues in the next row, as a sequence of its own.
    """

    def __init__(self, documents: Documents, rows: int, row_length: int, seed: int = 0):
        if not documents or not all(documents):
            raise ValueError("documents has an empty document or none at all; each needs at least one byte")
        self.documents, self.rows, self.row_length, self.seed = documents, rows, row_length, seed
        self.epoch_tokens = sum(len(document) for document in documents)
        self.max_sequences = row_length // min(len(document) for document in documents) + 2
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> Batch:
        """Batch number `step` of the shuffled stream. It depends on seed and step alone, so that runs can resume."""
        start = step * self.rows * self.row_length
        return self._pack(self._read(start, self.rows * self.row_length))

    def all_batches(self) -> list[Batch]:
        """Every document once, in order; only the end of the last batch is padding."""
        stream = _stream(self.documents)
        size = self.rows * self.row_length
        short = -len(stream[0]) % size
        tokens, targets, starts = (np.pad(part, (0, short)) for part in stream)
        targets[len(targets) - short :] = PADDING
        return [
            self._pack((tokens[i : i + size], targets[i : i + size], starts[i : i + size]))
            for i in range(0, len(tokens), size)
        ]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
        return _stream([self.documents[i] for i in order])

    def _read(self, start: int, count: int) -> tuple[np.ndarray, ...]:
        pieces = []
        while count:
            epoch, offset = divmod(start, self.epoch_tokens)
            piece = tuple(part[offset : offset + count] for part in self._epoch(epoch))
            pieces.append(piece)
            start, count = start + len(piece[0]), count - len(piece[0])
        return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))

    def _pack(self, stream: tuple[np.ndarray, ...]) -> Batch:
        shape = (self.rows, self.row_length)
        tokens, targets, starts = (part.reshape(shape) for part in stream)
        positions = np.zeros(shape, np.int32)
        cu_seqlens = np.zeros((self.rows, self.max_sequences + 1), np.int32)
        for row in range(self.rows):
            used = int((targets[row] != PADDING).sum())
            bounds = np.union1d(np.flatnonzero(starts[row, :used]), [0, used]).astype(np.int32)
            cu_seqlens[row] = used
            cu_seqlens[row, : len(bounds)] = bounds
            positions[row, :used] = np.arange(used) - np.repeat(bounds[:-1], np.diff(bounds))
        return Batch(tokens, targets, positions, cu_seqlens)


def _stream(documents: Documents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All documents concatenated: (tokens, targets, whether a document starts here), each [total bytes]."""
    targets = np.frombuffer(b"".join(documents), np.uint8).astype(np.int32)
    starts = np.zeros(len(targets), bool)
    starts[np.cumsum([0] + [len(document) for document in documents[:-1]])] = True
    tokens = np.where(starts, BOS, np.roll(targets, 1)).astype(np.int32)
    return tokens, targets, starts


def bigram_loss(train: Documents, held_out: Documents) -> float:
    """Nats per byte on `held_out` of a byte-bigram model fitted on `train`, for the language model's predictions.

    p(next | previous) interpolates the bigram counts with the byte frequencies. The strength of the interpolation is
    chosen by leave-one-out on the training documents.
    """
    each = [_pair_counts(document) for document in train]
    total = np.sum(each, axis=0)
    strengths = 2.0 ** np.arange(-4, 9)
    best = min(strengths, key=lambda strength: sum(_nats(total - own, own, strength) for own in each))
    unseen = np.sum([_pair_counts(document) for document in held_out], axis=0)
    return float(_nats(total, unseen, best) / unseen.sum())


def _pair_counts(document: bytes) -> np.ndarray:
    tokens, targets, _ = _stream([document])
    return np.bincount(tokens * 256 + targets, minlength=VOCABULARY * 256).reshape(VOCABULARY, 256)


def _nats(counts: np.ndarray, scored: np.ndarray, strength: float) -> float:
    """−Σ scored · log p, where p = (counts + strength · frequency) / (row sum + strength)."""
    frequency = (counts.sum(axis=0) + 1) / (counts.sum() + 256)
    pairs = np.nonzero(scored)
    p = (counts[pairs] + strength * frequency[pairs[1]]) / (counts.sum(axis=1)[pairs[0]] + strength)
    return float(-(scored[pairs] * np.log(p)).sum())
