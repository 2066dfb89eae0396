#include "decoder.h"

#include <cstring>

#include "cpu.h"

namespace sarathi::cpu {
namespace {

void run(LinearParams& p, const DecoderLayer::Linear& layer, int threads) {
  p.norm = layer.norm, p.w = layer.w, p.w_scale = layer.w_scale;
  linear(p, threads);
}

// to[i] = from[rows[i]]. In place where rows ascend, for then rows[i] >= i.
template <class Index>
void gather(const uint16_t* from, int64_t width, const Index* rows, int32_t count, uint16_t* to) {
  for (int32_t i = 0; i < count; ++i) std::memmove(to + i * width, from + rows[i] * width, width * sizeof(uint16_t));
}

}  // namespace

void decoder(const DecoderParams& p, const DecoderOps& ops, int threads) {
  LinearParams qkv = ops.qkv, o = ops.o, gate_up = ops.gate_up, down = ops.down, head = ops.head;
  AppendKvParams append = ops.append;
  AttentionParams attention = ops.attention;
  uint16_t *const x = static_cast<uint16_t*>(down.out), *const attended = static_cast<uint16_t*>(attention.out);
  gather(p.embedding, p.hidden, p.ids, p.total_q, x);
  for (int32_t i = 0; i < p.num_layers; ++i) {
    const DecoderLayer& layer = p.layers[i];
    run(qkv, layer.qkv, threads);
    append.k_cache = layer.k_cache, append.v_cache = layer.v_cache;
    append_kv(append, threads);
    attention.k_cache = layer.k_cache, attention.v_cache = layer.v_cache;
    cpu::attention(attention, threads);
    if (i + 1 == p.num_layers) {
      gather(x, p.hidden, p.logit_rows, p.num_logits, x);
      gather(attended, o.k, p.logit_rows, p.num_logits, attended);
      o.rows = gate_up.rows = down.rows = head.rows = p.num_logits;
    }
    run(o, layer.o, threads);
    run(gate_up, layer.gate_up, threads);
    run(down, layer.down, threads);
  }
  linear(head, threads);
}

}  // namespace sarathi::cpu
