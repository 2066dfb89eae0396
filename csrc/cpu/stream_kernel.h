// Attention of a few query rows (decodes, speculative tokens), bound by the bandwidth of K and V: the head DIMENSION lies in
// the vector lanes, so that each K and V row is read once, as it lies in its page, for the whole group.
//
//     s[row, key] = sum over lanes of q[row, :] * k[key, :]      then the softmax of a block of keys
//     o[row, :]  += sum_key p[row, key] * v[key, :]              bfloat16: two keys at a time
//
// Bandwidth is a matter of order. One visit goes through all the kv heads of a key block before the next block, and through a
// block in kRuns runs of keys side by side: a page is read from end to end, in as many streams as memory and the hardware's
// prefetchers like best, while the same places of the next block are prefetched. Measured: bench/results/cpu/PROFILE.md.
#pragma once
#include "request.h"

namespace sarathi {
namespace {

constexpr int kStreamRows = 8;                            // packed rows per kv head at most
constexpr int kStreamKeys = 32;                           // keys per block
constexpr int kRuns = 4;                                  // streams in which a block is read
constexpr int kValuesAtOnce = 16;                         // keys of one head whose values are added before the next head's
constexpr int kRowsAtOnce = 4;
constexpr int kKeysAtOnce = kLanes == 16 ? 4 : 2;         // accumulators: keys x rows
constexpr int kDimVectors = kLanes == 16 ? 4 : 2;         // accumulators: rows x vectors of dims
constexpr int32_t kNoKey = 0x7fffffff;
constexpr float kStreamLazy = 8.0f;                       // log2: how far a row's maximum may lag, see tile_kernel.h
static_assert(kStreamKeys % kLanes == 0 && kStreamKeys % kRuns == 0, "blocks are whole vectors and whole runs");
static_assert(kRuns % kKeysAtOnce == 0 && kKeysAtOnce % 2 == 0 && kValuesAtOnce % kRuns == 0, "register blocks divide a block's positions");

// Scratch of one visit: the state of every (kv head, row), and one block's scores.
struct StreamScratch {
  float *q, *o, *m, *l, *s;
  uint16_t* p;
  size_t bytes = 0;

  StreamScratch(char* base, int32_t heads, int32_t rows, int32_t head_dim) {
    const int64_t states = static_cast<int64_t>(heads) * rows;
    take(base, q, states * head_dim), take(base, o, states * head_dim), take(base, m, states), take(base, l, states);
    take(base, s, states * kStreamKeys), take(base, p, states * kStreamKeys);
  }
  template <class A> void take(char* base, A*& array, int64_t count) {
    array = reinterpret_cast<A*>(base + bytes);
    bytes += (count * sizeof(A) + 63) / 64 * 64;
  }
};

// One block of keys in the order in which they are visited: position kRuns * j + i holds key j of run i. The rows are those of
// the first kv head of the visit. Positions without a key repeat the last one's rows, and are masked.
template <class KV>
struct StreamBlock {
  const KV *k[kStreamKeys], *v[kStreamKeys];
  const float *k_scale[kStreamKeys], *v_scale[kStreamKeys];  // int8 only
  alignas(64) int32_t key[kStreamKeys];
  int32_t positions = 0;                                     // in use: whole runs

  void find(const AttentionParams& p, const WorkItem& item, int32_t first, int32_t head) {
    const int32_t count = min_of(kStreamKeys, item.kv_end - first), run = (count + kRuns - 1) / kRuns;
    const KV* rows[kStreamKeys];
    keys_of<KV>(p, item).find(first, count, head, rows);
    spread(rows, count, run, k);
    values_of<KV>(p, item).find(first, count, head, rows);
    spread(rows, count, run, v);
    if constexpr (sizeof(KV) == 1) {
      const float* scales[kStreamKeys];
      scales_of(p, item, p.k_scale).find(first, count, head, scales);
      spread(scales, count, run, k_scale);
      scales_of(p, item, p.v_scale).find(first, count, head, scales);
      spread(scales, count, run, v_scale);
    }
    for (int32_t j = 0; j < kStreamKeys; ++j) {
      const int32_t at = j / kRuns + j % kRuns * run;
      key[j] = j < kRuns * run && at < count ? first + at : kNoKey;
    }
    positions = kRuns * run;
  }
  template <class A>
  static SARATHI_INLINE void spread(const A* const* rows, int32_t count, int32_t run, const A** to) {
    for (int32_t j = 0; j < kStreamKeys; ++j) to[j] = rows[min_of(j / kRuns + j % kRuns * run, count - 1)];
  }
};

// Prefetches what a step that reads kBytes of a row at element d will read of `row`; no cache line twice.
template <int kBytes, class KV>
SARATHI_INLINE void prefetch_step(const KV* row, int32_t d) {
  const char* at = reinterpret_cast<const char*>(row + d);
  if constexpr (kBytes >= 64) {
#pragma GCC unroll 4
    for (int i = 0; i < kBytes; i += 64) prefetch(at + i);
  } else if (d * static_cast<int32_t>(sizeof(KV)) % 64 == 0) {
    prefetch(at);
  }
}

// One vector of products: C::kDepth * kLanes elements of a row.
template <class C, class KV>
SARATHI_INLINE typename C::Vector load_row(const KV* row) {
  if constexpr (C::kDepth == 1) return load_as(row);
  else return C::load_operands(reinterpret_cast<const uint32_t*>(row));
}

// s[row][position] for R rows and kKeysAtOnce positions; q: [rows][head_dim] in the compute type's elements.
template <class C, class KV, class Q, int R>
SARATHI_INLINE void dot_rows(const Q* q, const KV* const* k, const KV* const* next, int64_t k_head, int32_t head_dim, float* s) {
  F acc[kKeysAtOnce][R];
#pragma GCC unroll 4
  for (int j = 0; j < kKeysAtOnce; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[j][r] = zero();
  constexpr int step = C::kDepth * kLanes;
  const KV *row[kKeysAtOnce], *ahead[kKeysAtOnce];
#pragma GCC unroll 4
  for (int j = 0; j < kKeysAtOnce; ++j) row[j] = k[j] + k_head, ahead[j] = next[j] + k_head;
  for (int32_t d = 0; d < head_dim; d += step) {
    typename C::Vector x[kKeysAtOnce];
#pragma GCC unroll 4
    for (int j = 0; j < kKeysAtOnce; ++j) {
      x[j] = load_row<C>(row[j] + d);
      prefetch_step<step * static_cast<int>(sizeof(KV))>(ahead[j], d);
    }
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
SARATHI_INLINE void add_values(const KV* const* v, const KV* const* next, int64_t v_head, int32_t keys, int32_t d, int32_t head_dim,
                               const float* s, const uint16_t* p, float* o) {
  F acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) acc[r][i] = load(o + r * head_dim + d + i * kLanes);
  for (int32_t j = 0; j < keys; j += C::kDepth) {
    typename C::Vector x[V];
#pragma GCC unroll 2
    for (int i = 0; i < C::kDepth; ++i) prefetch_step<V * kLanes * static_cast<int>(sizeof(KV))>(next[j + i] + v_head, d);
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
void add_values(const KV* const* v, const KV* const* next, int64_t v_head, int32_t keys, int32_t head_dim, const float* s, const uint16_t* p, float* o) {
  int32_t d = 0;
  for (; d + kDimVectors * kLanes <= head_dim; d += kDimVectors * kLanes) add_values<C, KV, R, kDimVectors>(v, next, v_head, keys, d, head_dim, s, p, o);
  constexpr int rest = C::kDepth;  // vectors that one step of K and V makes
  if constexpr (rest < kDimVectors)
    for (; d < head_dim; d += rest * kLanes) add_values<C, KV, R, rest>(v, next, v_head, keys, d, head_dim, s, p, o);
}

// One row's online softmax over one block: s becomes p; o, m, l follow.
struct BlockScale { float scale, softcap; const float *k_scale, *v_scale; };
struct RowMask { KeyRange seen; bool tree; int32_t tree_first; uint64_t tree_bits; };  // bit j: may see key tree_first + j

SARATHI_INLINE void softmax_row(float* s, uint16_t* p, const int32_t* key, const RowMask& mask, const BlockScale& b, bool pairs, int32_t head_dim,
                                float& m, float& l, float* o) {
  const float cap = b.softcap * kLog2E, factor = b.softcap > 0 ? b.scale / b.softcap : b.scale;
  for (int32_t j = 0; j < kStreamKeys; j += kLanes) {
    F x = mul(load(s + j), set1(factor));
    if (b.k_scale) x = mul(x, load(b.k_scale + j));
    if (b.softcap > 0) x = mul(set1(cap), tanh2(x));
    store(s + j, mask_keys(x, key + j, mask.seen.lo, mask.seen.hi));
  }
  if (mask.tree)
    for (int32_t j = 0; j < kStreamKeys; ++j) {
      const int64_t bit = static_cast<int64_t>(key[j]) - mask.tree_first;
      if (bit >= 0 && bit < 64 && !((mask.tree_bits >> bit) & 1)) s[j] = -kInfinity;
    }
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

// Calls body(Rows<n>) with the number of rows that are left, kRowsAtOnce at most.
template <int R> struct Rows { static constexpr int value = R; };
template <class Body>
SARATHI_INLINE void with_rows(int32_t left, const Body& body) {
  static_assert(kRowsAtOnce == 4);
  if (left >= 4) body(Rows<4>());
  else if (left == 3) body(Rows<3>());
  else if (left == 2) body(Rows<2>());
  else body(Rows<1>());
}

// Keys of the item against its rows, for kv heads [head_begin, head_end). row_count <= kStreamRows.
template <class T, class KV, class C>
void visit_stream(const AttentionParams& p, const WorkItem& item, int32_t head_begin, int32_t head_end, char* scratch) {
  using Q = typename StreamQuery<C, T, KV>::Element;
  const int32_t heads = head_end - head_begin, dim = p.head_dim, rows = item.row_count;
  const StreamScratch t(scratch, heads, rows, dim);
  Q* const queries = reinterpret_cast<Q*>(t.q);
  RowMask masks[kStreamRows];
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t row = item.row_begin + r;
    masks[r] = {visible_to(p, item, row), has_tree(p, item), item.kv_len - item.q_len, has_tree(p, item) ? tree_bits_of(p, item, row) : 0};
  }
  for (int32_t h = 0; h < heads; ++h)
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t at = h * rows + r;
      const RowPlace place = place_of(p, item.q_begin, head_begin + h, item.row_begin + r);
      const T* from = static_cast<const T*>(p.q) + place.token * p.q_stride_token + place.q_head * p.q_stride_head;
      for (int32_t d = 0; d < dim; d += kLanes) store_as(queries + at * dim + d, load_as(from + d)), store(t.o + at * dim + d, zero());
      t.m[at] = -kInfinity, t.l[at] = 0.0f;
    }

  StreamBlock<KV> blocks[2];
  StreamBlock<KV>*block = &blocks[0], *next = &blocks[1];
  if (item.kv_begin < item.kv_end) next->find(p, item, item.kv_begin, head_begin);
  for (int32_t first = item.kv_begin; first < item.kv_end; first += kStreamKeys) {
    StreamBlock<KV>* const swap = block;
    block = next, next = swap;
    if (first + kStreamKeys < item.kv_end) next->find(p, item, first + kStreamKeys, head_begin);
    else next = block;  // nothing to prefetch but what is there
    for (int32_t j = 0; j < block->positions; j += kKeysAtOnce)
      for (int32_t h = 0; h < heads; ++h)
        for (int32_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
          const int64_t at = h * rows + r0;
          with_rows(rows - r0, [&](auto n) {
            dot_rows<C, KV, Q, n.value>(queries + at * dim, block->k + j, next->k + j, h * p.k_stride_head, dim, t.s + at * kStreamKeys + j);
          });
        }
    for (int32_t h = 0; h < heads; ++h) {
      alignas(64) float k_scale[kStreamKeys], v_scale[kStreamKeys];
      BlockScale scale{p.softmax_scale * kLog2E, p.softcap, nullptr, nullptr};
      if constexpr (sizeof(KV) == 1) {
        for (int32_t j = 0; j < kStreamKeys; ++j) k_scale[j] = block->k_scale[j][h], v_scale[j] = block->v_scale[j][h];
        scale.k_scale = k_scale, scale.v_scale = v_scale;
      }
      for (int32_t r = 0; r < rows; ++r) {
        const int64_t at = h * rows + r;
        float* s = t.s + at * kStreamKeys;
        for (int32_t j = block->positions; j < kStreamKeys; ++j) s[j] = 0.0f;
        softmax_row(s, t.p + at * kStreamKeys, block->key, masks[r], scale, C::kDepth == 2, dim, t.m[at], t.l[at], t.o + at * dim);
      }
    }
    for (int32_t j = 0; j < block->positions; j += kValuesAtOnce)
      for (int32_t h = 0; h < heads; ++h)
        for (int32_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
          const int64_t at = h * rows + r0, s = at * kStreamKeys + j;
          with_rows(rows - r0, [&](auto n) {
            add_values<C, KV, n.value>(block->v + j, next->v + j, h * p.v_stride_head, min_of(kValuesAtOnce, block->positions - j), dim, t.s + s,
                                       t.p + s, t.o + at * dim);
          });
        }
  }

  for (int32_t h = 0; h < heads; ++h)
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t at = h * rows + r;
      const float l = t.l[at];
      float* o = t.o + at * dim;
      for (int32_t d = 0; d < dim; d += kLanes) store(o + d, mul(load(o + d), set1(l > 0 ? 1.0f / l : 0.0f)));
      finish_row<T>(p, item, head_begin + h, r, o, l > 0 ? (t.m[at] + log2f(l)) * kLn2 : -kInfinity);
    }
}

}  // namespace
}  // namespace sarathi
