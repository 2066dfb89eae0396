// Attention of a hybrid batch over a paged KV cache, for sm_80 and everything after it.
//
//     S = scale Q K^T        P = exp2(S - max)        O = P V / sum
//
// The hardware: per SM and clock, 2048 multiply-adds of mma.sync, 128 bytes of shared memory and about 10 bytes of HBM.
// Prefill tiles live on the first, decode tiles on the last. One persistent launch does both: two CTAs share an SM, one
// leading with prefill units and one with decode units (work.cuh), so that each hides behind the other.
//
// PTX through the wrappers of ptx.cuh, layouts from fragment.cuh (which says why not CuTe): the host simulator runs this
// very source.
#pragma once
#include "element.cuh"
#include "fragment.cuh"
#include "mask.cuh"
#include "paged_kv.cuh"
#include "ptx.cuh"
#include "softmax.cuh"
#include "work.cuh"

namespace sarathi::sm80 {

constexpr int kThreads = 128;
constexpr int kCtasPerSm = 2;
constexpr int kMaxSharedBytes = 81 * 1024;  // two CTAs in the 164 KiB of an A100's SM, 1 KiB of which each CTA pays itself

// One tile class: kWarpsM x kWarpsN warps, each with kRowFrags 16-row fragments and its share of every kKeys keys. K and V
// tiles pass alternately through a ring of kSlots slots of shared memory.
template <typename Element_, int kHeadDim_, int kWarpsM_, int kWarpsN_, int kRowFrags_, int kKeys_, int kSlots_>
struct Tile {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kRowFrags = kRowFrags_;
  static constexpr int kKeys = kKeys_, kSlots = kSlots_;
  static constexpr int kRows = kWarpsM * kRowFrags * 16;
  static constexpr int kKeysPerWarp = kKeys / kWarpsN;
  static constexpr int kKeyFrags = kKeysPerWarp / 8;    // accumulator fragments (8 columns) of S
  static constexpr int kDimFrags = kHeadDim / 8;        // and of O
  static constexpr int kChunks = kHeadDim / 8;          // 16-byte chunks of a row
  static constexpr int kSlotBytes = kKeys * kHeadDim * 2;
  // Shared memory: page rows of two tiles (also the CTA's notice board), Q, the ring; then, in place of Q and the ring,
  // the accumulators on their way out, each row padded to fall into other banks than the next.
  static constexpr int kPagedRowBytes = 2 * kKeys * 8;
  static constexpr int kQBytes = kRows * kHeadDim * 2;
  static constexpr int kScratchPitch = kHeadDim + 8;  // floats
  static constexpr int kScratchRows = kWarpsN * kRows;
  static constexpr int kScratchBytes = kScratchRows * (kScratchPitch * 4 + 8);
  static constexpr int kRingBytes = kQBytes + kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kPagedRowBytes + (kRingBytes > kScratchBytes ? kRingBytes : kScratchBytes);
  static_assert(kWarpsM * kWarpsN * 32 == kThreads);
  static_assert(kKeysPerWarp % 16 == 0, "PV takes keys by sixteens");
  static_assert(kKeysPerWarp <= 64, "a row's mask is one word");
  static_assert(kThreads % kChunks == 0 && kKeys % (kThreads / kChunks) == 0 && kRows % (kThreads / kChunks) == 0);
  static_assert(kSlots >= 2 && kSlots <= 4, "page rows of two tiles are kept");
  static_assert(kPagedRowBytes % 512 == 0 && kQBytes % 512 == 0, "rows must not straddle what the swizzle flips");
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// The tile classes of every head_dim. Prefill: four warps over the rows; 32 rows each where the registers allow, because
// then one fragment of K or V serves two mma and shared memory is not the limit. Decode: 16 rows, the warps share the keys.
template <typename Element, int kHeadDim>
struct Tiles;
template <typename Element>
struct Tiles<Element, 64> {
  using Prefill = Tile<Element, 64, 4, 1, 2, 64, 4>;
  using Decode = Tile<Element, 64, 1, 4, 1, 128, 4>;
};
template <typename Element>
struct Tiles<Element, 128> {
  using Prefill = Tile<Element, 128, 4, 1, 2, 64, 3>;
  using Decode = Tile<Element, 128, 1, 4, 1, 64, 4>;
};
template <typename Element>
struct Tiles<Element, 256> {
  using Prefill = Tile<Element, 256, 4, 1, 1, 32, 3>;
  using Decode = Tile<Element, 256, 1, 4, 1, 64, 2>;
};

template <typename Element, int kHeadDim>
constexpr int shared_bytes() {
  using T = Tiles<Element, kHeadDim>;
  return T::Prefill::kSharedBytes > T::Decode::kSharedBytes ? T::Prefill::kSharedBytes : T::Decode::kSharedBytes;
}

// ---- one (work item, kv head) ----

// The same value, of unknown origin: what is computed from it stays where it is written instead of moving out of the loop
// and into registers that the accumulators need.
__device__ __forceinline__ int opaque(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

__device__ __forceinline__ void normalize(float (&sums)[8], const SoftmaxState& state) {
  const float factor = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) sums[e] *= factor;
}

// Eight elements of a finished row, and with the first of them the row's lse.
template <typename Element>
__device__ __forceinline__ void store_output(const AttentionParams& p, int64_t token, int head, int chunk, float (&sums)[8],
                                             const SoftmaxState& state) {
  normalize(sums, state);
  Element* to = static_cast<Element*>(p.out) + token * p.out_stride_token + head * p.out_stride_head + chunk * 8;
  ptx::st_global(reinterpret_cast<uint4*>(to), make_uint4(pack<Element>(sums[0], sums[1]), pack<Element>(sums[2], sums[3]),
                                                          pack<Element>(sums[4], sums[5]), pack<Element>(sums[6], sums[7])));
  if (chunk == 0 && p.lse) ptx::st_global(p.lse + token * p.num_q_heads + head, natural_lse(state));
}

template <typename Tile>
struct UnitRun {
  using Element = typename Tile::Element;
  static constexpr int kHeadDim = Tile::kHeadDim, kRowBytes = 2 * kHeadDim, kRowsPerPass = kThreads / Tile::kChunks;

  const AttentionParams& p;
  const WorkItem& item;  // in global memory: what is rarely used is read again rather than kept in a register
  const int kv_head, group;
  char* const shared;
  const int kv_begin = item.kv_begin, kv_end = item.kv_end;
  const int thread = threadIdx.x, lane = threadIdx.x % 32;
  const int load_row = threadIdx.x / Tile::kChunks, load_chunk = threadIdx.x % Tile::kChunks;  // of the first pass of a load
  const int warp_m = threadIdx.x / 32 % Tile::kWarpsM, warp_n = threadIdx.x / 32 / Tile::kWarpsM;
  const int num_tiles = ceil_div(kv_end - kv_begin, Tile::kKeys);

  __device__ __forceinline__ PagedRow* paged_rows(int tile) const {
    return reinterpret_cast<PagedRow*>(shared) + tile % 2 * Tile::kKeys;
  }
  // Shared-window addresses of Q and of a slot of the ring.
  __device__ __forceinline__ uint32_t q_tile() const { return ptx::shared_address(shared) + Tile::kPagedRowBytes; }
  __device__ __forceinline__ uint32_t slot(int index) const { return q_tile() + Tile::kQBytes + index * Tile::kSlotBytes; }

  __device__ __forceinline__ int key_of(int tile, int row) const { return kv_begin + tile * Tile::kKeys + row; }

  // Page and slot of key `row` of a tile. Keys past the range stand in for themselves with page 0: nothing of it is read.
  __device__ __forceinline__ PagedRow find(int tile, int row) const {
    const int key = key_of(tile, row);
    if (key >= kv_end) return {0, 0};
    return locate(p.block_table + item.request * p.block_table_stride, p.page_size, key);
  }

  // Page rows of a tile to come: read from the block table before a product, kept in shared memory after it, in the place
  // of the tile two before, whose loads have all been started.
  using FetchedRows = PagedRow[ceil_div(Tile::kKeys, kThreads)];
  __device__ __forceinline__ void fetch(int tile, FetchedRows& rows) const {
#pragma unroll
    for (int i = 0; i < ceil_div(Tile::kKeys, kThreads); ++i)
      if (thread + i * kThreads < Tile::kKeys) rows[i] = find(tile, thread + i * kThreads);
  }
  __device__ __forceinline__ void keep(int tile, const FetchedRows& rows) const {
#pragma unroll
    for (int i = 0; i < ceil_div(Tile::kKeys, kThreads); ++i)
      if (thread + i * kThreads < Tile::kKeys) ptx::st_shared(paged_rows(tile) + thread + i * kThreads, rows[i]);
  }

  __device__ __forceinline__ void load_q() const {
    const Element* q = static_cast<const Element*>(p.q);
#pragma unroll
    for (int pass = 0; pass < Tile::kRows / kRowsPerPass; ++pass) {
      const int row = load_row + pass * kRowsPerPass;
      const bool used = row < item.row_count;
      const RowPlace place = place_of(item.row_begin + (used ? row : 0), group);
      const Element* source = q + (item.q_begin + place.token) * p.q_stride_token +
                              (kv_head * group + place.head_in_group) * p.q_stride_head + load_chunk * 8;
      ptx::cp_async_16(q_tile() + swizzled<kHeadDim>(row, load_chunk), source, used ? 16 : 0);
    }
  }

  // Starts the load of K (kIsV = false) or V of a tile into a slot. Keys past the range become zeros: they are masked, but
  // 0 * NaN of a stale V row would not be.
  template <bool kIsV>
  __device__ __forceinline__ void load_tile(int tile, int slot_index) const {
    if (tile >= num_tiles) return;
    const Element* base = static_cast<const Element*>(kIsV ? p.v_cache : p.k_cache) +
                          opaque(kv_head) * (kIsV ? p.v_stride_head : p.k_stride_head);
    const int64_t stride_page = kIsV ? p.v_stride_page : p.k_stride_page;
    const int64_t stride_slot = kIsV ? p.v_stride_slot : p.k_stride_slot;
    const PagedRow* rows = paged_rows(tile);
    const uint32_t to = slot(slot_index);
    const int first_row = opaque(load_row);
#pragma unroll
    for (int pass = 0; pass < Tile::kKeys / kRowsPerPass; ++pass) {
      const int row = first_row + pass * kRowsPerPass;
      const Element* source = base + row_offset(ptx::ld_shared(&rows[row]), stride_page, stride_slot) + load_chunk * 8;
      ptx::cp_async_16(to + swizzled<kHeadDim>(row, load_chunk), source, key_of(tile, row) < kv_end ? 16 : 0);
    }
  }

  using Scores = float[Tile::kRowFrags][Tile::kKeyFrags][4];
  using Weights = uint32_t[Tile::kRowFrags][Tile::kKeyFrags][2];  // scores after the softmax, in pairs: the A operand of PV
  using Output = float[Tile::kRowFrags][Tile::kDimFrags][4];

  // S = Q K^T of this warp's rows and keys.
  __device__ __forceinline__ void multiply_qk(uint32_t k_tile, Scores& scores) const {
    const uint32_t q = q_tile() + swizzled<kHeadDim>(warp_m * Tile::kRowFrags * 16 + a_address(lane).row, a_address(lane).chunk);
    const uint32_t k = k_tile + swizzled<kHeadDim>(warp_n * Tile::kKeysPerWarp + b_address(lane).row, b_address(lane).chunk);
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int j = 0; j < Tile::kKeyFrags; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[f][j][e] = 0.0f;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t a[Tile::kRowFrags][4];
#pragma unroll
      for (int f = 0; f < Tile::kRowFrags; ++f)
        ptx::ldmatrix_x4(a[f], (q ^ 32 * d) + f * 16 * kRowBytes);
#pragma unroll
      for (int j = 0; j < Tile::kKeyFrags; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, (k ^ 32 * d) + j * 8 * kRowBytes);
#pragma unroll
        for (int f = 0; f < Tile::kRowFrags; ++f) {
          ptx::mma_m16n8k16<Element>(scores[f][j], a[f], b[0], b[1]);
          ptx::mma_m16n8k16<Element>(scores[f][j + 1], a[f], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void pack_weights(const Scores& scores, Weights& weights) const {
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int j = 0; j < Tile::kKeyFrags; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) weights[f][j][h] = pack<Element>(scores[f][j][2 * h], scores[f][j][2 * h + 1]);
  }

  // O += P V over this warp's keys.
  __device__ __forceinline__ void multiply_pv(uint32_t v_tile, const Weights& weights, Output& out) const {
    const ChunkPlace from = b_trans_address(lane);
    const uint32_t v = v_tile + swizzled<kHeadDim>(warp_n * Tile::kKeysPerWarp + from.row, from.chunk);
#pragma unroll
    for (int j = 0; j < Tile::kKeyFrags; j += 2) {
#pragma unroll
      for (int d = 0; d < Tile::kDimFrags; d += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, (v ^ 16 * d) + j * 8 * kRowBytes);
#pragma unroll
        for (int f = 0; f < Tile::kRowFrags; ++f) {
          const uint32_t a[4] = {weights[f][j][0], weights[f][j][1], weights[f][j + 1][0], weights[f][j + 1][1]};
          ptx::mma_m16n8k16<Element>(out[f][d], a, b[0], b[1]);
          ptx::mma_m16n8k16<Element>(out[f][d + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // Row of the tile that half r of this lane's accumulators belongs to.
  __device__ __forceinline__ int row_of(int r) const {
    return (warp_m * Tile::kRowFrags + r / 2) * 16 + accumulator_row(lane, r % 2);
  }
  __device__ __forceinline__ int token_of(int row) const { return place_of(item.row_begin + row, group).token; }

  __device__ __forceinline__ void mask(int tile, Scores& scores) const {
    const int first_key = key_of(tile, warp_n * Tile::kKeysPerWarp) + accumulator_column(lane);
#pragma unroll
    for (int r = 0; r < 2 * Tile::kRowFrags; ++r) {
      // Rows past the end of the tile are computed like the last one and thrown away.
      const int row = row_of(r);
      const int token = place_of(item.row_begin + (row < item.row_count ? row : item.row_count - 1), opaque(group)).token;
      const uint64_t tree = p.tree_mask ? tree_bits(p.tree_mask[item.q_begin + token], first_key, item.kv_len - item.q_len) : ~0ull;
      const uint64_t seen = visible_bits(visible_span(p, item, token), tree, first_key);
#pragma unroll
      for (int j = 0; j < Tile::kKeyFrags; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if ((seen >> (j * 8 + e) & 1) == 0) scores[r / 2][j][r % 2 * 2 + e] = -INFINITY;
    }
  }

  // Accumulators and softmax states to shared memory, [kWarpsN][kRows] rows of kScratchPitch floats, states behind them.
  __device__ __forceinline__ float* scratch() const { return reinterpret_cast<float*>(shared + Tile::kPagedRowBytes); }
  __device__ __forceinline__ SoftmaxState* scratch_states() const {
    return reinterpret_cast<SoftmaxState*>(scratch() + Tile::kScratchRows * Tile::kScratchPitch);
  }

  __device__ __forceinline__ void stage(const Output& out, const OnlineSoftmax<Tile::kRowFrags>& softmax) const {
#pragma unroll
    for (int r = 0; r < 2 * Tile::kRowFrags; ++r) {
      const int row = warp_n * Tile::kRows + row_of(r);
#pragma unroll
      for (int d = 0; d < Tile::kDimFrags; ++d)
        ptx::st_shared(reinterpret_cast<float2*>(scratch() + row * Tile::kScratchPitch + d * 8 + accumulator_column(lane)),
                       make_float2(out[r / 2][d][r % 2 * 2], out[r / 2][d][r % 2 * 2 + 1]));
      if (lane % 4 == 0) ptx::st_shared(scratch_states() + row, SoftmaxState{softmax.max[r], softmax.sum[r]});
    }
  }

  // Joins what the warps of each row found, and the sink, and writes rows of eight elements a thread: the final output, or
  // this split's part of it.
  __device__ __forceinline__ void write() const {
    for (int row = load_row; row < item.row_count; row += kRowsPerPass) {
      const int chunk = load_chunk;
      const RowPlace place = place_of(item.row_begin + row, group);
      const int head = kv_head * group + place.head_in_group;
      const bool split = item.partial_row >= 0;
      const float sink = p.sinks && !split ? p.sinks[head] * kLog2E : -INFINITY;
      SoftmaxState state{sink, 0.0f};
#pragma unroll
      for (int w = 0; w < Tile::kWarpsN; ++w)
        state.max = fmaxf(state.max, ptx::ld_shared(scratch_states() + w * Tile::kRows + row).max);
      state.sum = rebase(sink, state.max);
      float sums[8] = {};
#pragma unroll
      for (int w = 0; w < Tile::kWarpsN; ++w) {
        const SoftmaxState part = ptx::ld_shared(scratch_states() + w * Tile::kRows + row);
        const float weight = rebase(part.max, state.max);
        state.sum += weight * part.sum;
        const auto* from = reinterpret_cast<const float4*>(scratch() + (w * Tile::kRows + row) * Tile::kScratchPitch + chunk * 8);
        // Chunks four apart share their banks, so every other four read their halves the other way round.
        const int flip = chunk / 4 % 2;
        const float4 first = ptx::ld_shared(from + flip), second = ptx::ld_shared(from + 1 - flip);
        const float4 low = flip ? second : first, high = flip ? first : second;
        const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[e] += weight * x[e];
      }
      if (split) {
        normalize(sums, state);
        const int64_t index = partial_index(item.partial_row + row, p.num_kv_heads, kv_head, kHeadDim);
        auto* to = reinterpret_cast<float4*>(p.partial_out + index + chunk * 8);
        ptx::st_global(to, make_float4(sums[0], sums[1], sums[2], sums[3]));
        ptx::st_global(to + 1, make_float4(sums[4], sums[5], sums[6], sums[7]));
        if (chunk == 0) ptx::st_global(p.partial_lse + index / kHeadDim, natural_lse(state));
      } else {
        store_output<Element>(p, item.q_begin + place.token, head, chunk, sums, state);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    // Page rows of the first two tiles; then Q with the first K, and all but one slot of the ring. Every wait below counts
    // groups, so each step commits one, empty or not.
#pragma unroll
    for (int row = thread; row < 2 * Tile::kKeys; row += kThreads) ptx::st_shared(paged_rows(0) + row, find(0, row));
    __syncthreads();
    load_q();
#pragma unroll
    for (int step = 0; step < Tile::kSlots - 1; ++step) {
      load_step(step, step);
      ptx::cp_async_commit();
    }

    OnlineSoftmax<Tile::kRowFrags> softmax;
    softmax.init();
    Output out;
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int d = 0; d < Tile::kDimFrags; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[f][d][e] = 0.0f;
    // Warps without a row (a short chunk, the last tile of a long one) load with the others and leave the math to them.
    if (warp_m * Tile::kRowFrags * 16 < item.row_count) consume<true>(out, softmax);
    else consume<false>(out, softmax);

    softmax.finish();
    ptx::cp_async_wait<0>();  // of Q, when there was no key to wait for
    __syncthreads();          // the ring is read no more
    stage(out, softmax);
    __syncthreads();
    write();
  }

  // All keys of the item, tile by tile.
  template <bool kCompute>
  __device__ __forceinline__ void consume(Output& out, OnlineSoftmax<Tile::kRowFrags>& softmax) const {
    // A softcap is applied before the mask and the maximum, and a scale that is not positive would turn the maximum into
    // a minimum: both go into the scores themselves. Otherwise the scale rides along in the exponent's multiply-add.
    const bool transform = p.softcap > 0.0f || p.softmax_scale <= 0.0f;
    const float scale = p.softcap > 0.0f ? p.softmax_scale / p.softcap : transform ? p.softmax_scale : p.softmax_scale * kLog2E;
    const KeySpan clear = clear_span(p, item, token_of(0), token_of(item.row_count - 1));
    int ring = 0;  // slot of the current step
    for (int tile = 0; tile < num_tiles; ++tile) {
      constexpr bool kFetchWithK = Tile::kSlots % 2 == 0;
      const int fetched_tile = tile + (Tile::kSlots + 1) / 2;
      FetchedRows fetched;

      Scores scores;
      Weights weights;
      advance(2 * tile, ring);
      if (kFetchWithK) fetch(fetched_tile, fetched);
      if constexpr (kCompute) multiply_qk(slot(ring), scores);
      if (kFetchWithK) keep(fetched_tile, fetched);
      ring = ring + 1 == Tile::kSlots ? 0 : ring + 1;
      if constexpr (kCompute) {
        if (transform) transform_scores(scores, scale);
        if (key_of(tile, 0) < clear.begin || key_of(tile, Tile::kKeys) > clear.end) mask(tile, scores);
        softmax.update(scores, out, transform ? 1.0f : scale);
        pack_weights(scores, weights);
      }

      advance(2 * tile + 1, ring);
      if (!kFetchWithK) fetch(fetched_tile, fetched);
      if constexpr (kCompute) multiply_pv(slot(ring), weights, out);
      if (!kFetchWithK) keep(fetched_tile, fetched);
      ring = ring + 1 == Tile::kSlots ? 0 : ring + 1;
    }
  }

  __device__ __forceinline__ void transform_scores(Scores& scores, float scale) const {
#pragma unroll
    for (int f = 0; f < Tile::kRowFrags; ++f)
#pragma unroll
      for (int j = 0; j < Tile::kKeyFrags; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float s = scores[f][j][e] * scale;
          scores[f][j][e] = kLog2E * (p.softcap > 0.0f ? p.softcap * tanh_ex2(s) : s);
        }
  }

  // Step 2 t loads K of tile t, step 2 t + 1 its V.
  __device__ __forceinline__ void load_step(int step, int slot_index) const {
    if (step % 2 == 0) load_tile<false>(step / 2, slot_index);
    else load_tile<true>(step / 2, slot_index);
  }

  // Waits until the step's slot is there for all threads, which also says that all are done with the slot of the step
  // before: the ring's furthest step goes into it.
  __device__ __forceinline__ void advance(int step, int ring) const {
    ptx::cp_async_wait<Tile::kSlots - 2>();
    __syncthreads();
    load_step(step + Tile::kSlots - 1, ring == 0 ? Tile::kSlots - 1 : ring - 1);
    ptx::cp_async_commit();
  }
};

// ---- the launch: units from the queue until there are none ----

// Splits of one tile, one kv head, into the output, in split order. Every thread of the last CTA to finish one comes here.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void merge_splits(const AttentionParams& p, const MergeItem& merge, int kv_head) {
  constexpr int kChunks = kHeadDim / 8;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t split_stride = partial_index(merge.row_count, p.num_kv_heads, 0, kHeadDim);
  const int chunk = threadIdx.x % kChunks;
  for (int row = threadIdx.x / kChunks; row < merge.row_count; row += kThreads / kChunks) {
    const RowPlace place = place_of(merge.row_begin + row, group);
    const int head = kv_head * group + place.head_in_group;
    const int64_t first = partial_index(merge.partial_row + row, p.num_kv_heads, kv_head, kHeadDim);
    const float* lses = p.partial_lse + first / kHeadDim;
    const float* outs = p.partial_out + first + chunk * 8;
    const float sink = p.sinks ? p.sinks[head] * kLog2E : -INFINITY;
    SoftmaxState state{sink, 0.0f};
    for (int s = 0; s < merge.num_splits; ++s)
      state.max = fmaxf(state.max, ptx::ld_global(lses + s * (split_stride / kHeadDim)) * kLog2E);
    state.sum = rebase(sink, state.max);
    float sums[8] = {};
#pragma unroll 4
    for (int s = 0; s < merge.num_splits; ++s) {
      const float weight = rebase(ptx::ld_global(lses + s * (split_stride / kHeadDim)) * kLog2E, state.max);
      const auto* from = reinterpret_cast<const float4*>(outs + s * split_stride);
      const float4 low = ptx::ld_global(from), high = ptx::ld_global(from + 1);
      const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      state.sum += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[e] += weight * x[e];
    }
    store_output<Element>(p, merge.q_begin + place.token, head, chunk, sums, state);
  }
}

// The queue's counters: prefill units taken, decode units taken, CTAs that have left.
__device__ __forceinline__ int32_t* queue_of(const AttentionParams& p) {
  return p.counters + p.counts->num_merges * p.num_kv_heads;
}

// Takes one unit of the class this CTA should do next, or of the other when that one is used up. item -1: none is left.
__device__ __forceinline__ Unit draw(const AttentionParams& p) {
  const PlanCounts counts = *p.counts;
  int32_t* const cursors = queue_of(p);
  QueueState q{ptx::ld_volatile(cursors), counts.num_prefill_items * p.num_kv_heads, ptx::ld_volatile(cursors + 1),
               (counts.num_items - counts.num_prefill_items) * p.num_kv_heads};
  bool decode = takes_decode(role_of(blockIdx.x, gridDim.x, ptx::smid()), q);
  for (int attempt = 0; attempt < 2; ++attempt, decode = !decode) {
    if ((decode ? q.decode_taken : q.prefill_taken) >= (decode ? q.decode_total : q.prefill_total)) continue;
    const int32_t index = ptx::atomic_add(cursors + (decode ? 1 : 0), 1);
    if (index < (decode ? q.decode_total : q.prefill_total))
      return decode ? unit_at(index, counts.num_prefill_items, counts.num_items - counts.num_prefill_items, p.num_kv_heads, 1)
                    : unit_at(index, 0, counts.num_prefill_items, p.num_kv_heads, kAdjacentPrefillTiles);
  }
  return {-1, 0};
}

// The device planner found its tables too small and nobody could be told: every row becomes NaN rather than stale.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void write_nan(const AttentionParams& p) {
  constexpr int kChunks = kHeadDim / 8;
  const int rows = gridDim.x * (kThreads / kChunks);
  const int64_t all_rows = static_cast<int64_t>(p.total_q) * p.num_q_heads;
  float nan[8];
#pragma unroll
  for (float& x : nan) x = NAN;
  for (int64_t row = blockIdx.x * (kThreads / kChunks) + threadIdx.x / kChunks; row < all_rows; row += rows)
    store_output<Element>(p, row / p.num_q_heads, static_cast<int>(row % p.num_q_heads), threadIdx.x % kChunks, nan, {NAN, 1.0f});
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) attention_kernel(const __grid_constant__ AttentionParams p) {
  if (p.counts->num_items < 0) {
    write_nan<Element, kHeadDim>(p);
    return;
  }
  char* shared = ptx::dynamic_smem<char>();
  auto* board = reinterpret_cast<Unit*>(shared);
  const int group = p.num_q_heads / p.num_kv_heads;
  while (true) {
    if (threadIdx.x == 0) ptx::st_shared(board, draw(p));
    __syncthreads();
    const Unit unit = ptx::ld_shared(board);
    __syncthreads();  // the board is used again
    if (unit.item < 0) break;
    const WorkItem& item = p.work_items[unit.item];
    if (item.tile_class == kPrefillTile)
      UnitRun<typename Tiles<Element, kHeadDim>::Prefill>{p, item, unit.kv_head, group, shared}.run();
    else
      UnitRun<typename Tiles<Element, kHeadDim>::Decode>{p, item, unit.kv_head, group, shared}.run();
    if (item.merge_index < 0) continue;

    // All threads have written their part of the split; the barrier and the release make it visible with the arrival.
    const MergeItem merge = p.merge_items[item.merge_index];
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* arrived = p.counters + item.merge_index * p.num_kv_heads + unit.kv_head;
      const bool last = ptx::atomic_add_acq_rel(arrived, 1) == merge.num_splits - 1;
      if (last) ptx::st_global(arrived, 0);
      ptx::st_shared(&board->item, last ? 1 : 0);
    }
    __syncthreads();
    if (ptx::ld_shared(&board->item)) merge_splits<Element, kHeadDim>(p, merge, unit.kv_head);
    __syncthreads();
  }
  // The last CTA to leave winds the queue back for the next launch.
  int32_t* const queue = queue_of(p);
  if (threadIdx.x == 0 && ptx::atomic_add_acq_rel(queue + 2, 1) == static_cast<int>(gridDim.x) - 1)
    for (int i = 0; i < 3; ++i) ptx::st_global(queue + i, 0);
}

}  // namespace sarathi::sm80
