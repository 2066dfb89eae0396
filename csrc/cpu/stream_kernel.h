// Attention of a few query rows (decodes, speculative tokens), bound by the bandwidth of K and V: the head DIMENSION lies in
// the vector lanes, so that each K and V row is read once, as it lies in its page, for the whole group.
//
//     s[row, key] = sum over lanes of q[row, :] * k[key, :]      then the softmax of a block of keys
//     o[row, :]  += sum_key p[row, key] * v[key, :]              bfloat16: two keys at a time
//
// One visit goes through all the kv heads of a key block before the next block: the caches' slots are read from end to end,
// which is kinder to the memory's rows and to the TLB than one head's strided rows.
#pragma once
#include "request.h"

namespace sarathi {
namespace {

constexpr int kStreamRows = 8;                            // packed rows per kv head at most
constexpr int kStreamKeys = 32;                           // keys per block
constexpr int kRowsAtOnce = 4;
constexpr int kKeysAtOnce = kLanes == 16 ? 4 : 2;         // accumulators: keys x rows
constexpr int kDimVectors = kLanes == 16 ? 4 : 2;         // accumulators: rows x vectors of dims
constexpr float kStreamLazy = 8.0f;                       // log2: how far a row's maximum may lag, see tile_kernel.h
static_assert(kStreamKeys % kLanes == 0 && kStreamKeys % kKeysAtOnce == 0 && kKeysAtOnce % 2 == 0, "blocks are whole");

// Scratch of one visit: the state of every (kv head, row), and one block's scores.
struct StreamScratch {
  float *q, *o, *m, *l, *s;
  uint16_t* p;
  size_t bytes = 0;

  StreamScratch(char* base, int32_t heads, int32_t head_dim) {
    take(base, q, static_cast<int64_t>(heads) * kStreamRows * head_dim), take(base, o, static_cast<int64_t>(heads) * kStreamRows * head_dim);
    take(base, m, heads * kStreamRows), take(base, l, heads * kStreamRows);
    take(base, s, kStreamRows * kStreamKeys), take(base, p, kStreamRows * kStreamKeys);
  }
  template <class A> void take(char* base, A*& array, int64_t count) {
    array = reinterpret_cast<A*>(base + bytes);
    bytes += (count * sizeof(A) + 63) / 64 * 64;
  }
};

// One block of keys: rows of the first kv head of the visit.
template <class KV>
struct StreamBlock {
  const KV *k[kStreamKeys], *v[kStreamKeys];
  int32_t count = 0;

  SARATHI_INLINE void find(const PagedRows<KV>& keys, const PagedRows<KV>& values, int32_t first, int32_t end, int32_t head) {
    count = min_of(kStreamKeys, end - first);
    keys.find(first, count, head, k);
    values.find(first, count, head, v);
    for (int32_t j = count; j < round_up(count, kKeysAtOnce); ++j) k[j] = k[count - 1], v[j] = v[count - 1];  // masked in softmax_row
  }
};

// One vector of products: C::kDepth * kLanes elements of a row.
template <class C, class KV>
SARATHI_INLINE typename C::Vector load_row(const KV* row) {
  if constexpr (C::kDepth == 1) return load_as(row);
  else return C::load_operands(reinterpret_cast<const uint32_t*>(row));
}

// s[row][key] for R rows and kKeysAtOnce keys; q: [rows][head_dim] in the compute type's elements.
template <class C, class KV, class Q, int R>
SARATHI_INLINE void dot_rows(const Q* q, const KV* const* k, int64_t k_head, int32_t head_dim, float* s, Prefetcher<KV>& ahead) {
  F acc[kKeysAtOnce][R];
#pragma GCC unroll 4
  for (int j = 0; j < kKeysAtOnce; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[j][r] = zero();
  constexpr int step = C::kDepth * kLanes;
  const KV* row[kKeysAtOnce];
#pragma GCC unroll 4
  for (int j = 0; j < kKeysAtOnce; ++j) row[j] = k[j] + k_head;
  for (int32_t d = 0; d < head_dim; d += step) {
    typename C::Vector x[kKeysAtOnce];
#pragma GCC unroll 4
    for (int j = 0; j < kKeysAtOnce; ++j) x[j] = load_row<C>(row[j] + d);
    ahead.step(), ahead.step();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename C::Vector y = C::load_operands(reinterpret_cast<const uint32_t*>(q + r * head_dim + d));
#pragma GCC unroll 4
      for (int j = 0; j < kKeysAtOnce; ++j) acc[j][r] = C::dot(acc[j][r], x[j], y);
    }
  }
  reduce_rows(acc, s, kStreamKeys);
}

// o[row][d ..] += p * v for R rows and V vectors of dims.
template <class C, class KV, int R, int V>
SARATHI_INLINE void add_values(const KV* const* v, int64_t v_head, int32_t keys, int32_t d, int32_t head_dim, const float* s, const uint16_t* p, float* o,
                               Prefetcher<KV>& ahead) {
  F acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) acc[r][i] = load(o + r * head_dim + d + i * kLanes);
  for (int32_t j = 0; j < keys; j += C::kDepth) {
    typename C::Vector x[V];
    ahead.step(), ahead.step();
    if constexpr (C::kDepth == 1) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) x[i] = load_as(v[j] + v_head + d + i * kLanes);
    } else {
#if defined(__AVX512BF16__)
      const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 4
      for (int i = 0; i < V; i += 2) {
        const __m512i a = _mm512_loadu_si512(v[j] + v_head + d + i * kLanes);
        const __m512i b = _mm512_loadu_si512(v[j + 1] + v_head + d + i * kLanes);
        x[i] = _mm512_permutex2var_epi16(a, low, b);
        x[i + 1] = _mm512_permutex2var_epi16(a, high, b);
      }
#endif
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const void* weight = C::kDepth == 1 ? static_cast<const void*>(s + r * kStreamKeys + j) : p + r * kStreamKeys + j;
      const typename C::Vector y = C::broadcast(static_cast<const uint32_t*>(weight));
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) acc[r][i] = C::dot(acc[r][i], x[i], y);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(o + r * head_dim + d + i * kLanes, acc[r][i]);
}

template <class C, class KV, int R>
void add_values(const KV* const* v, int64_t v_head, int32_t keys, int32_t head_dim, const float* s, const uint16_t* p, float* o,
                               Prefetcher<KV>& ahead) {
  int32_t d = 0;
  for (; d + kDimVectors * kLanes <= head_dim; d += kDimVectors * kLanes) add_values<C, KV, R, kDimVectors>(v, v_head, keys, d, head_dim, s, p, o, ahead);
  constexpr int rest = C::kDepth;  // vectors that one step of K and V makes
  if constexpr (rest < kDimVectors)
    for (; d < head_dim; d += rest * kLanes) add_values<C, KV, R, rest>(v, v_head, keys, d, head_dim, s, p, o, ahead);
}

// One row's online softmax over one block: s becomes p; o, m, l follow.
struct BlockScale { float scale, softcap; const float *k_scale, *v_scale; };
struct RowMask { KeyRange seen; bool tree; int32_t tree_first; uint64_t tree_bits; };  // bit j: may see key tree_first + j

SARATHI_INLINE void softmax_row(float* s, uint16_t* p, int32_t first, const RowMask& mask, const BlockScale& b, bool pairs, int32_t head_dim,
                                float& m, float& l, float* o) {
  const float cap = b.softcap * kLog2E, factor = b.softcap > 0 ? b.scale / b.softcap : b.scale;
  for (int32_t j = 0; j < kStreamKeys; j += kLanes) {
    F x = mul(load(s + j), set1(factor));
    if (b.k_scale) x = mul(x, load(b.k_scale + j));
    if (b.softcap > 0) x = mul(set1(cap), tanh2(x));
    store(s + j, mask_lanes(x, first + j, mask.seen.lo, mask.seen.hi));
  }
  if (mask.tree)
    for (int32_t j = max_of(0, mask.tree_first - first); j < kStreamKeys && first + j - mask.tree_first < 64; ++j)
      if (!((mask.tree_bits >> (first + j - mask.tree_first)) & 1)) s[j] = -kInfinity;
  F top = load(s);
  for (int32_t j = kLanes; j < kStreamKeys; j += kLanes) top = max(top, load(s + j));
  const float block_max = reduce_max(top);
  if (block_max > m + kStreamLazy) {
    const float alpha = m == -kInfinity ? 0.0f : exp2f(m - block_max);
    for (int32_t d = 0; d < head_dim; d += kLanes) store(o + d, mul(load(o + d), set1(alpha)));
    l *= alpha;
    m = block_max;
  }
  const F base = set1(m == -kInfinity ? 0.0f : m);
  F total = zero();
  for (int32_t j = 0; j < kStreamKeys; j += kLanes) {
    F x = exp2(sub(load(s + j), base));
    total = add(total, x);
    if (b.v_scale) x = mul(x, load(b.v_scale + j));
    if (pairs) store_as(reinterpret_cast<Bf16*>(p + j), x);
    else store(s + j, x);
  }
  l += reduce_add(total);
}

template <class C, class T, class KV>
struct StreamQuery { using Element = float; };
#if defined(__AVX512BF16__)
template <class T, class KV>
struct StreamQuery<Bf16Dot, T, KV> { using Element = Bf16; };
#endif

// Whether rows of this length are whole vectors in the compute type; a spec's property, so a row's bits depend on the spec only.
template <class C>
SARATHI_INLINE bool stream_takes(int32_t head_dim) { return head_dim % (C::kDepth * kLanes) == 0; }

// Keys of the item against its rows, for kv heads [head_begin, head_end). row_count <= kStreamRows.
template <class T, class KV, class C>
void visit_stream(const AttentionParams& p, const WorkItem& item, int32_t head_begin, int32_t head_end, char* scratch) {
  using Q = typename StreamQuery<C, T, KV>::Element;
  const int32_t heads = head_end - head_begin, dim = p.head_dim, rows = item.row_count;
  const StreamScratch t(scratch, heads, dim);
  RowMask masks[kStreamRows];
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t row = item.row_begin + r;
    masks[r] = {visible_to(p, item, row), has_tree(p, item), item.kv_len - item.q_len, has_tree(p, item) ? tree_bits_of(p, item, row) : 0};
  }
  for (int32_t h = 0; h < heads; ++h)
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t at = h * kStreamRows + r;
      const RowPlace place = place_of(p, item.q_begin, head_begin + h, item.row_begin + r);
      const T* from = static_cast<const T*>(p.q) + place.token * p.q_stride_token + place.q_head * p.q_stride_head;
      Q* to = reinterpret_cast<Q*>(t.q) + static_cast<int64_t>(at) * dim;
      for (int32_t d = 0; d < dim; d += kLanes) store_as(to + d, load_as(from + d)), store(t.o + static_cast<int64_t>(at) * dim + d, zero());
      t.m[at] = -kInfinity, t.l[at] = 0.0f;
    }

  // While one block is computed, head by head, the next is prefetched in the order of its memory: pages lie anywhere, and no
  // hardware prefetcher follows a block table.
  const PagedRows<KV> k_rows = keys_of<KV>(p, item), v_rows = values_of<KV>(p, item);
  StreamBlock<KV> blocks[2];
  StreamBlock<KV>*block = &blocks[0], *next = &blocks[1];
  Prefetcher<KV> ahead(p, heads);
  if (item.kv_begin < item.kv_end) {
    next->find(k_rows, v_rows, item.kv_begin, item.kv_end, head_begin);
  }
  for (int32_t first = item.kv_begin; first < item.kv_end; first += kStreamKeys) {
    StreamBlock<KV>* const swap = block;
    block = next, next = swap;
    next->count = 0;
    if (first + kStreamKeys < item.kv_end) next->find(k_rows, v_rows, first + kStreamKeys, item.kv_end, head_begin);
    ahead.start(next->k, next->v, next->count);
    const int32_t count = block->count;
    for (int32_t h = 0; h < heads; ++h) {
      const int64_t k_head = h * p.k_stride_head, v_head = h * p.v_stride_head;
      alignas(64) float k_scale[kStreamKeys], v_scale[kStreamKeys];
      BlockScale scale{p.softmax_scale * kLog2E, p.softcap, nullptr, nullptr};
      if constexpr (sizeof(KV) == 1) {
        const float *ks[kStreamKeys], *vs[kStreamKeys];
        scales_of(p, item, p.k_scale).find(first, count, head_begin + h, ks);
        scales_of(p, item, p.v_scale).find(first, count, head_begin + h, vs);
        for (int32_t j = 0; j < kStreamKeys; ++j) k_scale[j] = j < count ? *ks[j] : 0.0f, v_scale[j] = j < count ? *vs[j] : 0.0f;
        scale.k_scale = k_scale, scale.v_scale = v_scale;
      }
      for (int32_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
        const int32_t n = min_of(kRowsAtOnce, rows - r0), at = h * kStreamRows + r0;
        const Q* q = reinterpret_cast<const Q*>(t.q) + static_cast<int64_t>(at) * dim;
        float* o = t.o + static_cast<int64_t>(at) * dim;
        for (int32_t j = 0; j < count; j += kKeysAtOnce) {
          if (n == 4) dot_rows<C, KV, Q, 4>(q, block->k + j, k_head, dim, t.s + j, ahead);
          else if (n == 3) dot_rows<C, KV, Q, 3>(q, block->k + j, k_head, dim, t.s + j, ahead);
          else if (n == 2) dot_rows<C, KV, Q, 2>(q, block->k + j, k_head, dim, t.s + j, ahead);
          else dot_rows<C, KV, Q, 1>(q, block->k + j, k_head, dim, t.s + j, ahead);
        }
        for (int32_t r = 0; r < n; ++r) {
          float* s = t.s + r * kStreamKeys;
          for (int32_t j = round_up(count, kKeysAtOnce); j < kStreamKeys; ++j) s[j] = 0.0f;
          softmax_row(s, t.p + r * kStreamKeys, first, masks[r0 + r], scale, C::kDepth == 2, dim, t.m[at + r], t.l[at + r], o + r * dim);
        }
        const int32_t used = round_up(count, C::kDepth);
        if (n == 4) add_values<C, KV, 4>(block->v, v_head, used, dim, t.s, t.p, o, ahead);
        else if (n == 3) add_values<C, KV, 3>(block->v, v_head, used, dim, t.s, t.p, o, ahead);
        else if (n == 2) add_values<C, KV, 2>(block->v, v_head, used, dim, t.s, t.p, o, ahead);
        else add_values<C, KV, 1>(block->v, v_head, used, dim, t.s, t.p, o, ahead);
      }
    }
  }

  for (int32_t h = 0; h < heads; ++h)
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t at = h * kStreamRows + r;
      const float l = t.l[at];
      float* o = t.o + static_cast<int64_t>(at) * dim;
      for (int32_t d = 0; d < dim; d += kLanes) store(o + d, mul(load(o + d), set1(l > 0 ? 1.0f / l : 0.0f)));
      finish_row<T>(p, item, head_begin + h, r, o, l > 0 ? (t.m[at] + log2f(l)) * kLn2 : -kInfinity);
    }
}

}  // namespace
}  // namespace sarathi
