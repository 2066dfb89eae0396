// New keys and values into their pages, keys (and queries, in place) rotated on the way. Bound by memory: every thread
// moves kWidth neighbouring elements, or the two groups of kWidth that a rotation mixes.
//
//     y[i] = x[i] cos_i - x[i + r/2] sin_i        y[i + r/2] = x[i + r/2] cos_i + x[i] sin_i        i < r/2, r = rotary_dim
#pragma once
#include "element.cuh"
#include "work.cuh"

namespace sarathi::append {

constexpr int kThreads = 256;

// Threads' work per token, in order: rotations of the rows of q and k, then what they copy beyond rotary_dim, then v.
struct Layout {
  int32_t q_heads, kv_heads;      // q_heads = 0 when q stays as it is
  int32_t rotations, copies;      // per row of q and k, in groups of kWidth
  int32_t v_copies;               // per row of v
  SARATHI_HD int32_t per_row() const { return rotations + copies; }
  SARATHI_HD int32_t per_token() const { return (q_heads + kv_heads) * per_row() + kv_heads * v_copies; }
};

SARATHI_HD Layout layout_of(const AppendKvParams& p, int32_t width) {
  const int32_t rotary = p.cos_sin ? p.rotary_dim : 0;
  return {p.q && rotary ? p.num_q_heads : 0, p.num_kv_heads, rotary / 2 / width, (p.head_dim - rotary) / width, p.head_dim / width};
}

// Groups of eight need all rows to begin at multiples of 16 bytes (the caller's to check) and a half rotation of whole groups.
SARATHI_HD bool wide(const AppendKvParams& p) {
  return p.head_dim % 8 == 0 && (p.cos_sin == nullptr || p.rotary_dim % 16 == 0);
}

enum Which : int32_t { kQ, kK, kV };
struct Task {
  int32_t which, head, element;   // first element of the (first) group
  bool rotate;
};
SARATHI_HD Task task_of(const Layout& layout, int32_t index, int32_t rotary, int32_t width) {
  const int32_t rows = (layout.q_heads + layout.kv_heads) * layout.per_row();
  if (index >= rows) {
    const int32_t v = index - rows;
    return {kV, v / layout.v_copies, v % layout.v_copies * width, false};
  }
  const int32_t row = index / layout.per_row(), group = index % layout.per_row();
  const bool rotate = group < layout.rotations;
  const int32_t element = rotate ? group * width : rotary + (group - layout.rotations) * width;
  return row < layout.q_heads ? Task{kQ, row, element, rotate} : Task{kK, row - layout.q_heads, element, rotate};
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads) append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  using G = Group<Element, kWidth>;
  const Layout layout = layout_of(p, kWidth);
  const int rotary = p.cos_sin ? p.rotary_dim : 0;
  const int64_t total = static_cast<int64_t>(p.total_q) * layout.per_token();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += stride) {
    const int64_t token = i / layout.per_token();
    const Task task = task_of(layout, static_cast<int32_t>(i % layout.per_token()), rotary, kWidth);
    const int64_t slot = ptx::ld_global(p.slot_mapping + token);
    if (task.which != kQ && slot < 0) continue;

    const Element* from;
    Element* to;
    if (task.which == kQ) {
      to = static_cast<Element*>(p.q) + token * p.q_stride_token + task.head * p.q_stride_head;
      from = to;
    } else if (task.which == kK) {
      from = static_cast<const Element*>(p.k) + token * p.k_stride_token + task.head * p.k_stride_head;
      to = static_cast<Element*>(p.k_cache) + slot / p.page_size * p.kc_stride_page + slot % p.page_size * p.kc_stride_slot +
           task.head * p.kc_stride_head;
    } else {
      from = static_cast<const Element*>(p.v) + token * p.v_stride_token + task.head * p.v_stride_head;
      to = static_cast<Element*>(p.v_cache) + slot / p.page_size * p.vc_stride_page + slot % p.page_size * p.vc_stride_slot +
           task.head * p.vc_stride_head;
    }
    from += task.element;
    to += task.element;
    if (!task.rotate) {
      if (task.which != kQ) *reinterpret_cast<G*>(to) = *reinterpret_cast<const G*>(from);
      continue;
    }
    const int half = rotary / 2;
    const float* cos = p.cos_sin + static_cast<int64_t>(ptx::ld_global(p.positions + token)) * rotary + task.element;
    const float* sin = cos + half;
    const G a = *reinterpret_cast<const G*>(from), b = *reinterpret_cast<const G*>(from + half);
    G rotated_a, rotated_b;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float x = to_float(a.x[e]), y = to_float(b.x[e]);
      rotated_a.x[e] = from_float<Element>(x * cos[e] - y * sin[e]);
      rotated_b.x[e] = from_float<Element>(y * cos[e] + x * sin[e]);
    }
    *reinterpret_cast<G*>(to) = rotated_a;
    *reinterpret_cast<G*>(to + half) = rotated_b;
  }
}

}  // namespace sarathi::append
