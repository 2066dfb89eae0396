// The tile kernel's two products on AMX: tiles of 16 rows x 64 bytes, C[16, 16] += A[16, 32] B[32, 16] in bfloat16.
//
//     S^T[key, row] = K[key, :] Q^T        A: 16 keys as they lie in a page      B: the packed query panel, as for vdpbf16ps
//     O^T[d, row]  += V^T[d, :] P^T        A: a block of V, transposed once      B: P^T in key pairs, as softmax leaves it
//
// The instructions stand behind the wrappers below. SARATHI_AMX_EMULATED compiles these to plain loops, so that the kernel's own source
// runs in the tests on machines without AMX. It has NEVER run on hardware with AMX: none was at hand.
#pragma once
#include "simd.h"

namespace sarathi {
namespace {

template <class C> struct OnTiles { static constexpr bool value = false; };

#if defined(__AVX512BF16__)
struct AmxDot : Bf16Dot {};  // what is not a product is done as without AMX
template <> struct OnTiles<AmxDot> { static constexpr bool value = true; };
#endif

constexpr int kTile = 16;                    // rows of a tile, and its columns of 4 bytes
constexpr int kTileKeys = 2 * kTile;         // keys in a step of O += V P, dims in a step of S = K Q
constexpr int kTileA = 3, kTileB = 4;        // registers: sums 0 to 2, A, B 4 to 6: one for each vector of rows

#if defined(SARATHI_AMX_EMULATED)

thread_local uint32_t emulated_tiles[8][kTile][kTile];

SARATHI_INLINE void tiles_begin() {}
SARATHI_INLINE void tiles_end() {}
template <int T> SARATHI_INLINE void tile_zero() { std::memset(emulated_tiles[T], 0, sizeof emulated_tiles[T]); }
template <int T> SARATHI_INLINE void tile_load(const void* from, int64_t stride) {
  for (int i = 0; i < kTile; ++i) std::memcpy(emulated_tiles[T][i], static_cast<const char*>(from) + i * stride, 64);
}
template <int T> SARATHI_INLINE void tile_store(void* to, int64_t stride) {
  for (int i = 0; i < kTile; ++i) std::memcpy(static_cast<char*>(to) + i * stride, emulated_tiles[T][i], 64);
}
template <int Sum, int A, int B> SARATHI_INLINE void tile_dot() {
  for (int m = 0; m < kTile; ++m)
    for (int n = 0; n < kTile; ++n) {
      float sum = bit_cast<float>(emulated_tiles[Sum][m][n]);
      for (int k = 0; k < kTile; ++k) {
        const uint32_t a = emulated_tiles[A][m][k], b = emulated_tiles[B][k][n];
        sum += bit_cast<float>(a << 16) * bit_cast<float>(b << 16);
        sum += bit_cast<float>(a & 0xffff0000u) * bit_cast<float>(b & 0xffff0000u);
      }
      emulated_tiles[Sum][m][n] = bit_cast<uint32_t>(sum);
    }
}

#else

SARATHI_INLINE void tiles_begin() {
  struct alignas(64) { uint8_t palette = 1, start_row = 0, reserved[14] = {}; uint16_t row_bytes[16] = {}; uint8_t rows[16] = {}; } config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTile;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
SARATHI_INLINE void tiles_end() { asm volatile("tilerelease"); }
template <int T> SARATHI_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> SARATHI_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> SARATHI_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int Sum, int A, int B> SARATHI_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

#endif

// The same for each of RV vectors of rows; registers are part of the instruction, so there is no loop over them.
template <int RV> SARATHI_INLINE void sums_zero() {
  tile_zero<0>();
  if constexpr (RV > 1) tile_zero<1>();
  if constexpr (RV > 2) tile_zero<2>();
}
template <int RV> SARATHI_INLINE void sums_load(const float* from, int64_t stride) {
  tile_load<0>(from, stride);
  if constexpr (RV > 1) tile_load<1>(from + kTile, stride);
  if constexpr (RV > 2) tile_load<2>(from + 2 * kTile, stride);
}
template <int RV> SARATHI_INLINE void sums_store(float* to, int64_t stride) {
  tile_store<0>(to, stride);
  if constexpr (RV > 1) tile_store<1>(to + kTile, stride);
  if constexpr (RV > 2) tile_store<2>(to + 2 * kTile, stride);
}
// sums += A B, A in its register, B's rows at `b`.
template <int RV> SARATHI_INLINE void sums_dot(const uint32_t* b, int64_t stride) {
  tile_load<kTileB>(b, stride), tile_dot<0, kTileA, kTileB>();
  if constexpr (RV > 1) tile_load<kTileB + 1>(b + kTile, stride), tile_dot<1, kTileA, kTileB + 1>();
  if constexpr (RV > 2) tile_load<kTileB + 2>(b + 2 * kTile, stride), tile_dot<2, kTileA, kTileB + 2>();
}

// s[key][row] for whole tiles of keys; `staging` takes 16 keys that do not lie at equal distances.
template <int RV, class Ahead>
void tile_scores(const uint32_t* const* k, int32_t keys, const uint32_t* q, int32_t depth, float* s, uint32_t* staging, Ahead& ahead) {
  constexpr int64_t stride = RV * kTile * sizeof(float);
  for (int32_t key = 0; key < keys; key += kTile) {
    const char* rows = reinterpret_cast<const char*>(k[key]);
    int64_t step = reinterpret_cast<const char*>(k[key + 1]) - rows;
    bool even = true;
    for (int i = 2; i < kTile; ++i) even &= reinterpret_cast<const char*>(k[key + i]) == rows + i * step;
    if (!even) {
      for (int i = 0; i < kTile; ++i) std::memcpy(staging + i * depth, k[key + i], depth * sizeof(uint32_t));
      rows = reinterpret_cast<const char*>(staging), step = depth * sizeof(uint32_t);
    }
    sums_zero<RV>();
    for (int32_t d = 0; d < depth; d += kTile) {
      tile_load<kTileA>(rows + d * sizeof(uint32_t), step);
      ahead.step();
      sums_dot<RV>(q + d * RV * kTile, stride);
    }
    sums_store<RV>(s + key * RV * kTile, stride);
  }
}

// o[d][row] += sum over key pairs j of v[d][j] * pt[j][row]; v: [dims / 16][v_steps][16 dims][16 pairs], from tile_transpose.
template <int RV>
void tile_accumulate(const uint32_t* v, int32_t v_steps, const uint32_t* pt, int32_t steps, int32_t head_dim, const float* alpha, bool first,
                     bool rescale, float* o) {
  constexpr int64_t stride = RV * kTile * sizeof(float);
  if (rescale && !first)
    for (int32_t d = 0; d < head_dim; ++d)
      for (int r = 0; r < RV; ++r) store(o + (d * RV + r) * kLanes, mul(load(o + (d * RV + r) * kLanes), load(alpha + r * kLanes)));
  for (int32_t d = 0; d < head_dim; d += kTile) {
    if (first) sums_zero<RV>();
    else sums_load<RV>(o + d * RV * kTile, stride);
    for (int32_t j = 0; j < steps; ++j) {
      tile_load<kTileA>(v + (d / kTile * v_steps + j) * kTile * kTile, 64);
      sums_dot<RV>(pt + j * kTile * RV * kTile, stride);
    }
    sums_store<RV>(o + d * RV * kTile, stride);
  }
}

// From pack_v's [dims / 16][pairs][16 dims] to the layout above, in place: v_steps * 16 pairs, those beyond `pairs` zeros.
SARATHI_INLINE void tile_transpose(uint32_t* v, int32_t pairs, int32_t v_steps, int32_t head_dim, float* staging) {
  for (int32_t d = head_dim - kTile; d >= 0; d -= kTile) {  // from the end: the result is the wider
    uint32_t* to = v + d * v_steps * kTile;
    std::memmove(to, v + d * pairs, pairs * kTile * sizeof(uint32_t));
    std::memset(to + pairs * kTile, 0, (v_steps * kTile - pairs) * kTile * sizeof(uint32_t));
    for (int32_t j = 0; j < v_steps; ++j, to += kTile * kTile) {
      transpose(reinterpret_cast<const float*>(to), kTile, staging, kTile);
      std::memcpy(to, staging, kTile * kTile * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace sarathi
