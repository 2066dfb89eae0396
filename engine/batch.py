"""[(request, n)] -> the tensors of one step, in buffers that are used again."""

from __future__ import annotations

import dataclasses

import numpy as np
import sarathi_kernels as sk
import torch

from engine.request import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class StepInput:
    """One step's input, valid until the next `build`.

    Attributes:
        input_ids: [total_q] int32.
        positions: [total_q] int32, position of each token in its request.
        slot_mapping: [total_q] int64, where its key and value go.
        plan: the attention plan of the step.
        logit_rows: [num_samples] int64, rows whose logits are needed: last tokens of requests that reached their end.
        samplers: indices into the batch of the requests that get a token, one per row of `logit_rows`.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    plan: sk.AttentionPlan
    logit_rows: torch.Tensor
    samplers: list[int]


class BatchBuilder:
    """Builds step inputs.

    Args:
        spec: the model's attention.
        backend: of the attention op.
        max_tokens: most tokens per step.
        max_num_seqs: most requests per step.
        max_pages: most pages per request.
    """

    def __init__(self, spec: sk.AttentionSpec, backend: str, *, max_tokens: int, max_num_seqs: int, max_pages: int):
        nobody = torch.zeros(1, dtype=torch.int32)
        self.spec = spec
        # An empty plan settles which backend it will be, and that there is one.
        self.backend = sk.plan(spec, nobody, nobody[:0], nobody[:0].view(0, 1), backend=backend).backend
        self.workspace = sk.Workspace()
        self._ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int64)
        self._cu_seqlens_q = np.zeros(max_num_seqs + 1, np.int32)
        self._seqused_k = np.zeros(max_num_seqs, np.int32)
        self._block_table = np.zeros((max_num_seqs, max_pages), np.int32)
        self._logit_rows = np.zeros(max_num_seqs, np.int64)
        self._count = np.arange(max(max_tokens, 1), dtype=np.int32)
        self._tensors = {name: torch.from_numpy(value) for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def build(self, batch: Batch) -> StepInput:
        """The tensors of one step. Reads each request's tokens, pages and num_computed_tokens; changes none."""
        ids, positions, table = self._ids, self._positions, self._block_table
        lengths = np.fromiter((n for _, n in batch), np.int32, len(batch))
        begins = np.fromiter((request.num_computed_tokens for request, _ in batch), np.int32, len(batch))
        ends = np.cumsum(lengths, out=self._cu_seqlens_q[1 : len(batch) + 1])
        np.add(begins, lengths, out=self._seqused_k[: len(batch)])
        samplers = []
        for i, (request, n) in enumerate(batch):
            tokens, begin, end = request.tokens, begins.item(i), ends.item(i)
            if n == 1:
                ids[end - 1] = tokens[begin]
            else:
                ids[end - n : end] = tokens[begin : begin + n]
            pages = np.frombuffer(request.pages, np.int32)
            table[i, : len(pages)] = pages
            if begin + n == len(tokens):
                samplers.append(i)
        total = ends.item(-1)
        rows = self._logit_rows[: len(samplers)]
        np.subtract(ends[samplers], 1, out=rows)
        # Token t of request i is at row begin_q + t and position begins[i] + t: the shift is constant within a request.
        shift = begins - (ends - lengths)
        np.add(self._count[:total], np.repeat(shift, lengths), out=positions[:total])
        self._map_slots(np.repeat(np.arange(len(batch)), lengths), positions[:total], self._slots[:total])
        return StepInput(
            input_ids=self._tensor("_ids", total),
            positions=self._tensor("_positions", total),
            slot_mapping=self._tensor("_slots", total),
            plan=sk.plan(
                self.spec,
                self._tensor("_cu_seqlens_q", len(batch) + 1),
                self._tensor("_seqused_k", len(batch)),
                self._tensor("_block_table", len(batch)),
                backend=self.backend,
                workspace=self.workspace,
            ),
            logit_rows=self._tensor("_logit_rows", len(samplers)),
            samplers=samplers,
        )

    def _map_slots(self, requests: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
        page, offset = np.divmod(positions, self.spec.page_size)
        np.multiply(self._block_table[requests, page], self.spec.page_size, out=out, dtype=np.int64)
        np.add(out, offset, out=out)

    def _tensor(self, name: str, length: int) -> torch.Tensor:
        return self._tensors[name][:length]
