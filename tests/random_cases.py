"""Batches and models that nobody thought of: hypothesis strategies over everything that a Case may say."""

import dataclasses

import torch
from hypothesis import strategies as st

from sarathi_kernels.testing import Case, Inputs, make_spec

HEADS = [(1, 1), (2, 2), (4, 1), (6, 2), (9, 3), (7, 1), (12, 1), (34, 2)]


@st.composite
def cases(draw, *, max_kv: int, head_dims: list[int], kv_dtypes: tuple = (None,)) -> Case:
    """A Case: up to six requests of up to max_kv keys, among them empty ones and ones with more queries than keys."""
    longest = draw(st.sampled_from([3, 40, max_kv]))
    q_len = st.one_of(st.just(1), st.integers(0, 9), st.integers(0, longest))
    requests = draw(st.lists(st.tuples(q_len, st.integers(0, longest)), min_size=1, max_size=6))
    tree = draw(st.booleans())
    spec = make_spec(
        draw(st.sampled_from(HEADS)), draw(st.sampled_from(head_dims)),
        page_size=draw(st.sampled_from([1, 2, 3, 8, 16, 17, 32, 100])),
        causal=tree or draw(st.booleans()),
        window_left=draw(st.one_of(st.just(-1), st.integers(0, 2 * longest))),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0, 30.0])),
        sinks=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, 0.02])),
        kv_dtype=draw(st.sampled_from(kv_dtypes)),
    )  # fmt: skip
    return Case("random", tuple(requests), spec, shared_pages=draw(st.booleans()), tree=tree)


def strided(inputs: Inputs, kind: str) -> Inputs:
    """The same values behind other strides: q as part of a wider projection, or the caches with heads before slots."""
    if kind == "q":
        wide = torch.full((inputs.q.shape[0], inputs.q.shape[1] + 3, inputs.q.shape[2]), torch.nan, dtype=inputs.q.dtype)
        wide[:, 1:-2] = inputs.q
        return inputs._replace(q=wide[:, 1:-2])
    if kind == "caches":
        turned = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (inputs.k_cache, inputs.v_cache)]
        return inputs._replace(k_cache=turned[0], v_cache=turned[1])
    return inputs
