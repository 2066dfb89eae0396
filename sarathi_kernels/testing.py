"""What tests and benchmarks share: batches as data, inputs with NaN in every slot that must not be read, one tolerance rule."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import torch

import sarathi_kernels as sk
from sarathi_kernels.backends import reference
from sarathi_kernels.spec import AttentionSpec


@dataclasses.dataclass(frozen=True)
class Case:
    """One hybrid batch.

    Attributes:
        name: unique, used as the test's id.
        requests: (q_len, kv_len) of each request; kv_len includes the query tokens.
        spec: the model's attention; `dtype` is replaced by whoever runs the case.
        shared_pages: requests draw their pages from one small pool, so tables overlap (only sensible for reading).
        tree: give speculative requests (1 < q_len <= 8) a random tree mask.
    """

    name: str
    requests: tuple[tuple[int, int], ...]
    spec: AttentionSpec
    shared_pages: bool = False
    tree: bool = False

    def with_dtype(self, dtype: torch.dtype) -> AttentionSpec:
        kv_dtype = self.spec.kv_dtype if self.spec.quantized_kv else dtype
        return dataclasses.replace(self.spec, dtype=dtype, kv_dtype=kv_dtype)

    @property
    def pairs(self) -> int:
        """Upper bound of the (query head, query, key) triples: what the case costs a slow runner."""
        return self.spec.num_q_heads * sum(q * k for q, k in self.requests)


class Inputs(NamedTuple):
    """One case made concrete. `kwargs` are the optional arguments of `attention`, ready to be passed on."""

    spec: AttentionSpec
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    kwargs: dict[str, torch.Tensor]

    def plan(self, backend: str, **options) -> sk.AttentionPlan:
        return sk.plan(self.spec, self.cu_seqlens_q, self.seqused_k, self.block_table, backend=backend, **options)

    def attention(self, backend: str, **options):
        """(out, lse) of the named backend, planned (with `options`) and run."""
        plan = self.plan(backend, **options)
        return sk.attention(self.q, self.k_cache, self.v_cache, plan, return_lse=True, **self.kwargs)

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64, dense, with no plan."""
        return reference.dense_attention(*self[:7], **self.kwargs)


def make_inputs(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0, poison: bool = True) -> Inputs:
    """Random inputs for a case, in random page order. With `poison`, every slot no request uses holds NaN, and every
    block table entry no request needs names a page that does not exist."""
    generator = torch.Generator().manual_seed(seed)
    spec = case.with_dtype(dtype)
    q_lens, kv_lens = zip(*case.requests) if case.requests else ((), ())
    pages = [-(-n // spec.page_size) for n in kv_lens]
    num_pages = max(2, max(pages, default=0) + 3 if case.shared_pages else sum(pages) + 3)
    table = torch.full((len(q_lens), max(pages, default=0) + 1), 2**30 if poison else 0, dtype=torch.int32)
    used = torch.zeros(num_pages, spec.page_size, dtype=torch.bool)
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    taken = 0
    for i, n in enumerate(pages):
        if case.shared_pages:
            order = torch.randperm(num_pages, generator=generator).to(torch.int32)
            taken = 0
        table[i, :n] = order[taken : taken + n]
        taken += n
        position = torch.arange(kv_lens[i])
        used[table[i][position // spec.page_size].long(), position % spec.page_size] = True

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    kwargs: dict[str, torch.Tensor] = {}
    caches = []
    for name in ("k_scale", "v_scale"):
        values = randn(*spec.kv_cache_shape(num_pages))
        if spec.kv_dtype == torch.int8:
            scale = values.abs().amax(-1) / 127
            cache = (values / scale.unsqueeze(-1)).round().to(torch.int8)
            kwargs[name] = scale.masked_fill(~used.unsqueeze(-1), torch.nan) if poison else scale
            if poison:
                cache[~used] = 127
        else:
            if spec.kv_dtype == torch.float8_e4m3fn:
                kwargs[name] = torch.rand(spec.num_kv_heads, generator=generator) + 0.5
                values = values / kwargs[name][:, None]
            if poison:
                values[~used] = torch.nan
            cache = values.to(spec.kv_dtype)
        caches.append(cache.to(device))
    total_q = sum(q_lens)
    if spec.sinks:
        kwargs["sinks"] = randn(spec.num_q_heads)
    if case.tree:
        kwargs["tree_mask"] = torch.cat([_tree_mask(n, generator) for n in q_lens])
    return Inputs(
        spec,
        randn(total_q, spec.num_q_heads, spec.head_dim).to(dtype).to(device),
        *caches,
        torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32, device=device),
        torch.tensor(kv_lens, dtype=torch.int32, device=device),
        table.to(device),
        {name: value.to(device) for name, value in kwargs.items()},
    )


def _tree_mask(q_len: int, generator: torch.Generator) -> torch.Tensor:
    """A random tree over the request's tokens: each sees itself and its ancestors. Long or single requests: all allowed."""
    masks = [-1] * q_len
    if 1 < q_len <= 8:
        masks[0] = 1
        for i in range(1, q_len):
            parent = int(torch.randint(i, (1,), generator=generator))
            masks[i] = masks[parent] | (1 << i)
    return torch.tensor(masks, dtype=torch.int64)


def eager_attention(inputs: Inputs) -> torch.Tensor:
    """What plain PyTorch computes in the inputs' own dtype: the yardstick of the tolerance rule, not an oracle."""
    spec, dtype = inputs.spec, inputs.q.dtype
    out = torch.zeros_like(inputs.q)
    bounds = inputs.cu_seqlens_q.tolist()
    tree_mask, sinks = inputs.kwargs.get("tree_mask"), inputs.kwargs.get("sinks")
    for i, kv_len in enumerate(inputs.seqused_k.tolist()):
        begin, end = bounds[i], bounds[i + 1]
        if begin == end or kv_len == 0:
            continue
        keys, values = (
            reference.gather_kv(cache, inputs.kwargs.get(scale), inputs.block_table[i], 0, kv_len)
            .to(dtype).transpose(0, 1).repeat_interleave(spec.group, 0)
            for cache, scale in ((inputs.k_cache, "k_scale"), (inputs.v_cache, "v_scale"))
        )  # fmt: skip
        token = torch.arange(end - begin, device=out.device)
        scores = (inputs.q[begin:end].transpose(0, 1) @ keys.transpose(1, 2)) * spec.softmax_scale
        if spec.softcap > 0:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        seen = reference.visible(
            kv_len - (end - begin) + token, token, torch.arange(kv_len, device=out.device), q_len=end - begin, kv_len=kv_len,
            causal=spec.causal, window_left=spec.window_left, tree_mask=None if tree_mask is None else tree_mask[begin:end],
        )  # fmt: skip
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, end - begin, 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., :kv_len]
        out[begin:end] = (weights @ values).transpose(0, 1)
    return out


# Absolute caps beside the relative rule: a yardstick that is itself far off must not excuse a kernel.
OUT_CAP = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
LSE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def check(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor | None, *, roundings: float = 0.0) -> None:
    """Holds a result against the oracle: error at most twice that of same-dtype PyTorch, plus 1e-5.

    Args:
        roundings: half units in the last place of the largest value that are allowed on top; for batches so small that
            PyTorch may be exact by luck.

    Raises:
        AssertionError: saying where the worst element is.
    """
    want, want_lse = inputs.oracle()
    dtype = inputs.spec.dtype
    bound = min(2 * max_error(eager_attention(inputs), want) + 1e-5, OUT_CAP[dtype])
    if want.numel():
        bound += roundings * torch.finfo(dtype).eps / 2 * float(want.abs().max())
    error = (out.to(torch.float64) - want).abs()
    worst = _where_worst(error)
    assert error.isfinite().all(), f"out is not finite at {worst} (token, head, dim)"
    assert max_error(out, want) <= bound, f"out is off by {max_error(out, want):.3g} at {worst}, allowed {bound:.3g}"
    if lse is None:
        return
    empty = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(lse), empty), "lse must be -inf exactly on the rows that see no key"
    error = ((lse.to(torch.float64) - want_lse).abs() / want_lse.abs().clamp(min=1)).masked_fill(empty, 0.0)
    assert error.isfinite().all(), f"lse is not finite at {_where_worst(error)} (token, head)"
    if error.numel():
        assert error.max() <= LSE_TOLERANCE[dtype], f"lse is off by {error.max():.3g} (relative) at {_where_worst(error)}"


def max_error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.to(torch.float64) - want).abs().max()) if want.numel() else 0.0


def _where_worst(error: torch.Tensor) -> tuple[int, ...]:
    if not error.numel():
        return ()
    flat = int(error.nan_to_num(torch.inf).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))


def make_spec(heads=(8, 2), head_dim=64, **features) -> AttentionSpec:
    return AttentionSpec(*heads, head_dim, **features)


# Shapes that a slow runner (an interpreter, a simulator) can afford; (q_len, kv_len).
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "one_decode": ((1, 1),),
    "decodes": ((1, 37), (1, 16), (1, 17), (1, 64), (1, 5)),
    "whole_prompt": ((67, 67),),
    "chunk": ((40, 130),),
    "hybrid": ((33, 90), (1, 75), (1, 16), (5, 18), (1, 128)),
    "tile_edges": ((32, 32), (31, 63), (1, 64), (4, 65), (1, 63)),
    "nothing": ((0, 20), (3, 0), (0, 0), (1, 9)),
    "longer_than_kv": ((35, 2), (4, 3), (1, 0), (1, 40)),
    "speculative": ((4, 50), (2, 33), (8, 8), (1, 20)),
}
FEATURES: dict[str, dict] = {
    "window": {"window_left": 12},
    "window0": {"window_left": 0},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "not_causal": {"causal": False},
    "not_causal_window": {"causal": False, "window_left": 7},
    "scale": {"softmax_scale": 0.3},
    "everything": {"window_left": 40, "softcap": 8.0, "sinks": True, "softmax_scale": 0.2},
}

CASES: list[Case] = [
    *(Case(name, shape, make_spec()) for name, shape in SHAPES.items()),
    *(Case(f"hybrid-{name}", SHAPES["hybrid"], make_spec(**features)) for name, features in FEATURES.items()),
    *(Case(f"longer_than_kv-{name}", SHAPES["longer_than_kv"], make_spec(**FEATURES[name])) for name in ("sinks", "window")),
    *(Case(f"hybrid-page{n}", SHAPES["hybrid"], make_spec(page_size=n)) for n in (1, 5, 32, 128)),
    *(Case(f"hybrid-heads{q}_{k}", SHAPES["hybrid"], make_spec((q, k))) for q, k in ((4, 4), (5, 1), (9, 3), (7, 1), (40, 2))),
    *(Case(f"hybrid-dim{d}", SHAPES["hybrid"], make_spec((4, 2), d)) for d in (80, 96, 128, 192, 256)),
    Case("hybrid-tree", SHAPES["speculative"], make_spec(), tree=True),
    Case("hybrid-shared_pages", SHAPES["hybrid"], make_spec(), shared_pages=True),
]
QUANTIZED_CASES: list[Case] = [
    Case("hybrid-int8", SHAPES["hybrid"], make_spec(kv_dtype=torch.int8)),
    Case("hybrid-fp8", SHAPES["hybrid"], make_spec(kv_dtype=torch.float8_e4m3fn)),
]
# Shapes in which a decode and a chunk are split over the keys; still small enough for a slow runner when split at 64.
SPLIT_SHAPES = {"long_decodes": ((1, 700), (1, 65), (1, 64)), "long_hybrid": ((20, 300), (1, 513), (3, 130))}
# For backends at native speed: sizes that users meet, and that published suites test.
LARGE_CASES: list[Case] = [
    Case("prompt146", ((146, 146),), make_spec((28, 4), 128)),
    Case("decode77", ((1, 2048),) * 77, make_spec((4, 1), 64)),
    Case("chunks129", ((129, 4099),) * 2, make_spec((4, 1), 64)),
    Case("speculative17", ((1, 1024),) * 20 + ((17, 8192),) * 3, make_spec((4, 1), 64)),
    Case("pairs_and_chunk", ((2, 766),) * 19 + ((512, 1024),), make_spec((4, 1), 128)),
    Case("longer_than_kv", ((235, 2), (1, 13353)), make_spec((4, 1), 128)),
    Case("three_kinds", ((1, 1328), (5, 18), (129, 463)), make_spec((8, 2), 128)),
    Case("decode_split", ((1, 16400), (1, 2049)), make_spec((9, 3), 64)),
    Case("chunk_long_context", ((64, 9000), (1, 4097), (1, 2048)), make_spec((9, 3), 64)),
    Case("window_long", ((300, 3000), (1, 5000), (1, 255), (1, 257)), make_spec((8, 2), 64, window_left=256)),
    Case("sinks_softcap_long", ((200, 5000), (1, 6000)), make_spec((8, 2), 64, sinks=True, softcap=30.0)),
]
