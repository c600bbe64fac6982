// Attention by documents, forward and backward, against one query after the other in double precision.
#include "native_driver.h"

namespace {

struct Shape {
  int64_t rows, tokens, heads, kv_heads, d;
};
typedef std::vector<FituneDocument> Documents;

// A tensor [rows, tokens, heads, D] as one that has gaps between its tokens and heads lies in memory.
struct Strided {
  Doubles values;  // without gaps
  FituneStrides strides;
  Doubles stored;

  Strided(Random &random, int kind, int64_t rows, int64_t tokens, int64_t heads, int64_t d, bool gaps)
      : values(rounded(kind, random.normals(rows * tokens * heads * d))) {
    strides.head = d + (gaps ? 1 : 0);
    strides.token = heads * strides.head + (gaps ? 5 : 0);
    strides.row = tokens * strides.token;
    if (!values.empty())
      stored.resize((size_t)((rows - 1) * strides.row + (tokens - 1) * strides.token + (heads - 1) * strides.head + d), 9);
    store(rows, tokens, heads, d);
  }
  void store(int64_t rows, int64_t tokens, int64_t heads, int64_t d) {
    for (int64_t i = 0; i < rows * tokens * heads * d; i++) {
      int64_t head = i / d % heads, token = i / d / heads % tokens, row = i / d / heads / tokens;
      stored[(size_t)(row * strides.row + token * strides.token + head * strides.head + i % d)] = values[(size_t)i];
    }
  }
};

struct Expected {
  Doubles out, lse, grad_q, grad_k, grad_v;
};

Expected attend(const Shape &s, const Documents &documents, const Doubles &q, const Doubles &k, const Doubles &v,
                const Doubles &grad, int64_t window, double scale, double cap) {
  const int64_t d = s.d, group = s.heads / s.kv_heads;
  Expected e;
  e.out.resize(q.size()), e.grad_q.resize(q.size()), e.grad_k.resize(k.size()), e.grad_v.resize(k.size());
  e.lse.resize((size_t)(s.rows * s.heads * s.tokens));
  for (const FituneDocument &doc : documents)
    for (int64_t head = 0; head < s.heads; head++)
      for (int64_t query = doc.start; query < doc.stop; query++) {
        std::vector<int64_t> keys;
        for (int64_t t = doc.prefix_start; t < doc.prefix_stop; t++) keys.push_back(t);
        for (int64_t t = doc.start; t <= query; t++) keys.push_back(t);
        if (window && (int64_t)keys.size() > window) keys.erase(keys.begin(), keys.end() - window);
        auto of_key = [&](int64_t t) { return (size_t)(((doc.row * s.tokens + t) * s.kv_heads + head / group) * d); };
        const size_t own = (size_t)(((doc.row * s.tokens + query) * s.heads + head) * d);
        Doubles scores, slopes;
        double peak = -INFINITY, sum = 0, delta = 0;
        for (int64_t t : keys) {
          double dot = 0, along = 0;
          for (int64_t i = 0; i < d; i++) {
            dot += q[own + (size_t)i] * k[of_key(t) + (size_t)i];
            along += grad[own + (size_t)i] * v[of_key(t) + (size_t)i];
          }
          scores.push_back(cap > 0 ? cap * tanh(dot * scale / cap) : dot * scale);
          slopes.push_back(along);
          peak = std::max(peak, scores.back());
        }
        for (double score : scores) sum += exp(score - peak);
        const double lse = e.lse[(size_t)((doc.row * s.heads + head) * s.tokens + query)] = peak + log(sum);
        for (size_t j = 0; j < keys.size(); j++) delta += exp(scores[j] - lse) * slopes[j];
        for (size_t j = 0; j < keys.size(); j++) {
          double p = exp(scores[j] - lse), bent = cap > 0 ? scores[j] / cap : 0;
          double slope = p * (slopes[j] - delta) * scale * (1 - bent * bent);
          for (size_t i = 0; i < (size_t)d; i++) {
            e.out[own + i] += p * v[of_key(keys[j]) + i];
            e.grad_q[own + i] += slope * k[of_key(keys[j]) + i];
            e.grad_k[of_key(keys[j]) + i] += slope * q[own + i];
            e.grad_v[of_key(keys[j]) + i] += p * grad[own + i];
          }
        }
      }
  return e;
}

void check(int kind, const Shape &s, const Documents &documents, int64_t window, double scale, double cap, bool gaps,
           int64_t split = 1) {
  Random random((uint64_t)(s.tokens * 131 + s.d));
  const int64_t n = s.rows * s.tokens * s.heads * s.d, kv = s.rows * s.tokens * s.kv_heads * s.d;
  Strided q(random, kind, s.rows, s.tokens, s.heads, s.d, gaps), k(random, kind, s.rows, s.tokens, s.kv_heads, s.d, gaps),
      v(random, kind, s.rows, s.tokens, s.kv_heads, s.d, false);
  Doubles grad = rounded(kind, random.normals(n));
  const float narrow_scale = (float)scale, narrow_cap = (float)cap;
  Expected e = attend(s, documents, q.values, k.values, v.values, grad, window, narrow_scale, narrow_cap);
  const double tolerance[] = {2e-5, 2.5e-2, 3e-3};  // bfloat16: probabilities are rounded to it too
  const double t = tolerance[kind];
  current = "attention";
  const std::vector<Operand> in = {real(kind, q.stored), real(kind, k.stored), real(kind, v.stored), raw(documents)};
  auto made = everywhere(in, {blank(kind, n), blank(0, s.rows * s.heads * s.tokens)},
                         [&](char *const *from, char *const *to, int threads) {
                           Workspace room(threads * fitune_attention_floats(s.tokens, s.d, 0) * 4, 4);
                           kernels->attention(from[0], q.strides, from[1], k.strides, from[2], v.strides, kind, s.rows,
                                              s.tokens, s.heads, s.kv_heads, s.d, (const FituneDocument *)from[3],
                                              (int64_t)documents.size(), window, narrow_scale, narrow_cap, to[0],
                                              (float *)to[1], (float *)room.data, threads);
                         });
  close_sums("values", decode(kind, made[0]), e.out, t);
  close("logarithms", decode(0, made[1]), e.lse, 2e-5, 2e-5);
  current = "attention_backward";
  std::vector<Operand> back = in;
  back.push_back({made[0], size_of(kind)});
  back.push_back(real(kind, grad));
  back.push_back({made[1], 4});
  made = everywhere(back, {blank(kind, n), blank(kind, kv), blank(kind, kv)},
                    [&](char *const *from, char *const *to, int threads) {
                      int64_t floats = threads * fitune_attention_floats(s.tokens, s.d, 1);
                      floats += 2 * s.rows * s.kv_heads * split * s.tokens * ((s.d + 31) / 32 * 32);
                      Workspace room(floats * 4, 4);
                      kernels->attention_backward(
                          from[0], q.strides, from[1], k.strides, from[2], v.strides, kind, s.rows, s.tokens, s.heads,
                          s.kv_heads, s.d, (const FituneDocument *)from[3], (int64_t)documents.size(), window,
                          narrow_scale, narrow_cap, from[4], from[5], (float *)from[6], to[0], to[1], to[2], split,
                          (float *)room.data, threads);
                    });
  // They begin from rounded results; with a window of one token those of queries and keys are exactly zero.
  const double wider = kind == FITUNE_FLOAT32 ? t : 3 * t;
  close_sums("gradient of queries", decode(kind, made[0]), e.grad_q, wider, 0.3);
  close_sums("gradient of keys", decode(kind, made[1]), e.grad_k, wider, 0.3);
  close_sums("gradient of values", decode(kind, made[2]), e.grad_v, wider, 0.3);
}

// What is not a number in one document reaches its own later queries, and no other document.
void check_not_a_number(int kind) {
  current = "attention";
  const Shape s = {1, 60, 2, 1, 16};
  const Documents documents = {{0, 0, 30, 0, 0}, {0, 30, 60, 0, 0}};
  for (int spoilt = 0; spoilt < 3; spoilt++) {
    Random random(5);
    Strided x[3] = {{random, kind, 1, 60, 2, 16, false}, {random, kind, 1, 60, 1, 16, false}, {random, kind, 1, 60, 1, 16, false}};
    int64_t heads = spoilt ? 1 : 2;
    for (int64_t i = 0; i < heads * 16; i++) x[spoilt].values[(size_t)(10 * heads * 16 + i)] = NAN;
    x[spoilt].store(1, 60, heads, 16);
    auto made = everywhere({real(kind, x[0].stored), real(kind, x[1].stored), real(kind, x[2].stored), raw(documents)},
                           {blank(kind, 60 * 2 * 16), blank(0, 2 * 60)}, [&](char *const *in, char *const *to, int threads) {
                             Workspace room(threads * fitune_attention_floats(s.tokens, s.d, 0) * 4, 4);
                             kernels->attention(in[0], x[0].strides, in[1], x[1].strides, in[2], x[2].strides, kind, 1, 60,
                                                2, 1, 16, (const FituneDocument *)in[3], 2, 0, 0.2f, 0.0f, to[0],
                                                (float *)to[1], (float *)room.data, threads);
                           });
    Doubles out = decode(kind, made[0]);
    for (int64_t token = 0; token < 60; token++)
      for (int64_t i = 0; i < 32; i++) {
        bool nan = isnan(out[(size_t)(token * 32 + i)]);
        if (token >= 30 ? nan : spoilt ? token >= 10 && !nan : token == 10 && !nan) {
          fail("what is not a number is " + std::string(nan ? "" : "not ") + "at token " + std::to_string(token));
          return;
        }
      }
  }
}

// One new token a row over slots of which the first `shared` columns are the same.
void check_slots(int kind, int64_t d, int64_t shared, int64_t window, double cap) {
  current = "slot_attention";
  const int64_t n = 11, slots = 12, heads = 4, kv_heads = 2, capacity = 140, slot = kv_heads * capacity * d;
  const double scale = 0.25;
  Random random((uint64_t)(d + shared));
  Doubles q = rounded(kind, random.normals(n * heads * d)), expected((size_t)(n * heads * d));
  Doubles fresh[2] = {rounded(kind, random.normals(n * kv_heads * d)), rounded(kind, random.normals(n * kv_heads * d))};
  Doubles kept[2] = {rounded(kind, random.normals(slots * slot)), rounded(kind, random.normals(slots * slot))};
  std::vector<int64_t> columns;
  for (int64_t row = 0; row < n; row++) columns.push_back(std::min(capacity - 1, shared + row * row));
  for (Doubles &one : kept)
    for (int64_t i = slot; i < slots * slot; i++)
      if (i / d % capacity < shared) one[(size_t)i] = one[(size_t)(i % slot)];
  auto made = everywhere({real(kind, q), real(kind, fresh[0]), real(kind, fresh[1]), raw(columns)},
                         {real(kind, kept[0]), real(kind, kept[1]), blank(kind, n * heads * d)},
                         [&](char *const *in, char *const *to, int threads) {
                           kernels->slot_attention(in[0], in[1], in[2], kind, n, heads, kv_heads, d, to[0], to[1],
                                                   capacity, (int64_t *)in[3], shared, window, (float)scale, (float)cap,
                                                   to[2], threads);
                         });
  auto at = [&](int64_t row, int64_t head, int64_t column) {
    return (size_t)(((row * kv_heads + head) * capacity + column) * d);
  };
  for (int64_t row = 0; row < n; row++)
    for (int64_t head = 0; head < heads; head++) {
      int64_t kv = head / (heads / kv_heads), end = columns[(size_t)row] + 1, first = window ? std::max<int64_t>(0, end - window) : 0;
      for (int of = 0; of < 2; of++)
        std::copy_n(&fresh[of][(size_t)((row * kv_heads + kv) * d)], d, &kept[of][at(row, kv, end - 1)]);
      Doubles scores;
      double sum = 0;
      for (int64_t j = first; j < end; j++) {
        double dot = 0;
        for (int64_t i = 0; i < d; i++) dot += q[(size_t)((row * heads + head) * d + i)] * kept[0][at(row, kv, j) + (size_t)i];
        scores.push_back(exp(cap > 0 ? cap * tanh(dot * scale / cap) : dot * scale));
        sum += scores.back();
      }
      for (int64_t j = first; j < end; j++)
        for (int64_t i = 0; i < d; i++)
          expected[(size_t)((row * heads + head) * d + i)] +=
              scores[(size_t)(j - first)] / sum * kept[1][at(row, kv, j) + (size_t)i];
    }
  for (int of = 0; of < 2; of++)
    if (made[(size_t)of] != encode(kind, kept[of])) fail("slots that should not be so");
  close_sums("values", decode(kind, made[2]), expected, std::max(TOLERANCE[kind], 2e-5));
}

}  // namespace

void check_attention() {
  // whole rows; several documents, one of a single token; a beginning that others continue
  const Documents packed = {{0, 0, 1, 0, 0}, {0, 1, 34, 0, 0}, {0, 34, 70, 0, 0}, {1, 0, 69, 0, 0}, {1, 69, 70, 0, 0}};
  const Documents shared = {{0, 0, 20, 0, 0}, {0, 20, 30, 0, 20}, {0, 30, 65, 0, 20}, {0, 65, 66, 0, 20},
                            {0, 66, 70, 0, 0}, {1, 0, 3, 0, 0}, {1, 3, 9, 0, 3}, {1, 9, 40, 0, 3},
                            {1, 40, 50, 0, 0}, {1, 50, 58, 40, 50}, {1, 58, 70, 40, 50}};
  for (int kind : KINDS) {
    for (int64_t window : {0, 1, 7, 33}) {
      check(kind, {2, 70, 4, 2, 16}, packed, window, 0.2, 0, true);
      check(kind, {2, 70, 4, 2, 16}, shared, window, 0.2, 0, true);
    }
    check(kind, {2, 70, 4, 2, 20}, shared, 9, 0.8, 3.0, false);
    check(kind, {2, 70, 3, 3, 16}, shared, 0, 0.2, 0, false);
    check(kind, {2, 70, 4, 1, 8}, shared, 0, 0.2, 0, false, 4);
    for (int64_t d : {1, 3, 33, 64, 80}) check(kind, {2, 70, 2, 1, d}, packed, 0, 1 / sqrt((double)d), 0, d == 33);
    for (int64_t tokens : {1, 2, 31, 32, 33, 65, 97})
      check(kind, {1, tokens, 2, 1, 24}, {{0, 0, (int32_t)tokens, 0, 0}}, 0, 0.2, 0, true);
    check(kind, {1, 0, 2, 1, 16}, {}, 0, 0.2, 0, false);
    check_not_a_number(kind);
    for (int64_t d : {1, 20, 64}) check_slots(kind, d, 0, 0, 0);
    for (int64_t shared : {1, 64, 130})
      for (int64_t window : {0, 1, 70}) check_slots(kind, 16, shared, window, window == 70 ? 2 : 0);
  }
}
