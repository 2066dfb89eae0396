"""OpenVINO's PagedAttentionExtension on the CPU: one launch for the hybrid batch, on pages of 32, appending the new keys itself."""

from __future__ import annotations

import functools

import numpy as np
import torch

from bench.peers import Call, Peer, Unsupported, bounds, gather, indptr, page_lists, plain, repage
from sarathi_kernels.memory import empty_huge
from sarathi_kernels.spec import AttentionSpec
from sarathi_kernels.testing import Inputs

PAGE = 32  # fixed by the plugin
PRECISION = {torch.bfloat16: "bf16", torch.float32: "f32"}


@functools.cache
def _compiled(spec: AttentionSpec, threads: int):
    import openvino as ov
    import openvino.op
    import openvino.opset13 as ops

    precision = PRECISION[spec.dtype]
    element = {"bf16": ov.Type.bf16, "f32": ov.Type.f32}[precision]

    def parameter(name, shape, kind):
        node = ops.parameter(ov.PartialShape(shape) if isinstance(shape, list) else shape, dtype=kind)
        node.output(0).set_names({name})
        node.set_friendly_name(name)
        return node

    def constant(value, kind=np.int32):
        return ops.constant(np.array(value, dtype=kind))

    q_width, kv_width = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    parameters = [
        parameter("query", [-1, q_width], element),
        parameter("key", [-1, kv_width], element),
        parameter("value", [-1, kv_width], element),
        parameter("key_cache.0", ov.PartialShape.dynamic(4), ov.Type.dynamic),
        parameter("value_cache.0", ov.PartialShape.dynamic(4), ov.Type.dynamic),
        *(parameter(name, [-1], ov.Type.i32) for name in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")),
    ]
    longest = parameter("max_context_len", [], ov.Type.i32)
    none_i, none_f, zero = constant([]), constant([], np.float32), constant(0)
    features = [  # score window, rotated blocks (3), xattention (3), sinks, adaptive RKV (4), token types, query-query bias (2)
        none_i, none_i, none_i, none_f, none_f, zero, zero, none_f, zero, none_i, none_i, none_i, none_i, constant([], np.uint8), none_i,
    ]  # fmt: skip
    inputs = [*parameters, constant(spec.softmax_scale, np.float32), zero, none_f, longest, *features]
    node = openvino.op._PagedAttentionExtension([n.output(0) for n in inputs])
    info = node.get_rt_info()
    for name, value in (("k_head_size", spec.head_dim), ("v_head_size", spec.head_dim)):
        info[name] = value
    for name in ("num_k_heads", "num_v_heads"):
        info[name] = spec.num_kv_heads
    result = ops.convert(node.output(0), "bf16") if precision == "bf16" else node
    model = ov.Model([result.output(0)], [*parameters, longest], "paged_attention")
    options = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision, "INFERENCE_NUM_THREADS": threads}
    return ov.Core().compile_model(model, "CPU", options)


def _tensor(values: torch.Tensor):
    """Shares memory with `values`, which must stay alive."""
    import openvino as ov

    if values.dtype == torch.bfloat16:
        return ov.Tensor(values.view(torch.int16).numpy().view(np.uint16), list(values.shape), ov.Type.bf16)
    return ov.Tensor(values.numpy(), shared_memory=True)


def _heads_first(pages: torch.Tensor) -> torch.Tensor:
    pages = pages.transpose(1, 2)
    return empty_huge(pages.shape, pages.dtype).copy_(pages)


def prepare(inputs: Inputs) -> Call:
    plain(inputs)
    spec = inputs.spec
    if spec.dtype not in PRECISION:
        raise Unsupported(f"the adaptor covers bfloat16 and float32, got {spec.dtype}")
    spans = bounds(inputs)
    k_pages, v_pages, lists = repage(inputs, PAGE)
    rows = [(gather(inputs.k_cache, p, n)[n - (e - b) :], gather(inputs.v_cache, p, n)[n - (e - b) :]) for p, (b, e, n) in zip(page_lists(inputs), spans)]
    arguments = [
        inputs.q.flatten(1),
        torch.cat([k for k, _ in rows]).flatten(1),
        torch.cat([v for _, v in rows]).flatten(1),
        _heads_first(k_pages),
        _heads_first(v_pages),
        torch.tensor([n - (e - b) for b, e, n in spans], dtype=torch.int32),
        inputs.cu_seqlens_q,
        torch.tensor([page for pages in lists for page in pages], dtype=torch.int32),
        indptr([len(pages) for pages in lists], "cpu"),
        torch.tensor(max(n for *_, n in spans), dtype=torch.int32),
    ]
    arguments = [a.contiguous() for a in arguments]
    request = _compiled(spec, torch.get_num_threads()).create_infer_request()
    for i, argument in enumerate(arguments):
        request.set_input_tensor(i, _tensor(argument))

    def call():
        request.infer()
        raw = request.get_output_tensor(0).data
        if spec.dtype == torch.bfloat16:
            return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).view(inputs.q.shape)
        return torch.from_numpy(raw).view(inputs.q.shape)

    call.arguments = arguments  # the request only borrows them
    return call


PEERS = [
    Peer("openvino", "OpenVINO PagedAttention, page 32, one launch, append included", ("cpu",), "openvino", prepare),
]
