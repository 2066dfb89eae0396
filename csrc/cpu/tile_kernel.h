// Attention of a tile of query rows (prefill chunks, wide groups), with the ROWS in the vector lanes:
//
//     S^T[key, row] = sum_d k[key, d] * q[row, d]        k broadcast straight from its page, q packed once per tile
//     P^T = exp2(S^T - m)                                softmax runs down the columns: no horizontal reduction anywhere
//     O^T[d, row] += sum_key v[key, d] * P^T[key, row]   v copied per key block to panels of 16 dims (bfloat16: in key pairs)
//
// Both products are one register block: kM broadcasts x kVectors vectors of rows, 24 accumulators on AVX-512, so that each
// loaded vector is used kM times and each broadcast kVectors times. Q, a key block's S and P stay in L1, O^T in L1/L2.
#pragma once
#include "amx.h"
#include "request.h"

namespace sarathi {
namespace {

constexpr int kVectors = 3;                          // vectors of rows in a register block
constexpr int kM = kLanes == 16 ? 8 : 4;             // keys (or dims) in a register block
constexpr int kPanelRows = kVectors * kLanes;
constexpr int kTileRows = 96;                        // rows in flight; an item of more is visited in parts
constexpr int kTilePanels = kTileRows / kPanelRows;
constexpr int kBlockKeys = 64;
constexpr int kDimPanel = 16;                        // operands of V side by side: one cache line
constexpr float kLazy = 8.0f;                        // the running maximum may lag by this much (log2) before O is rescaled
static_assert(kTileRows % kPanelRows == 0, "a tile is a whole number of panels");
static_assert(kBlockKeys % kM == 0 && kM % 2 == 0 && kDimPanel % kM == 0, "register blocks divide the key block and the V panel");
static_assert(kM * kVectors + kVectors + 1 <= (kLanes == 16 ? 32 : 16), "the register block fits the register file");

// Scratch of one tile; every array begins on a cache line.
struct TileScratch {
  uint32_t *q, *k, *v;
  float *s, *o, *m, *l, *alpha, *staging, *k_scale, *v_scale;
  int32_t *lo, *hi;
  size_t bytes = 0;

  TileScratch(char* base, int32_t head_dim) {
    const int32_t dims = round_up(head_dim, kDimPanel);
    take(base, q, kTileRows * dims), take(base, k, kBlockKeys * dims), take(base, v, kBlockKeys * dims);
    take(base, s, kTileRows * kBlockKeys), take(base, o, kTileRows * dims), take(base, staging, kLanes * dims);
    take(base, m, kTileRows), take(base, l, kTileRows), take(base, alpha, kTileRows);
    take(base, lo, kTileRows), take(base, hi, kTileRows), take(base, k_scale, kBlockKeys), take(base, v_scale, kBlockKeys);
  }
  template <class T> void take(char* base, T*& array, int64_t count) {
    array = reinterpret_cast<T*>(base + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
  }
};

// A row no request owns, for the operands that round a key block up to whole register blocks.
alignas(64) const uint32_t kZeroRow[512] = {};

// Prefetches the rows of some keys of one head, a cache line of K and one of V at a time, in small shares: requests that come in one
// burst wait for each other, and the loads behind them wait too.
template <class KV>
struct Prefetcher {
  const KV *const *k = nullptr, *const *v = nullptr;  // [keys]
  int32_t bytes, keys = 0, key = 0, at = 0, share = 0;

  SARATHI_INLINE explicit Prefetcher(int32_t head_dim) : bytes(head_dim * static_cast<int32_t>(sizeof(KV))) {}
  SARATHI_INLINE void start(const KV* const* k_rows, const KV* const* v_rows, int32_t count, int32_t shares) {
    k = k_rows, v = v_rows, keys = count, key = at = 0;
    share = (count * ((bytes + 63) / 64) + shares - 1) / shares;
  }
  SARATHI_INLINE void step() {
    for (int32_t i = 0; i < share && key < keys; ++i) {
      prefetch(reinterpret_cast<const char*>(k[key]) + at), prefetch(reinterpret_cast<const char*>(v[key]) + at);
      at += 64;
      if (at >= bytes) at = 0, ++key;
    }
  }
};

// ---- operands ----

template <class C, class T> struct Direct { static constexpr bool value = false; };  // rows of T are operands of C as they lie
template <> struct Direct<Fma, float> { static constexpr bool value = true; };
#if defined(__AVX512BF16__)
template <> struct Direct<Bf16Dot, Bf16> { static constexpr bool value = true; };
template <> struct Direct<AmxDot, Bf16> { static constexpr bool value = true; };
#endif
template <class C> constexpr int kKeyUnit = OnTiles<C>::value ? kTileKeys : kM;  // a product takes whole multiples of it

// to[0 .. n) = operands of the n * C::kDepth elements of a row.
template <class C, class T>
SARATHI_INLINE void convert_row(const T* from, int32_t head_dim, uint32_t* to) {
  if constexpr (C::kDepth == 1) {
    float* f = reinterpret_cast<float*>(to);
    int32_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(f + d, load_as(from + d));
    for (; d < head_dim; ++d) f[d] = scalar_of(from[d]);
  } else {
    Bf16* b = reinterpret_cast<Bf16*>(to);
    int32_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store_as(b + d, load_as(from + d));
    for (; d < head_dim; ++d) store_scalar(b + d, scalar_of(from[d]));
  }
}

// q[d][row] of one panel, `width` rows wide, from the query rows; `sign` -1, 0 or 1 makes the softmax scale positive.
template <class C, class T>
void pack_q(const AttentionParams& p, const WorkItem& item, int32_t kv_head, int32_t first, int32_t rows, int32_t width,
            float sign, float* staging, uint32_t* q) {
  const int32_t depth = p.head_dim / C::kDepth, stride = round_up(p.head_dim, kDimPanel);
  for (int32_t r0 = 0; r0 < width; r0 += kLanes) {
    for (int32_t r = 0; r < kLanes; ++r) {
      uint32_t* to = reinterpret_cast<uint32_t*>(staging) + r * stride;
      if (r0 + r < rows && sign != 0) {
        const RowPlace place = place_of(p, item.q_begin, kv_head, first + r0 + r);
        convert_row<C>(static_cast<const T*>(p.q) + place.token * p.q_stride_token + place.q_head * p.q_stride_head, p.head_dim, to);
        for (int32_t d = 0; sign < 0 && d < depth; ++d) to[d] ^= C::kDepth == 1 ? 0x80000000u : 0x80008000u;
      } else {
        for (int32_t d = 0; d < depth; ++d) to[d] = 0;
      }
    }
    for (int32_t d = 0; d < depth; d += kLanes) transpose(staging + d, stride, reinterpret_cast<float*>(q) + d * width + r0, width);
  }
}

// v[dims / 16][keys / kDepth][16 operands]; a missing odd key counts as zeros.
template <class C, class T>
void pack_v(const T* const* rows, int32_t keys, int32_t head_dim, uint32_t* v) {
  const int32_t depth = (keys + C::kDepth - 1) / C::kDepth;
  for (int32_t d = 0; d < head_dim; d += kDimPanel, v += depth * kDimPanel) {
    const int32_t n = min_of(kDimPanel, head_dim - d);
    for (int32_t j = 0; j < depth; ++j) {
      uint32_t* to = v + j * kDimPanel;
      if constexpr (C::kDepth == 1) {
        float* f = reinterpret_cast<float*>(to);
        int32_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(f + i, load_as(rows[j] + d + i));
        for (; i < n; ++i) f[i] = scalar_of(rows[j][d + i]);
      } else {
#if defined(__AVX512BF16__)
        const T* a = rows[2 * j] + d;
        const T* b = 2 * j + 1 < keys ? rows[2 * j + 1] + d : nullptr;
        if (n == kDimPanel) {
          const F y = b ? load_as(b) : zero();
          if constexpr (Direct<C, T>::value) {  // bfloat16 already: the top halves of two floats, side by side
            const __m512i x = _mm512_srli_epi32(_mm512_castps_si512(load_as(a)), 16);
            _mm512_storeu_si512(to, _mm512_or_si512(x, _mm512_castps_si512(y)));
          } else {
            _mm512_storeu_si512(to, round_pairs(load_as(a), y));
          }
        } else {
          Bf16* pair = reinterpret_cast<Bf16*>(to);
          for (int32_t i = 0; i < n; ++i) {
            store_scalar(pair + 2 * i, scalar_of(a[i]));
            store_scalar(pair + 2 * i + 1, b ? scalar_of(b[i]) : 0.0f);
          }
        }
#endif
      }
    }
  }
}

// ---- the three steps on one panel of RV vectors of rows ----

// s[key][row], keys rounded up to whole register blocks (their rows are zeros).
template <class C, int RV>
void scores(const uint32_t* const* k, int32_t keys, const uint32_t* q, int32_t depth, float* s) {
  for (int32_t key = 0; key < keys; key += kM) {
    F acc[kM][RV];
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
      for (int r = 0; r < RV; ++r) acc[i][r] = zero();
    const uint32_t* row[kM];
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) row[i] = k[key + i];
    const uint32_t* b = q;
    for (int32_t d = 0; d < depth; ++d, b += RV * kLanes) {
      typename C::Vector x[RV];
#pragma GCC unroll 3
      for (int r = 0; r < RV; ++r) x[r] = C::load_operands(b + r * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) {
        const typename C::Vector a = C::broadcast(row[i] + d);
#pragma GCC unroll 3
        for (int r = 0; r < RV; ++r) acc[i][r] = C::dot(acc[i][r], a, x[r]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
      for (int r = 0; r < RV; ++r) store(s + ((key + i) * RV + r) * kLanes, acc[i][r]);
  }
}

// Scores to log2 units with softcap and per-key scales, and -inf where a row may not look.
template <int RV>
void mask_scores(const AttentionParams& p, float* s, int32_t keys, int32_t first_key, float scale, const float* k_scale,
                 const int32_t* lo, const int32_t* hi) {
  const float cap = p.softcap * kLog2E, inner = p.softcap > 0 ? 1.0f / p.softcap : 1.0f;
  for (int32_t j = 0; j < keys; ++j) {
    const F factor = set1(scale * inner * (k_scale ? k_scale[j] : 1.0f));
    for (int r = 0; r < RV; ++r) {
      float* at = s + (j * RV + r) * kLanes;
      F x = mul(load(at), factor);
      if (p.softcap > 0) x = mul(set1(cap), tanh2(x));
      store(at, mask_range(x, first_key + j, lo + r * kLanes, hi + r * kLanes));
    }
  }
}

// Running maximum and sum of each row, and P^T over S^T, in place. True if some row's O must be rescaled by alpha.
template <class C, int RV>
bool softmax(float* s, int32_t keys, float scale, const float* v_scale, float* m, float* l, float* alpha) {
  F top[RV], total[RV];
#pragma GCC unroll 3
  for (int r = 0; r < RV; ++r) top[r] = set1(-kInfinity);
  for (int32_t j = 0; j < keys; ++j)
#pragma GCC unroll 3
    for (int r = 0; r < RV; ++r) top[r] = max(top[r], load(s + (j * RV + r) * kLanes));
  bool moved = false;
#pragma GCC unroll 3
  for (int r = 0; r < RV; ++r) {
    const F before = load(m + r * kLanes), seen = mul(top[r], set1(scale));
    const F after = where_greater(seen, add(before, set1(kLazy)), seen, before);
    moved |= any_different(before, after);
    store(m + r * kLanes, after);
    top[r] = where_greater(after, set1(-kInfinity), after, zero());
    const F factor = exp2(sub(before, top[r]));
    store(alpha + r * kLanes, factor);
    total[r] = mul(load(l + r * kLanes), factor);
    top[r] = sub(zero(), top[r]);
  }
  const F slope = set1(scale);
  for (int32_t j = 0; j < keys; j += C::kDepth) {
#pragma GCC unroll 3
    for (int r = 0; r < RV; ++r) {
      float* at = s + (j * RV + r) * kLanes;
      F a = exp2(fma(load(at), slope, top[r]));
      total[r] = add(total[r], a);
      if (v_scale) a = mul(a, set1(v_scale[j]));
      if constexpr (C::kDepth == 1) {
        store(at, a);
      } else {
#if defined(__AVX512BF16__)
        F b = exp2(fma(load(at + RV * kLanes), slope, top[r]));
        total[r] = add(total[r], b);
        if (v_scale) b = mul(b, set1(v_scale[j + 1]));
        _mm512_storeu_si512(s + (j / 2 * RV + r) * kLanes, round_pairs(a, b));
#endif
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < RV; ++r) store(l + r * kLanes, total[r]);
  return moved;
}

// o[d][row] += sum over operands j of v[d][j] * pt[j][row].
template <class C, int RV, class Ahead>
void accumulate(const uint32_t* v, int32_t v_stride, const uint32_t* pt, int32_t depth, int32_t head_dim, const float* alpha, bool first,
                bool rescale, float* o, Ahead& ahead) {
  for (int32_t d = 0; d < head_dim; d += kM) {
    F acc[kM][RV];
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
      for (int r = 0; r < RV; ++r) acc[i][r] = first ? zero() : load(o + ((d + i) * RV + r) * kLanes);
    if (rescale && !first) {
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
        for (int r = 0; r < RV; ++r) acc[i][r] = mul(acc[i][r], load(alpha + r * kLanes));
    }
    ahead.step();
    const uint32_t* a = v + d / kDimPanel * v_stride + d % kDimPanel;
    const uint32_t* b = pt;
    for (int32_t j = 0; j < depth; ++j, a += kDimPanel, b += RV * kLanes) {
      typename C::Vector x[RV];
#pragma GCC unroll 3
      for (int r = 0; r < RV; ++r) x[r] = C::load_operands(b + r * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) {
        const typename C::Vector y = C::broadcast(a + i);
#pragma GCC unroll 3
        for (int r = 0; r < RV; ++r) acc[i][r] = C::dot(acc[i][r], y, x[r]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
      for (int r = 0; r < RV; ++r) store(o + ((d + i) * RV + r) * kLanes, acc[i][r]);
  }
}

// ---- the tile ----

struct KeyBlock {
  const uint32_t* k[kBlockKeys];
  const uint32_t* v;
  const float *k_scale, *v_scale;  // [keys], or null
  int32_t first, count;
};

struct Panel {
  int32_t vectors, first_row;   // of the tile
  int32_t begin, end;           // keys that some row sees
  int32_t full_begin, full_end; // keys that every row sees
  bool started;
};

template <class C, int RV, class Ahead>
void visit_block(const AttentionParams& p, const WorkItem& item, const TileScratch& t, const KeyBlock& block, Panel& panel, int32_t row_begin,
                 float scale, Ahead& ahead) {
  const int32_t from = max_of(panel.begin - block.first, 0) / kKeyUnit<C> * kKeyUnit<C>;
  const int32_t to = min_of(panel.end - block.first, block.count);
  if (from >= to) return;
  const int32_t depth = p.head_dim / C::kDepth, dims = round_up(p.head_dim, kDimPanel);
  const int32_t keys = round_up(to - from, kKeyUnit<C>), first_key = block.first + from, at = panel.first_row;
  const bool tree = has_tree(p, item) && first_key + keys > item.kv_len - item.q_len;
  if constexpr (OnTiles<C>::value) tile_scores<RV>(block.k + from, keys, t.q + at * dims, depth, t.s, reinterpret_cast<uint32_t*>(t.staging), ahead);
  else scores<C, RV>(block.k + from, keys, t.q + at * dims, depth, t.s);
  const bool plain = first_key >= panel.full_begin && first_key + keys <= panel.full_end && !tree && p.softcap == 0 && !block.k_scale;
  if (!plain) {
    mask_scores<RV>(p, t.s, keys, first_key, scale, block.k_scale ? block.k_scale + from : nullptr, t.lo + at, t.hi + at);
    if (tree)
      for (int32_t j = max_of(0, item.kv_len - item.q_len - first_key); j < keys; ++j)
        for (int32_t r = 0; r < RV * kLanes && row_begin + at + r < item.q_len * (p.num_q_heads / p.num_kv_heads); ++r)
          if (!tree_allows(p, item, row_begin + at + r, first_key + j)) t.s[j * RV * kLanes + r] = -kInfinity;
    scale = 1.0f;
  }
  const bool moved = softmax<C, RV>(t.s, keys, scale, block.v_scale ? block.v_scale + from : nullptr, t.m + at, t.l + at, t.alpha + at);
  const uint32_t* const pt = reinterpret_cast<const uint32_t*>(t.s);
  float* const o = t.o + at * dims;
  if constexpr (OnTiles<C>::value) {
    const int32_t v_steps = round_up(block.count, kTileKeys) / kTileKeys;
    tile_accumulate<RV>(block.v + from / kTileKeys * kTile * kTile, v_steps, pt, keys / kTileKeys, p.head_dim, t.alpha + at, !panel.started, moved, o);
  } else {
    const int32_t operands = (min_of(keys, block.count - from) + C::kDepth - 1) / C::kDepth;
    const int32_t v_stride = (block.count + C::kDepth - 1) / C::kDepth * kDimPanel;
    accumulate<C, RV>(block.v + from / C::kDepth * kDimPanel, v_stride, pt, operands, p.head_dim, t.alpha + at, !panel.started, moved, o, ahead);
  }
  panel.started = true;
}

// Rows [row_begin, row_begin + rows) of the request against the item's keys, for one kv head. rows <= kTileRows.
template <class T, class KV, class C>
void visit_tile(const AttentionParams& p, const WorkItem& item, int32_t kv_head, int32_t row_begin, int32_t rows, char* scratch) {
  const TileScratch t(scratch, p.head_dim);
  const int32_t dims = round_up(p.head_dim, kDimPanel);
  // The sign of the scale goes into Q, so that a larger score is a larger logit; see softmax.
  const float sign = p.softmax_scale > 0 ? 1.0f : p.softmax_scale < 0 ? -1.0f : 0.0f;
  const float scale = sign == 0 ? kLog2E : sign * p.softmax_scale * kLog2E;

  for (int32_t r = 0; r < kTileRows; ++r) {
    const KeyRange range = r < rows ? visible_to(p, item, row_begin + r) : KeyRange{item.kv_begin, item.kv_begin};
    t.lo[r] = range.lo, t.hi[r] = range.hi;
    t.m[r] = -kInfinity, t.l[r] = 0.0f;
  }
  Panel panels[kTilePanels];
  int32_t num_panels = 0;
  for (int32_t at = 0; at < rows; at += kPanelRows) {
    const int32_t n = min_of(rows - at, kPanelRows), vectors = (n + kLanes - 1) / kLanes;
    Panel& panel = panels[num_panels++] = {vectors, at, t.hi[at], t.lo[at], t.lo[at], t.hi[at], false};
    for (int32_t r = at; r < at + n; ++r) {
      if (t.lo[r] < t.hi[r]) panel.begin = min_of(panel.begin, t.lo[r]), panel.end = max_of(panel.end, t.hi[r]);
      panel.full_begin = max_of(panel.full_begin, t.lo[r]), panel.full_end = min_of(panel.full_end, t.hi[r]);
    }
    pack_q<C, T>(p, item, kv_head, row_begin + at, n, vectors * kLanes, sign, t.staging, t.q + at * dims);
  }

  if constexpr (OnTiles<C>::value) tiles_begin();
  const PagedRows<KV> k_rows = keys_of<KV>(p, item), v_rows = values_of<KV>(p, item);
  struct Rows { const KV *k[kBlockKeys], *v[kBlockKeys]; } rows_of_block[2];
  Prefetcher<KV> ahead(p.head_dim);
  k_rows.find(item.kv_begin, min_of(kBlockKeys, item.kv_end - item.kv_begin), kv_head, rows_of_block[0].k);
  v_rows.find(item.kv_begin, min_of(kBlockKeys, item.kv_end - item.kv_begin), kv_head, rows_of_block[0].v);
  int now = 0;
  for (int32_t first = item.kv_begin; first < item.kv_end; first += kBlockKeys, now ^= 1) {
    KeyBlock block{{}, t.v, nullptr, nullptr, first, min_of(kBlockKeys, item.kv_end - first)};
    const KV *const *k = rows_of_block[now].k, *const *v = rows_of_block[now].v;
    const int32_t next = first + kBlockKeys, next_count = max_of(0, min_of(kBlockKeys, item.kv_end - next));
    k_rows.find(next, next_count, kv_head, rows_of_block[now ^ 1].k);
    v_rows.find(next, next_count, kv_head, rows_of_block[now ^ 1].v);
    ahead.start(rows_of_block[now ^ 1].k, rows_of_block[now ^ 1].v, next_count, num_panels * round_up(p.head_dim, kM) / kM);
    for (int32_t j = 0; j < block.count; ++j) {
      if constexpr (Direct<C, KV>::value) {
        block.k[j] = reinterpret_cast<const uint32_t*>(k[j]);
      } else {
        uint32_t* to = t.k + j * (p.head_dim / C::kDepth);
        convert_row<C>(k[j], p.head_dim, to);
        block.k[j] = to;
      }
    }
    for (int32_t j = block.count; j < round_up(block.count, kKeyUnit<C>); ++j) block.k[j] = kZeroRow;
    pack_v<C>(v, block.count, p.head_dim, t.v);
    if constexpr (OnTiles<C>::value)
      tile_transpose(t.v, (block.count + 1) / 2, round_up(block.count, kTileKeys) / kTileKeys, p.head_dim, t.staging);
    if constexpr (sizeof(KV) == 1) {  // int8: exact as it is in either operand type; its scales go to the scores and to P
      const float *ks[kBlockKeys], *vs[kBlockKeys];
      scales_of(p, item, p.k_scale).find(first, block.count, kv_head, ks);
      scales_of(p, item, p.v_scale).find(first, block.count, kv_head, vs);
      for (int32_t j = 0; j < kBlockKeys; ++j) {
        t.k_scale[j] = j < block.count ? *ks[j] : 0.0f;
        t.v_scale[j] = j < block.count ? *vs[j] : 0.0f;
      }
      block.k_scale = t.k_scale, block.v_scale = t.v_scale;
    }
    for (int32_t i = 0; i < num_panels; ++i) {
      if (panels[i].vectors == 3) visit_block<C, 3>(p, item, t, block, panels[i], row_begin, scale, ahead);
      else if (panels[i].vectors == 2) visit_block<C, 2>(p, item, t, block, panels[i], row_begin, scale, ahead);
      else visit_block<C, 1>(p, item, t, block, panels[i], row_begin, scale, ahead);
    }
  }

  if constexpr (OnTiles<C>::value) tiles_end();

  for (int32_t i = 0; i < num_panels; ++i) {
    const int32_t at = panels[i].first_row, width = panels[i].vectors * kLanes;
    for (int32_t r0 = at; r0 < min_of(rows, at + width); r0 += kLanes) {
      const F l = load(t.l + r0), inverse = div(set1(1.0f), l);
      float* column = t.o + at * dims + (r0 - at);
      for (int32_t d = 0; d < p.head_dim; ++d, column += width) store(column, where_greater(l, zero(), mul(load(column), inverse), zero()));
      for (int32_t d = 0; d < p.head_dim; d += kLanes) transpose(t.o + at * dims + d * width + (r0 - at), width, t.staging + d, dims);
      for (int32_t r = 0; r < min_of(kLanes, rows - r0); ++r) {
        const float sum = t.l[r0 + r];
        finish_row<T>(p, item, kv_head, row_begin - item.row_begin + r0 + r, t.staging + r * dims,
                      sum > 0 ? (t.m[r0 + r] + log2f(sum)) * kLn2 : -kInfinity);
      }
    }
  }
}

}  // namespace
}  // namespace sarathi
