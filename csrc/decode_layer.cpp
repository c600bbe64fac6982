// A decoder layer for one new token of every row in one call: what is left of the time is the kernels' own.
#include <vector>

#include "fitune_kernels.h"

namespace {

typedef uint16_t bits16;

// Pieces of one buffer that a thread keeps between calls.
class Room {
 public:
  bits16 *take(int64_t count) {
    int64_t at = used_;
    used_ += (count + 31) / 32 * 32;
    return base_ ? base_ + at : nullptr;
  }
  // Runs `body` twice: to count, and with memory.
  template <typename Body>
  void with(const Body &body) {
    base_ = nullptr, used_ = 0;
    body(false);
    if ((int64_t)kept_.size() < used_) kept_.resize(used_);
    base_ = kept_.data(), used_ = 0;
    body(true);
  }

 private:
  std::vector<bits16> kept_;
  bits16 *base_ = nullptr;
  int64_t used_ = 0;
};

struct Pass {
  const FituneKernels *kernels;
  const float *table;
  int threads;

  void norm(const FituneNorm &norm, const bits16 *x, int64_t rows, bits16 *out, float *rstd) const {
    kernels->rms_norm(x, norm.weight, FITUNE_BFLOAT16, rows, norm.width, (float)norm.eps, (float)norm.shift, out, rstd,
                      threads);
  }

  void product(const bits16 *x, int64_t m, int64_t k, const FituneSegment *segments, int64_t count) const {
    static thread_local std::vector<char> workspace;
    int64_t size = kernels->products->workspace_bytes(segments, count, m, k, 0, threads);
    if ((int64_t)workspace.size() < size) workspace.resize(size);
    kernels->products->forward(x, k, m, k, segments, count, table, workspace.data(), threads);
  }
};

// Queries or keys y [m, heads * d] -> `out`, normed and turned, in the layer's order.
const bits16 *placed(const Pass &pass, const FituneDecodeLayer &layer, int which, const bits16 *y, int64_t m,
                     int64_t heads, const float *cos, const float *sin, bits16 *out, bits16 *other, float *rstd) {
  const FituneNorm &norm = layer.head_norms[which];
  auto turn = [&](const bits16 *from, bits16 *to) {
    pass.kernels->rotate(from, FITUNE_BFLOAT16, m, heads, layer.d, layer.half, heads * layer.d, layer.d, cos, sin, 0,
                         to, pass.threads);
    return to;
  };
  if (layer.half && (layer.turned_first || !norm.weight)) y = turn(y, out);
  if (norm.weight) {
    bits16 *normed = y == out ? other : out;
    pass.norm(norm, y, m * heads * layer.d / norm.width, normed, rstd);
    y = normed;
    if (layer.half && !layer.turned_first) y = turn(y, y == out ? other : out);
  }
  return y;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fitune_decode_layer(
    const FituneKernels *kernels, const FituneDecodeLayer *of, const uint16_t *x, int64_t m, const float *cos,
    const float *sin, const int64_t *columns, int64_t shared, const float *table, uint16_t *out, int threads) {
  static thread_local Room room;
  static thread_local std::vector<float> rstd;
  const FituneDecodeLayer &layer = *of;
  const Pass pass{kernels, table, threads};
  const int64_t c = layer.c, q = layer.heads * layer.d, k = layer.kv_heads * layer.d, f = layer.f;
  if (m <= 0) return;
  rstd.resize(m * (layer.heads > layer.kv_heads ? layer.heads : layer.kv_heads));
  room.with([&](bool real) {
    bits16 *inner = room.take(m * c), *half = room.take(m * c), *turned_q = room.take(m * q);
    bits16 *turned_k = room.take(m * k), *other_q = room.take(m * q), *other_k = room.take(m * k);
    bits16 *attended = room.take(m * q), *gated = room.take(m * f), *after = room.take(m * c);
    if (!real) return;
    // x + residual * after(part(before(x))), for the attention and for the MLP
    auto before = [&](int place, const bits16 *from) {
      if (!layer.norms[place].weight) return from;
      pass.norm(layer.norms[place], from, m, inner, rstd.data());
      return (const bits16 *)inner;
    };
    auto add = [&](int place, const bits16 *stream, const bits16 *part, bits16 *to) {
      if (layer.norms[place].weight) {
        pass.norm(layer.norms[place], part, m, after, rstd.data());
        part = after;
      }
      kernels->add_scaled(stream, part, FITUNE_BFLOAT16, m * c, (float)layer.residual, to, threads);
    };

    pass.product(before(0, x), m, c, layer.inputs, 3);
    const bits16 *queries = placed(pass, layer, 0, layer.inputs[0].y, m, layer.heads, cos, sin, turned_q, other_q,
                                   rstd.data());
    const bits16 *keys = placed(pass, layer, 1, layer.inputs[1].y, m, layer.kv_heads, cos, sin, turned_k, other_k,
                                rstd.data());
    kernels->slot_attention(queries, keys, layer.inputs[2].y, FITUNE_BFLOAT16, m, layer.heads, layer.kv_heads, layer.d,
                            layer.keys, layer.values, layer.capacity, columns, shared, layer.window,
                            (float)layer.scale, (float)layer.cap, attended, threads);
    pass.product(attended, m, q, layer.output, 1);
    add(1, x, layer.output->y, half);

    pass.product(before(2, half), m, c, layer.branches, 2);
    kernels->gated_activation(layer.branches[0].y, layer.branches[1].y, FITUNE_BFLOAT16, (int)layer.activation, m * f,
                              gated, threads);
    pass.product(gated, m, f, layer.down, 1);
    add(3, half, layer.down->y, out);
  });
}
