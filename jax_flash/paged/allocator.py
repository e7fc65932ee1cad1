"""Whose pages are whose: the host's bookkeeping for the pool of a paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out the pages of a pool and counts the owners of each; it never touches the pool itself.

    A page has one owner when it is allocated and one more with every `share`; the last `release` frees it. What a
    freed page holds stays where it is: attention reads only positions below `kv_lengths`, all written since.
    Sequences may share the full pages of a common prefix: nothing is written to a full page, so that none is copied.

    Args:
      pages: pages in the pool, numbered from 0, at least 1.

    Raises:
      ValueError: naming the argument, its value and what is allowed.

    Source: Kwon et al., PagedAttention (2023).

    Example:
      >>> allocator = PageAllocator(pages=8)
      >>> first = allocator.allocate(3)
      >>> allocator.share(first[:2])           # a second sequence starts with the same two pages
      >>> second = first[:2] + allocator.allocate(1)
      >>> allocator.in_use, allocator.free, allocator.shared
      (4, 4, 2)
      >>> allocator.release(first)             # only what no other sequence reads is free again
      [2]
    """

    def __init__(self, pages: int):
        if pages < 1:
            raise ValueError(f"PageAllocator: pages must be at least 1, got {pages}")
        self.pages = pages
        self._owners = [0] * pages
        self._free = list(reversed(range(pages)))

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Pages with an owner."""
        return self.pages - self.free

    @property
    def shared(self) -> int:
        """Pages with more than one owner."""
        return sum(owners > 1 for owners in self._owners)

    def owners(self, page: int) -> int:
        """How many own the page; 0 when it is free."""
        self._check(page)
        return self._owners[page]

    def allocate(self, count: int = 1) -> list[int]:
        """That many free pages, the last freed first; all of them, or `OutOfPages` and none."""
        if count < 0:
            raise ValueError(f"allocate: count must be at least 0, got {count}")
        if count > self.free:
            raise OutOfPages(f"allocate: got count {count}; {self.free} of {self.pages} pages are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of the pages; ValueError, and no change, where one of them is free."""
        pages = list(pages)
        self._check_owned("share", dict.fromkeys(pages, 1))
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """One owner less for each of the pages; returns those that are free now.

        ValueError, and no change, where a page has fewer owners than it is released times: a double free.
        """
        pages = list(pages)
        self._check_owned("release", Counter(pages))
        freed = []
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                freed.append(page)
        self._free += reversed(freed)
        return freed

    def _check_owned(self, operation: str, times: dict[int, int]) -> None:
        for page, count in times.items():
            self._check(page)
            if self._owners[page] < count:
                raise ValueError(
                    f"{operation}: got page {page} {count} times; it has {self._owners[page]} owners"
                )

    def _check(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise ValueError(f"page: got {page}; the pool has pages 0 to {self.pages - 1}")
