// Products of frozen weights with their adapters, in bfloat16 and in 8-bit integers, against sums in double precision.
#include "native_driver.h"

namespace {

const int B16 = FITUNE_BFLOAT16;
const float NF4[] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                     0.7229568362236023f, 1.0f};

struct Shape {
  int64_t m, k;
  std::vector<int64_t> widths, ranks;
  std::vector<bool> dense, biased;
  std::vector<int32_t> outliers;
  int64_t block;
};

// One layer's tensors, and its weight as it is decoded.
struct Layer {
  int64_t n, r, k;
  bool dense, biased;
  Operand weight, absmax, nested, bias, a, b, scales, columns;
  double offset;
  Doubles exact, narrow, a_values, b_values, bias_values, scale_values;  // exact: float32; narrow: bfloat16

  Layer(const Shape &s, size_t i, const Doubles &table, Random &random)
      : n(s.widths[i]), r(s.ranks[i]), k(s.k), dense(s.dense[i]), biased(s.biased[i]), offset(dense ? 0 : 0.037) {
    int64_t blocks = (n * k + 63) / 64;
    if (dense) {
      weight = real(B16, random.normals(n * k, 1 / sqrt((double)k)));
      exact = narrow = decode(B16, weight.bytes);
    } else {
      auto codes = random.bytes((n * k + 1) / 2), scales_of = random.bytes(blocks);
      Doubles outer = rounded(0, random.normals((blocks + 255) / 256, 0.01));
      weight = raw(codes), absmax = raw(scales_of), nested = real(0, outer);
      for (int64_t e = 0; e < n * k; e++) {
        int code = e % 2 ? codes[(size_t)(e / 2)] & 15 : codes[(size_t)(e / 2)] >> 4;
        float peak = (float)table[scales_of[(size_t)(e / 64)]] * (float)outer[(size_t)(e / 64 / 256)];
        peak = peak + (float)offset;
        exact.push_back(NF4[code] * peak);
        narrow.push_back(to_bfloat16(exact.back()));
      }
    }
    bias_values = rounded(B16, random.normals(n));
    a_values = rounded(B16, random.normals(r * k, 1 / sqrt((double)k)));
    b_values = rounded(B16, random.normals(n * r, 1 / sqrt((double)std::max<int64_t>(r, 1))));
    bias = real(B16, bias_values), a = real(B16, a_values), b = real(B16, b_values);
  }

  static const size_t OPERANDS = 8;
  void give(std::vector<Operand> &in) const {
    for (const Operand *o : {&weight, &absmax, &nested, &bias, &a, &b, &scales, &columns}) in.push_back(*o);
  }
  FituneSegment segment(char *const *in, char *y, int64_t stride, char *u) const {
    return {in[0], dense ? nullptr : (const uint8_t *)in[1], dense ? nullptr : (const float *)in[2], offset,
            biased ? (const uint16_t *)in[3] : nullptr, r ? (const uint16_t *)in[4] : nullptr,
            r ? (const uint16_t *)in[5] : nullptr, n, r, (uint16_t *)y, stride, r ? (uint16_t *)u : nullptr};
  }
};

// left [m, k] times right [n, k] transposed.
Doubles product(const Doubles &left, const Doubles &right, int64_t m, int64_t n, int64_t k) {
  Doubles made((size_t)(m * n));
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t p = 0; p < k; p++) made[(size_t)(i * n + j)] += left[(size_t)(i * k + p)] * right[(size_t)(j * k + p)];
  return made;
}

Doubles transposed(const Doubles &x, int64_t rows, int64_t columns) {
  Doubles made(x.size());
  for (int64_t i = 0; i < rows * columns; i++) made[(size_t)(i % columns * rows + i / columns)] = x[(size_t)i];
  return made;
}

Doubles sum(Doubles a, const Doubles &b) {
  for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
  return a;
}

// Rows with a gap between them, and back; the gaps must have stayed as they were.
Operand spread(int kind, const Doubles &x, int64_t m, int64_t n, int64_t stride) {
  Operand made = blank(kind, m ? (m - 1) * stride + n : 0);
  Bytes bytes = encode(kind, x);
  for (int64_t i = 0; i < m; i++)
    std::copy_n(bytes.begin() + (int64_t)size_of(kind) * i * n, (size_t)n * size_of(kind),
                made.bytes.begin() + (int64_t)size_of(kind) * i * stride);
  return made;
}
Doubles gather(int kind, const Bytes &bytes, int64_t m, int64_t n, int64_t stride) {
  Doubles made;
  for (int64_t i = 0; i < m; i++) {
    auto row = bytes.begin() + (int64_t)size_of(kind) * i * stride, end = row + (int64_t)size_of(kind) * n;
    Doubles values = decode(kind, Bytes(row, end));
    made.insert(made.end(), values.begin(), values.end());
    auto gap_end = i + 1 < m ? row + (int64_t)size_of(kind) * stride : end;
    if (std::any_of(end, gap_end, [](char c) { return c != (char)0xff; })) fail("wrote between rows");
  }
  return made;
}

// ---- 8-bit integers: what int8_products_reference.py defines

std::vector<std::pair<int64_t, int64_t>> bounds(int64_t depth, int64_t block) {
  int64_t steps = (depth + 63) / 64, count = block ? (steps + block / 64 - 1) / (block / 64) : 1;
  std::vector<std::pair<int64_t, int64_t>> made;
  for (int64_t i = 0; i < count; i++)
    made.push_back({steps * i / count * 64, std::min(depth, steps * (i + 1) / count * 64)});
  return made;
}

float scale_of(float peak) { return !isfinite(peak) ? NAN : peak < 1e-30f ? 0.0f : peak / 127.0f; }

// x [m, k] recoded row by row and block by block: integers times scales.
Doubles recoded(const Doubles &x, int64_t m, int64_t k, int64_t block) {
  Doubles made(x.size());
  for (int64_t i = 0; i < m; i++)
    for (auto [start, stop] : bounds(k, block)) {
      float peak = 0;
      for (int64_t j = start; j < stop; j++) {
        double value = x[(size_t)(i * k + j)];
        peak = isfinite(value) ? std::max(peak, (float)fabs(value)) : INFINITY;
        if (isinf(peak)) break;
      }
      float scale = scale_of(peak), inverse = scale > 0 ? 127.0f / peak : 0.0f;
      for (int64_t j = start; j < stop; j++) {
        size_t at = (size_t)(i * k + j);
        made[at] = isnan(scale) ? NAN : nearbyint(x[at] * inverse) * scale;
      }
    }
  return made;
}

// Integers of a weight, without its scales; the scales.
Doubles coded(const Layer &layer, Doubles &scales) {
  Doubles made;
  scales.clear();
  for (int64_t row = 0; row < layer.n; row++) {
    const double *w = &layer.exact[(size_t)(row * layer.k)];
    float peak = 0;
    for (int64_t j = 0; j < layer.k; j++) peak = std::max(peak, (float)fabs(w[j]));
    float scale = scale_of(peak), inverse = scale > 0 ? 1.0f / scale : 0.0f;
    scales.push_back(scale);
    for (int64_t j = 0; j < layer.k; j++) made.push_back(nearbyint((float)w[j] * inverse));
  }
  return made;
}

// ---- both

struct Products {
  const Shape &s;
  bool integers;
  std::vector<Layer> layers;
  Doubles table, x;
  std::vector<Doubles> grads, us, vs;
  const double t = TOLERANCE[B16];

  Products(const Shape &shape, bool integers, double odd) : s(shape), integers(integers) {
    Random random((uint64_t)(s.m * 7 + s.k));
    table = rounded(0, random.normals(256));
    x = random.normals(s.m * s.k);
    for (int64_t i = 0; i < s.m; i++)
      for (int32_t o : s.outliers) x[(size_t)(i * s.k + o)] *= 30;
    if (odd != 0) x[(size_t)(1 * s.k)] = odd;
    x = rounded(B16, x);
    for (size_t i = 0; i < s.widths.size(); i++) {
      layers.emplace_back(s, i, table, random);
      grads.push_back(rounded(B16, random.normals(s.m * s.widths[i])));
      if (integers) recode(layers.back());
    }
  }

  const FituneProducts &bfloat16() const { return *kernels->products; }
  const FituneInt8Products &int8() const { return *kernels->products->int8; }

  void recode(Layer &l) {
    Doubles expected, columns;
    coded(l, expected);
    auto with_segment = [&](auto work) {
      return [&, work](char *const *in, char *const *out, int threads) {
        FituneSegment segment = l.segment(in, nullptr, 0, nullptr);
        work(segment, in, out, threads);
      };
    };
    std::vector<Operand> in;
    l.give(in);
    in.push_back(real(0, table));
    in.push_back(raw(s.outliers));
    current = "int8_row_scales";
    auto made = everywhere(in, {blank(0, l.n)}, with_segment([&](auto &segment, auto *from, auto *to, int threads) {
                             int8().row_scales(&segment, l.k, (float *)from[8], (float *)to[0], threads);
                           }));
    close("scales", decode(0, made[0]), expected, 0, 0);
    l.scales = {made[0], 4}, l.scale_values = expected;
    current = "int8_outlier_columns";
    const int64_t count = (int64_t)s.outliers.size();
    made = everywhere(in, {blank(B16, l.n * count)}, with_segment([&](auto &segment, auto *from, auto *to, int threads) {
                        int8().outlier_columns(&segment, l.k, (float *)from[8], (int32_t *)from[9], count,
                                               (uint16_t *)to[0], threads);
                      }));
    for (int64_t row = 0; row < l.n; row++)
      for (int32_t o : s.outliers) columns.push_back(to_bfloat16(l.exact[(size_t)(row * l.k + o)]));
    close("columns", decode(B16, made[0]), columns, 0, 0);
    l.columns = {made[0], 2};
  }

  // What the layer's frozen part gives for x, or its gradient for g.
  Doubles frozen_forward(const Layer &l) const {
    if (!integers) return product(x, l.narrow, s.m, l.n, s.k);
    Doubles scales, left = x, weight = coded(l, scales);
    for (int64_t i = 0; i < s.m; i++)
      for (int32_t o : s.outliers) left[(size_t)(i * s.k + o)] = 0;
    Doubles y = product(recoded(left, s.m, s.k, s.block), weight, s.m, l.n, s.k);
    for (int64_t i = 0; i < s.m; i++)
      for (int64_t j = 0; j < l.n; j++) {
        double &found = y[(size_t)(i * l.n + j)] *= scales[(size_t)j];
        for (int32_t o : s.outliers)
          found += x[(size_t)(i * s.k + o)] * to_bfloat16(l.exact[(size_t)(j * s.k + o)]);
      }
    return y;
  }
  Doubles frozen_backward(const Layer &l, const Doubles &grad) const {
    if (!integers) return product(grad, transposed(l.narrow, l.n, s.k), s.m, s.k, l.n);
    Doubles scales, scaled = grad, weight = coded(l, scales);
    for (int64_t i = 0; i < s.m * l.n; i++) scaled[(size_t)i] = (float)grad[(size_t)i] * (float)scales[(size_t)(i % l.n)];
    return product(recoded(scaled, s.m, l.n, s.block), transposed(weight, l.n, s.k), s.m, s.k, l.n);
  }

  void forward(bool finite) {
    current = integers ? "int8_forward" : "product_forward";
    const int64_t x_stride = s.k + 5, count = (int64_t)layers.size(), outliers = (int64_t)s.outliers.size();
    std::vector<Operand> in, out;
    for (const Layer &l : layers) {
      l.give(in);
      out.push_back(blank(B16, s.m ? (s.m - 1) * (l.n + 3) + l.n : 0));
      out.push_back(blank(B16, s.m * l.r));
    }
    in.push_back(spread(B16, x, s.m, s.k, x_stride));
    in.push_back(real(0, table));
    in.push_back(raw(s.outliers));
    auto made = everywhere(in, out, [&](char *const *from, char *const *to, int threads) {
      std::vector<FituneSegment> segments;
      std::vector<FituneInt8Segment> more;
      for (size_t i = 0; i < layers.size(); i++, from += Layer::OPERANDS) {
        segments.push_back(layers[i].segment(from, to[2 * i], layers[i].n + 3, to[2 * i + 1]));
        more.push_back({(const float *)from[6], (const uint16_t *)from[7]});
      }
      if (integers) {
        Workspace room(int8().workspace_bytes(segments.data(), count, s.m, s.k, outliers, s.block, 0, threads));
        int8().forward((uint16_t *)from[0], x_stride, s.m, s.k, segments.data(), more.data(), count, (int32_t *)from[2],
                       outliers, s.block, (float *)from[1], room.data, threads);
      } else {
        Workspace room(bfloat16().workspace_bytes(segments.data(), count, s.m, s.k, 0, threads));
        bfloat16().forward((uint16_t *)from[0], x_stride, s.m, s.k, segments.data(), count, (float *)from[1], room.data,
                           threads);
      }
    });
    for (size_t i = 0; i < layers.size(); i++) {
      const Layer &l = layers[i];
      us.push_back(decode(B16, made[2 * i + 1]));
      close_sums("u", us.back(), product(x, l.a_values, s.m, l.r, s.k), t);
      Doubles y = sum(frozen_forward(l), product(us.back(), l.b_values, s.m, l.n, l.r));
      for (int64_t j = 0; l.biased && j < s.m * l.n; j++) y[(size_t)j] += l.bias_values[(size_t)(j % l.n)];
      Doubles found = gather(B16, made[2 * i], s.m, l.n, l.n + 3);
      close_sums("y", found, y, t);
      for (int64_t j = 0; !finite && j < s.m * l.n; j++)
        if (isfinite(found[(size_t)j]) == (j / l.n == 1)) return fail("what is not finite has left its row");
    }
  }

  void backward(int kind, bool accumulate) {
    current = integers ? "int8_backward" : "product_backward";
    const int64_t stride = s.k + 2, count = (int64_t)layers.size();
    Random random(3);
    Doubles expected((size_t)(s.m * s.k)), into = rounded(kind, random.normals(s.m * s.k));
    if (accumulate) expected = into;
    std::vector<Operand> in, out = {accumulate ? spread(kind, into, s.m, s.k, stride)
                                               : blank(kind, s.m ? (s.m - 1) * stride + s.k : 0)};
    for (size_t i = 0; i < layers.size(); i++) {
      layers[i].give(in);
      in.push_back(spread(B16, grads[i], s.m, layers[i].n, layers[i].n + 1));
      out.push_back(blank(B16, s.m * layers[i].r));
    }
    in.push_back(real(0, table));
    auto made = everywhere(in, out, [&](char *const *from, char *const *to, int threads) {
      std::vector<FituneSegment> segments;
      std::vector<FituneInt8Segment> more;
      for (size_t i = 0; i < layers.size(); i++, from += Layer::OPERANDS + 1) {
        segments.push_back(layers[i].segment(from, from[8], layers[i].n + 1, to[i + 1]));
        more.push_back({(const float *)from[6], (const uint16_t *)from[7]});
      }
      if (integers) {
        Workspace room(int8().workspace_bytes(segments.data(), count, s.m, s.k, 0, s.block, 1, threads));
        int8().backward(s.m, s.k, segments.data(), more.data(), count, s.block, (float *)from[0], to[0], stride, kind,
                        accumulate, room.data, threads);
      } else {
        Workspace room(bfloat16().workspace_bytes(segments.data(), count, s.m, s.k, 1, threads));
        bfloat16().backward(s.m, s.k, segments.data(), count, (float *)from[0], to[0], stride, kind, accumulate,
                            room.data, threads);
      }
    });
    vs.clear();
    for (size_t i = 0; i < layers.size(); i++) {
      const Layer &l = layers[i];
      vs.push_back(decode(B16, made[i + 1]));
      close_sums("v", vs.back(), product(grads[i], transposed(l.b_values, l.n, l.r), s.m, l.r, l.n), t);
      expected = sum(expected, frozen_backward(l, grads[i]));
      expected = sum(expected, product(vs.back(), transposed(l.a_values, l.r, s.k), s.m, s.k, l.r));
    }
    close_sums("gradient of x", gather(kind, made[0], s.m, s.k, stride), expected, kind == B16 ? t : 1e-4);
  }

  void adapter_gradients() {
    current = "adapter_gradients";
    std::vector<Operand> in = {spread(B16, x, s.m, s.k, s.k + 1)}, out;
    for (size_t i = 0; i < layers.size(); i++) {
      in.push_back(real(B16, vs[i])), in.push_back(real(B16, us[i])), in.push_back(real(B16, grads[i]));
      out.push_back(blank(0, layers[i].r * s.k));
      out.push_back(real(0, Doubles((size_t)(layers[i].n * layers[i].r), 0.5)));  // is added to
    }
    auto made = everywhere(in, out, [&](char *const *from, char *const *to, int threads) {
      std::vector<FituneAdapterGradient> entries;
      for (size_t i = 0; i < layers.size(); i++)
        entries.push_back({(uint16_t *)from[3 * i + 1], (uint16_t *)from[0], layers[i].r, s.k + 1, layers[i].r, s.k, 1.0,
                           (float *)to[2 * i], 0, 0});
      for (size_t i = 0; i < layers.size(); i++)
        entries.push_back({(uint16_t *)from[3 * i + 2], (uint16_t *)from[3 * i + 3], layers[i].r, layers[i].n,
                           layers[i].r, layers[i].n, 0.25, (float *)to[2 * i + 1], 1, 1});
      const int64_t count = (int64_t)entries.size();
      Workspace room(bfloat16().gradient_workspace_bytes(entries.data(), count, s.m, threads));
      bfloat16().adapter_gradients(entries.data(), count, s.m, room.data, threads);
    });
    for (size_t i = 0; i < layers.size(); i++) {
      const Layer &l = layers[i];
      close_sums("gradient of A", decode(0, made[2 * i]),
                 product(transposed(vs[i], s.m, l.r), transposed(x, s.m, s.k), l.r, s.k, s.m), 2e-5);
      Doubles b = product(transposed(grads[i], s.m, l.n), transposed(us[i], s.m, l.r), l.n, l.r, s.m);
      for (double &value : b) value = 0.25 * value + 0.5;
      close_sums("gradient of B", decode(0, made[2 * i + 1]), b, 2e-5);
    }
  }
};

}  // namespace

void check_products() {
  const Shape shapes[] = {
      {33, 192, {192, 64, 70}, {16, 16, 0}, {false, true, false}, {false, false, true}, {3, 64, 191}, 64},
      {0, 64, {32}, {4}, {false}, {false}, {}, 0},
      {1, 1, {5}, {2}, {false}, {true}, {}, 256},
      {1, 576, {70}, {8}, {false}, {false}, {7}, 256},
      {3, 65, {33}, {3}, {false}, {false}, {64}, 64},  // blocks of 64 straddle rows, and rows begin within a byte
      {70, 37, {64, 7}, {40, 0}, {true, false}, {true, false}, {}, 0},
      {131, 130, {70, 3, 100}, {17, 33, 64}, {false, false, true}, {true, true, false}, {1, 129}, 128},
      {20, 2112, {40}, {16}, {false}, {false}, {5, 2000}, 256},  // several stages of depth
      {150, 64, {64}, {0}, {false}, {false}, {}, 0},
  };
  for (const Shape &shape : shapes)
    for (bool integers : {false, true}) {
      Products products(shape, integers, 0);
      products.forward(true);
      products.backward(B16, false);
      products.backward(FITUNE_FLOAT32, true);
      if (!integers) products.adapter_gradients();
    }
  for (bool integers : {false, true}) {
    const Shape shape = {40, 100, {50, 40}, {4, 0}, {false, true}, {false, false}, {3}, 64};
    Products(shape, integers, NAN).forward(false);
  }
}
