"""What Decoder refuses. That its step equals the single ops, bit for bit, is tests/engine/test_generation.py's."""

import pytest
import torch

import sarathi_kernels as sk


@pytest.mark.parametrize(
    "pages, message",
    [((4,), "2 layers need as many pairs of caches, got 1"), ((4, 5), "alike in shape and strides"), ((4, None), "must be bfloat16")],
)
def test_caches_that_do_not_fit_the_layers_are_refused(pages, message):
    spec = sk.AttentionSpec(4, 2, 64, dtype=torch.bfloat16)
    caches = [sk.empty_kv_cache(spec, 4 if n is None else n) for n in pages]
    if pages[-1] is None:
        caches = [tuple(c.float() for c in pair) for pair in caches]
    embedding = torch.zeros(8, 256, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        sk.Decoder(spec, embedding, [None, None], None, caches, torch.zeros(16, 64))
