"""Other implementations of the same op, each behind one small adaptor; used where installed, reported as absent where not.

An adaptor turns a batch into a call with no arguments that returns `out`, like `q` in shape and dtype. Copying the cache
into the peer's own layout, and whatever the peer computes once per step and not once per layer (schedules, masks, plans), is
done beforehand and untimed, as this project's own plan is. A peer that cannot read pages gathers them inside the call.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable

import torch

from sarathi_kernels.kv_cache import empty_kv_cache
from sarathi_kernels.testing import Inputs

Call = Callable[[], torch.Tensor]
MODULES = ("sdpa", "flex", "varlen", "openvino_pa", "vllm_cpu", "zentorch_sdpa", "flashinfer_wrappers", "flash_attn3", "vllm_triton")


class Unsupported(Exception):
    """This peer cannot run this batch; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way of running one library.

    Attributes:
        name: as in `--backend` and in rows.
        how: one phrase for the report: what is called, and what the time includes.
        devices: device types it runs on.
        needs: the module that must be importable.
        prepare: batch -> call; raises Unsupported.
    """

    name: str
    how: str
    devices: tuple[str, ...]
    needs: str
    prepare: Callable[[Inputs], Call]

    def absent(self, device: torch.device | str) -> str | None:
        """None if it can be tried on `device`, else why not."""
        device = torch.device(device)
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        package, *rest = self.needs.split(".")
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if rest and importlib.util.find_spec(self.needs) is None:
            return f"this version of {package} has no {self.needs}"
        return None


def all_peers() -> dict[str, Peer]:
    found = {}
    for module in MODULES:
        for peer in importlib.import_module(f"bench.peers.{module}").PEERS:
            found[peer.name] = peer
    return found


def plain(inputs: Inputs) -> None:
    """Raises Unsupported unless the batch is plain causal attention over a cache of q's dtype: what every peer can do."""
    spec = inputs.spec
    if spec.quantized_kv or spec.softcap or spec.sinks or spec.window_left >= 0 or not spec.causal or inputs.kwargs:
        raise Unsupported("this adaptor covers plain causal attention only")


def bounds(inputs: Inputs) -> list[tuple[int, int, int]]:
    """(first query row, past-the-end query row, kv_len) of each request."""
    cu = inputs.cu_seqlens_q.tolist()
    return [(cu[i], cu[i + 1], kv_len) for i, kv_len in enumerate(inputs.seqused_k.tolist())]


def page_lists(inputs: Inputs) -> list[torch.Tensor]:
    """The pages of each request, int64, on the batch's device."""
    size = inputs.spec.page_size
    return [inputs.block_table[i, : -(-n // size)].long() for i, n in enumerate(inputs.seqused_k.tolist())]


def gather(cache: torch.Tensor, pages: torch.Tensor, kv_len: int) -> torch.Tensor:
    """[num_pages, page_size, heads, dim] -> [kv_len, heads, dim]; the index_select is the copy that paging-unaware peers pay."""
    return cache.index_select(0, pages).flatten(0, 1)[:kv_len]


def repage(inputs: Inputs, page_size: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """The batch's keys and values on pages of `page_size`, in random page order.

    Returns:
        k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim] and each request's list of pages.
    """
    lengths = inputs.seqused_k.tolist()
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
    lists, taken = [], 0
    for n in counts:
        lists.append(order[taken : taken + n])
        taken += n
    spec = dataclasses.replace(inputs.spec, page_size=page_size)
    caches = []
    for cache, new in zip((inputs.k_cache, inputs.v_cache), empty_kv_cache(spec, sum(counts), device=inputs.k_cache.device)):
        for pages, mine, n in zip(page_lists(inputs), lists, lengths):
            rows = gather(cache, pages, n)
            padded = torch.zeros(len(mine) * page_size, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
            padded[:n] = rows
            new[torch.tensor(mine, device=cache.device)] = padded.unflatten(0, (len(mine), page_size))
        caches.append(new)
    return *caches, lists


def paged_table(lists: list[list[int]], device) -> torch.Tensor:
    """Lists of pages as a padded int32 block table."""
    table = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for i, pages in enumerate(lists):
        table[i, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return table.to(device)


def indptr(counts, device) -> torch.Tensor:
    """[0, running sums of counts], int32."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(device)
