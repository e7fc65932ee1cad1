"""The allocation of a paged cache's pages, on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..checker import Checker


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Allocates the pages of a pool and counts the owners of each page; it never touches the pool itself.

    An allocated page has one owner, and one more with every `share`; the last `release` frees it. The content of a
    freed page need not be cleared: attention reads only positions below `kv_lengths`, which its new owner has written.
    Sequences may share the full pages of a common prefix without a copy, because full pages are never written to.

    Args:
      pages: pages in the pool, numbered from 0, at least 1.

    Raises:
      ValueError, TypeError: the message names the argument, its value and what is allowed.

    Source: Kwon et al., PagedAttention (2023).

    Example:
      >>> allocator = PageAllocator(pages=8)
      >>> first = allocator.allocate(3)
      >>> allocator.share(first[:2])           # a second sequence has the same prefix of two pages
      >>> second = first[:2] + allocator.allocate(1)
      >>> allocator.in_use, allocator.free, allocator.shared
      (4, 4, 2)
      >>> allocator.release(first)             # only the page that no other sequence owns is free again
      [2]
    """

    def __init__(self, pages: int):
        self.pages = pages = Checker("PageAllocator").whole("pages", pages, least=1)
        self._owners = [0] * pages
        self._free = list(reversed(range(pages)))

    @property
    def free(self) -> int:
        """The number of pages without an owner."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """The number of pages with an owner."""
        return self.pages - self.free

    @property
    def shared(self) -> int:
        """The number of pages with more than one owner."""
        return sum(owners > 1 for owners in self._owners)

    def owners(self, page: int) -> int:
        """The number of owners of a page, 0 if it is free."""
        page = Checker("owners").whole("page", page)
        self._check("owners", page)
        return self._owners[page]

    def allocate(self, count: int = 1) -> list[int]:
        """Allocates `count` free pages, the last freed first; raises `OutOfPages` and takes none if there are fewer."""
        count = Checker("allocate").whole("count", count, least=0)
        if count > self.free:
            raise OutOfPages(
                f"allocate: count is {count}, but only {self.free} of {self.pages} pages are free"
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to each of the pages; raises ValueError, and changes nothing, if one of them is free."""
        pages = _numbers("share", pages)
        self._check_owned("share", dict.fromkeys(pages, 1))
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """Removes an owner from each of the pages; returns those that are free now.

        Raises ValueError, and changes nothing, if a page is released more often than it has owners (a double free).
        """
        pages = _numbers("release", pages)
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
            self._check(operation, page)
            if self._owners[page] < count:
                raise ValueError(
                    f"{operation}: page {page} is passed {count} times, but has {self._owners[page]} owners"
                )

    def _check(self, operation: str, page: int) -> None:
        if not 0 <= page < self.pages:
            raise ValueError(
                f"{operation}: page must be one of the pool's pages, 0 to {self.pages - 1}, got {page}"
            )


def _numbers(operation: str, pages: Iterable[int]) -> list[int]:
    """The numbers of pages that a list, an array or another iterable holds."""
    check = Checker(operation)
    given: Any = pages
    if isinstance(pages, Iterable) and not hasattr(pages, "__array__"):
        given = list(pages)
    if np.size(given) == 0:  # NumPy's empty arrays are of floats
        return []
    numbers = check.host_int32("pages", given)
    if numbers.ndim != 1:
        raise check.fail(f"pages must be a list of page numbers, got {pages!r}", TypeError)
    return [int(x) for x in numbers]
