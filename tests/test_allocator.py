"""A page is handed out once, and is free again when its last owner releases it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash.paged.allocator import OutOfPages, PageAllocator


def test_every_page_is_handed_out_once_and_then_there_are_none():
    allocator = PageAllocator(5)
    pages = allocator.allocate(2) + allocator.allocate(3)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfPages, match="count is 1, but only 0 of 5 pages are free"):
        allocator.allocate()
    allocator.release(pages[:2])
    with pytest.raises(OutOfPages, match="count is 3, but only 2 of 5 pages are free"):
        allocator.allocate(3)
    assert allocator.free == 2  # none were taken
    assert sorted(allocator.allocate(2)) == sorted(pages[:2])


def test_a_page_is_free_when_its_last_owner_releases_it():
    allocator = PageAllocator(4)
    first, second = allocator.allocate(2)
    allocator.share([first])
    assert (allocator.owners(first), allocator.owners(second)) == (2, 1)
    assert (allocator.in_use, allocator.shared, allocator.free) == (2, 1, 2)
    assert allocator.release([first, second]) == [second]
    assert (allocator.in_use, allocator.shared, allocator.free) == (1, 0, 3)
    assert allocator.release([first]) == [first]
    assert allocator.free == 4


def test_a_double_free_raises_and_changes_nothing():
    allocator = PageAllocator(4)
    page, other = allocator.allocate(2)
    with pytest.raises(ValueError, match=f"release: page {page} is passed 2 times, but has 1 owners"):
        allocator.release([other, page, page])
    assert allocator.in_use == 2
    allocator.release([page])
    for operation in (allocator.release, allocator.share):
        with pytest.raises(ValueError, match=f"page {page} is passed 1 times, but has 0 owners"):
            operation([other, page])
    assert (allocator.owners(other), allocator.free) == (1, 3)


def test_pages_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="pages must be at least 1, got 0"):
        PageAllocator(0)
    allocator = PageAllocator(4)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        allocator.allocate(-1)
    for page in (-1, 4):
        for operation in (allocator.release, allocator.share):
            with pytest.raises(ValueError, match=f"page must be one of the pool's pages, 0 to 3, got {page}"):
                operation([page])


def test_pages_may_be_in_an_array_or_a_set():
    allocator = PageAllocator(8)
    pages = allocator.allocate(3)
    allocator.share(np.array(pages))
    assert allocator.release(jnp.array(pages)) == []
    assert allocator.release({*pages}) == sorted(pages)
    assert allocator.release([]) == allocator.release(np.array([])) == []
    assert allocator.owners(jnp.int32(allocator.allocate(jnp.int32(1))[0])) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PageAllocator("8"), "PageAllocator: pages must be an int, got '8'"),
        (lambda: PageAllocator(8).allocate(1.5), "allocate: count must be an int, got 1.5"),
        (lambda: PageAllocator(8).release(0), "release: pages must be a list of page numbers, got 0"),
        (lambda: PageAllocator(8).share([1.5]), "share: pages must hold integers, got float64"),
        (lambda: PageAllocator(8).owners("a"), "owners: page must be an int, got 'a'"),
    ],
)
def test_what_is_no_number_of_pages_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
