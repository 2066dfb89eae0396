"""Pages of the KV cache: who owns which, counted, so that requests may share them."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out page ids. A page is free when its reference count is 0.

    Args:
        num_pages: pages in the cache, ids 0 to num_pages - 1.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, or none at all.

        Raises:
            OutOfPages: fewer are free.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} of {self.num_pages} free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that are in use."""
        for page in pages:
            self._check_used(page)
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops a reference of each page; a page that nobody refers to is free again."""
        for page in pages:
            self._check_used(page)
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def _check_used(self, page: int) -> None:
        if not 0 <= page < self.num_pages or not self._references[page]:
            raise ValueError(f"page {page} is not in use (pages 0 to {self.num_pages - 1}, {len(self._free)} free)")
