// Linear layers of the engine's step, for CPUs with AVX512_VNNI and AVX512_BF16: y = epilogue(prepare(x) W^T).
//   prepare: RMSNorm or nothing, then int8 per row (scale = max|x| / 127) or bfloat16
//   weights: packed once, [N / 32][K / depth][32][depth], depth 4 for int8 (stored + 128, one scale per output), 2 for bfloat16
#pragma once
#include <cstddef>
#include <cstdint>

namespace sarathi::cpu {

enum class Epilogue : int32_t { kStore = 0, kAdd = 1, kSwiGlu = 2, kFloat = 3 };

struct LinearParams {
  const uint16_t* x;    // [rows, k] bfloat16, row stride x_stride
  const float* norm;    // [k], or null: no RMSNorm
  const uint8_t* w;     // packed, 64-byte aligned
  const float* w_scale; // [n] for int8, else null
  void* out;            // kStore, kAdd: [rows, n] bfloat16; kSwiGlu: [rows, n / 2] bfloat16; kFloat: [rows, n] float
  int64_t x_stride, out_stride;
  int32_t rows, n, k;   // n a multiple of 32, k of 16
  Epilogue epilogue;    // kSwiGlu: each 32 outputs are 16 gates and their 16 ups
  float eps;
};

// Whether this CPU and operating system can run them.
bool has_linear();
void linear(const LinearParams&, int threads);

// All rows as the tiles want them.
struct Panel {
  const char* values;  // [rows, k] int8 or bfloat16, at a stride of row_bytes
  int64_t row_bytes;
  float* scales;       // [rows], int8 only
  int32_t* sums;       // [rows], int8 only: 128 times the sum of the row's values
  bool in_place;       // x is as wanted already: nothing to prepare
};

namespace avx512vnni {
// Where the prepared rows will be; `scratch`: scratch_bytes(p), aligned to 64.
size_t scratch_bytes(const LinearParams&);
Panel panel_of(const LinearParams&, char* scratch);
void prepare(const LinearParams&, const Panel&, int32_t row_begin, int32_t row_end);
// Prepared rows [row_begin, row_end) by the 32 outputs of a block.
void multiply(const LinearParams&, const Panel&, int32_t row_begin, int32_t row_end, int32_t block);
}  // namespace avx512vnni

}  // namespace sarathi::cpu
