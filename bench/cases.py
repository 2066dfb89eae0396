"""The performance cases, as data: hybrid batches of the shapes that serving meets, on the head shapes of four models.

Names are `<batch>/<model>`. The batches `A`, `B`, `C`, `D` have names of their own; the grid's spell themselves:
`c512@4096+32@2048` is a chunk of 512 tokens behind 4,096 prior ones beside 32 decodes with 2,048 keys each.
"""

from __future__ import annotations

import dataclasses
import fnmatch

import torch

from sarathi_kernels.kv_cache import empty_kv_cache
from sarathi_kernels.spec import AttentionSpec
from sarathi_kernels.testing import Case, Inputs

MODELS: dict[str, AttentionSpec] = {
    "llama8b": AttentionSpec(32, 8, 128),
    "llama70b_tp8": AttentionSpec(8, 1, 128),
    "yi6b": AttentionSpec(32, 4, 128),
    "smollm2": AttentionSpec(9, 3, 64),
}
CHUNKS, CONTEXTS = (256, 512, 1024, 2048), (0, 4096, 16384)
DECODES, DECODE_CONTEXTS = (32, 128, 250), (1024, 4096, 16384)


def chunk(tokens: int, prior: int) -> tuple[tuple[int, int], ...]:
    return ((tokens, prior + tokens),)


def decodes(count: int, keys: int) -> tuple[tuple[int, int], ...]:
    return ((1, keys),) * count


NAMED: dict[str, tuple[tuple[int, int], ...]] = {
    "A": chunk(512, 4096) + decodes(32, 2048),
    "B": decodes(64, 1024),
    "C": chunk(2048, 0),
    "D": chunk(256, 16384) + decodes(8, 8192),
}
PREFILL = {f"c{c}@{prior}": chunk(c, prior) for c in CHUNKS for prior in CONTEXTS}
DECODE = {f"{n}@{keys}": decodes(n, keys) for n in (1, 8, *DECODES) for keys in DECODE_CONTEXTS} | {"1@131072": decodes(1, 131072)}
HYBRID = {f"{p}+{d}": PREFILL[p] + DECODE[d] for p in PREFILL for d in DECODE if not d.startswith(("1@", "8@"))}
# One decode so long that it must be split over the whole machine while a chunk runs beside it.
LONG = {f"c{c}@4096+1@131072": chunk(c, 4096) + DECODE["1@131072"] for c in (512, 2048)}
# Batches that others publish figures for: two long prompts beside 128 decodes; 63 decodes beside one chunk.
PUBLISHED = {"2xc2048@0+128@2048": chunk(2048, 0) * 2 + decodes(128, 2048), "c512@0+63@512": chunk(512, 0) + decodes(63, 512)}

GROUPS = {"named": NAMED, "prefill": PREFILL, "decode": DECODE, "hybrid": HYBRID, "long": LONG, "published": PUBLISHED}
GROUP_OF = {f"{batch}/{model}": group for group, batches in GROUPS.items() for batch in batches for model in MODELS}
PERFORMANCE_CASES: dict[str, Case] = {
    f"{batch}/{model}": Case(f"{batch}/{model}", requests, spec)
    for batches in GROUPS.values()
    for batch, requests in batches.items()
    for model, spec in MODELS.items()
}


def select(names: str) -> list[Case]:
    """Cases for a comma-separated list of names, patterns (`A/*`) and groups (`hybrid`, or `hybrid/llama8b` for one model).

    Raises:
        ValueError: an entry matches nothing.
    """
    chosen: dict[str, Case] = {}
    for entry in filter(None, (part.strip() for part in names.split(","))):
        group, _, model = entry.partition("/")
        if group in GROUPS:
            found = [n for n, g in GROUP_OF.items() if g == group and fnmatch.fnmatchcase(n.rsplit("/", 1)[1], model or "*")]
        else:
            found = fnmatch.filter(PERFORMANCE_CASES, entry)
        if not found:
            raise ValueError(f"no case matches {entry!r}; groups: {', '.join(GROUPS)}; models: {', '.join(MODELS)}; e.g. A/llama8b")
        chosen.update((name, PERFORMANCE_CASES[name]) for name in found)
    return list(chosen.values())


def with_page_size(case: Case, page_size: int) -> Case:
    """The same batch on pages of another size; the name says so."""
    if page_size == case.spec.page_size:
        return case
    return dataclasses.replace(case, name=f"{case.name}-p{page_size}", spec=dataclasses.replace(case.spec, page_size=page_size))


def is_mixed(requests) -> bool:
    """Whether a batch holds both chunks and decodes."""
    return any(q > 1 for q, _ in requests) and any(q == 1 for q, _ in requests)


def kv_bytes(spec: AttentionSpec, requests) -> int:
    pages = sum(-(-kv_len // spec.page_size) for _, kv_len in requests)
    return 2 * pages * spec.page_size * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize


def device_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, *, seed: int = 0) -> Inputs:
    """A case made concrete on `device`, in random page order, generated there and in `dtype`.

    Like `testing.make_inputs` without its NaN poison, which most peers do not survive; and drawing a large cache in float32 on
    one CPU thread would take minutes.
    """
    spec, device = case.with_dtype(dtype), torch.device(device)
    if spec.quantized_kv:
        raise ValueError(f"{case.name}: inputs with a {spec.kv_dtype} cache come from testing.make_inputs")
    generator = torch.Generator(device).manual_seed(seed)
    q_lens, kv_lens = zip(*case.requests)
    pages = [-(-n // spec.page_size) for n in kv_lens]
    num_pages = sum(pages) + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    taken = 0
    for i, n in enumerate(pages):
        table[i, :n] = order[taken : taken + n]
        taken += n

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    caches = [cache.normal_(generator=generator) for cache in empty_kv_cache(spec, num_pages, device=device)]
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    return Inputs(
        spec,
        randn(sum(q_lens), spec.num_q_heads, spec.head_dim),
        *caches,
        cu_seqlens_q.to(device),
        torch.tensor(kv_lens, dtype=torch.int32, device=device),
        table.to(device),
        {},
    )


def part(inputs: Inputs, keep) -> Inputs:
    """The batch of the requests numbered `keep` alone, on the same caches."""
    bounds = inputs.cu_seqlens_q.tolist()
    rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in keep])
    q_lens = [bounds[i + 1] - bounds[i] for i in keep]
    index = torch.tensor(list(keep), device=inputs.q.device)
    return inputs._replace(
        q=inputs.q[rows.to(inputs.q.device)],
        cu_seqlens_q=torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32).to(inputs.q.device),
        seqused_k=inputs.seqused_k[index],
        block_table=inputs.block_table[index],
        kwargs={name: value for name, value in inputs.kwargs.items() if name != "tree_mask"},
    )


def sample_rows(inputs: Inputs, count: int, *, seed: int = 0) -> tuple[torch.Tensor, Inputs]:
    """Some query rows of a causal batch, and a batch of decodes whose results are those rows'.

    A causal row sees what a decode at its position would see, so the oracle of a few rows costs a few decodes. The first
    and the last row of the first and the longest request are always among them.

    Returns:
        row indices into q, and the batch of as many single-token requests.
    """
    if not inputs.spec.causal or "tree_mask" in inputs.kwargs:
        raise ValueError("rows can be sampled only from causal batches without a tree mask")
    bounds, kv_lens = inputs.cu_seqlens_q.tolist(), inputs.seqused_k.tolist()
    longest = max(range(len(kv_lens)), key=kv_lens.__getitem__)
    picked = {b for i in (0, longest, len(kv_lens) - 1) for b in (bounds[i], bounds[i + 1] - 1)}
    rest = torch.randperm(bounds[-1], generator=torch.Generator().manual_seed(seed)).tolist()
    picked.update([row for row in rest if row not in picked][: max(count - len(picked), 0)])
    rows = torch.tensor(sorted(picked))
    request = torch.searchsorted(inputs.cu_seqlens_q[1:].cpu().long(), rows, right=True)
    device = inputs.q.device
    seen = inputs.seqused_k.cpu().long()[request] - (inputs.cu_seqlens_q.cpu().long()[request + 1] - rows) + 1
    return rows, inputs._replace(
        q=inputs.q[rows.to(device)],
        cu_seqlens_q=torch.arange(len(rows) + 1, dtype=torch.int32, device=device),
        seqused_k=seen.clamp(min=0).to(torch.int32).to(device),
        block_table=inputs.block_table[request.to(device)],
    )
