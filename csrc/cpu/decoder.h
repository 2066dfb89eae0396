// A decoder's step in one call, from token ids to logits: between two ops lie microseconds, not a return to Python.
//   x = embedding[ids]; per layer: qkv = linear(x), rotary and new keys into the cache, attention, x += linear(attended),
//   x += linear(swiglu(linear(x))); logits = linear(x)
#pragma once
#include "../params.h"
#include "linear.h"

namespace sarathi::cpu {

// What differs from layer to layer, as in sarathi_kernels/decoder.py.
struct DecoderLayer {
  struct Linear {
    const float* norm;
    const uint8_t* w;
    const float* w_scale;
  } qkv, o, gate_up, down;
  void *k_cache, *v_cache;
};
static_assert(sizeof(DecoderLayer) == 14 * sizeof(int64_t), "a row of the table that Python makes");

struct DecoderParams {
  const uint16_t* embedding;   // [vocab, hidden] bfloat16
  const int32_t* ids;          // [total_q]
  const int64_t* logit_rows;   // [num_logits]: rows of which logits are wanted; the last layer's MLP computes no others
  const DecoderLayer* layers;  // [num_layers]
  int32_t total_q, hidden, num_logits, num_layers;
};

// What the layers share: their ops' arguments, less the pointers that are DecoderLayer's.
struct DecoderOps {
  LinearParams qkv, o, gate_up, down, head;
  AppendKvParams append;
  AttentionParams attention;
};

void decoder(const DecoderParams&, const DecoderOps&, int threads);

}  // namespace sarathi::cpu
