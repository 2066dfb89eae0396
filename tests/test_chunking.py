"""Chunks that fill tiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sarathi_kernels as sk
from sarathi_kernels.backends import reference


@pytest.mark.parametrize("heads, tokens", [((32, 8), 32), ((8, 1), 16), ((4, 4), 128), ((9, 3), 128), ((28, 4), 128), ((12, 2), 64)])
def test_tile_tokens_end_on_a_tile_and_on_a_token(heads, tokens):
    spec = sk.AttentionSpec(*heads, 64)
    assert sk.tile_tokens(spec, "reference") == tokens
    rows = reference.plan_config(spec).prefill_rows
    assert tokens * spec.group % rows == 0
    assert all(n * spec.group % rows for n in range(1, tokens)), "the smallest such count"


@given(st.integers(0, 5000), st.integers(-100, 3000), st.integers(1, 300))
def test_aligned_chunk(remaining, budget, tile):
    chunk = sk.aligned_chunk(remaining, budget, tile)
    assert 0 <= chunk <= max(0, min(remaining, budget))
    assert chunk == remaining or chunk % tile == 0 or budget < tile
    assert chunk > 0 or remaining == 0 or budget <= 0, "progress whenever there is budget"
    assert chunk == remaining or budget - chunk < tile, "no whole tile is left behind"


def test_chunks_of_a_prompt_add_up():
    done, sizes = 0, []
    while done < 1000:
        sizes.append(sk.aligned_chunk(1000 - done, 250, 32))
        done += sizes[-1]
    assert sizes == [224, 224, 224, 224, 104]


@pytest.mark.parametrize("remaining, tile", [(5, 0), (-1, 16)])
def test_nonsense_is_refused(remaining, tile):
    with pytest.raises(ValueError, match=f"got tile={tile}, remaining={remaining}"):
        sk.aligned_chunk(remaining, 100, tile)
