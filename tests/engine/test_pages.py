import pytest
from engine.pages import OutOfPages, PageAllocator
from hypothesis import given, strategies as st


def test_a_page_is_free_when_its_last_reference_goes():
    pages = PageAllocator(4, 16)
    mine = pages.allocate(3)
    pages.share(mine[:2])
    pages.release(mine)
    assert pages.num_free == 2 and [pages.references(p) for p in mine] == [1, 1, 0]
    pages.release(mine[:2])
    assert pages.num_free == 4


def test_allocation_is_all_or_nothing():
    pages = PageAllocator(4, 16)
    pages.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 4 free"):
        pages.allocate(2)
    assert pages.num_free == 1


@pytest.mark.parametrize("page", [0, 4, -1])
def test_releasing_or_sharing_a_page_that_is_not_in_use_is_refused(page):
    pages = PageAllocator(4, 16)
    for operation in (pages.release, pages.share):
        with pytest.raises(ValueError, match=f"page {page} is not in use"):
            operation([page])
    assert pages.num_free == 4


@pytest.mark.parametrize(("tokens", "want"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2)])
def test_pages_for(tokens, want):
    assert PageAllocator(4, 16).pages_for(tokens) == want


@given(st.integers(1, 20), st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 7)), max_size=60))
def test_references_and_free_pages_always_add_up(num_pages, operations):
    pages, held = PageAllocator(num_pages, 4), []
    for operation, n in operations:
        if operation == "allocate":
            if n <= pages.num_free:
                taken = pages.allocate(n)
                assert not set(taken) & set(held)
                held += taken
        elif operation == "share":
            pages.share(held[:n])
            held += held[:n]
        else:
            pages.release(held[:n])
            del held[:n]
        assert pages.num_free + len(set(held)) == num_pages
        assert all(pages.references(p) == held.count(p) for p in range(num_pages))
