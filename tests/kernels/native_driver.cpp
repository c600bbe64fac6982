// Checks native kernels against plain loops in double precision. No Python and no torch, so that it also runs on an
// emulated processor. Link it with libfitune_kernels.so (and native_driver_products.cpp), then
//   native_driver [--mutate WHAT] [--margin BYTES] [INSTRUCTION_SET...]
// checks these sets, or all that can run here. Exit codes: 0 all right, 1 wrong results, 2 no such set, 3 a kernel
// touched memory that is not its own. WHAT spoils something that must then be noticed: a kernel's name (what is
// expected of it), "bits" (what is repeated) or "memory" (the size of a buffer).
#include "native_driver.h"

#include <signal.h>

namespace {

const double NF4[] = {-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                      -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                      0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                      0.7229568362236023, 1.0};

int nibble(const Bytes &codes, int64_t i) {
  uint8_t pair = (uint8_t)codes[(size_t)(i / 2)];
  return i % 2 ? pair & 15 : pair >> 4;
}

void check_nf4_quantise() {
  current = "nf4_quantise";
  for (int kind : KINDS)
    for (int64_t n : {0, 1, 2, 63, 64, 65, 127, 128, 200, 1000, 4161}) {
      Random random((uint64_t)n + 1);
      Doubles weight = random.normals(n);
      for (int64_t i = 64; i < std::min<int64_t>(n, 128); i++) weight[(size_t)i] = 0;
      if (n == 1000) weight[300] = NAN, weight[500] = INFINITY;
      weight = rounded(kind, weight);
      auto made = everywhere({real(kind, weight)}, {raw(std::vector<uint8_t>((size_t)(n + 1) / 2)), blank(0, (n + 63) / 64)},
                             [&](char *const *in, char *const *out, int threads) {
                               kernels->nf4_quantise(in[0], kind, n, (uint8_t *)out[0], (float *)out[1], threads);
                             });
      Doubles peaks;
      for (int64_t block = 0; block * 64 < n; block++) {
        double peak = block * 64 + 64 > n ? 1e-38 : 0;
        int64_t stop = std::min(n, block * 64 + 64);
        for (int64_t i = block * 64; i < stop; i++)
          peak = isnan(weight[(size_t)i]) ? NAN : fabs(weight[(size_t)i]) > peak ? fabs(weight[(size_t)i]) : peak;
        peaks.push_back(peak);
        if (!isfinite(peak)) continue;
        for (int64_t i = block * 64; i < stop; i++) {
          double value = peak ? weight[(size_t)i] / peak : 0, least = 9;
          for (double candidate : NF4) least = std::min(least, fabs(value - candidate));
          if (!(fabs(value - NF4[nibble(made[0], i)]) <= least + 1e-6)) fail("a code that is not the nearest");
        }
      }
      close("block maxima", decode(0, made[1]), peaks, 1e-7, 0);
    }
}

void check_nf4_dequantise() {
  current = "nf4_dequantise";
  for (int kind : KINDS)
    for (int64_t n : {0, 1, 2, 63, 64, 65, 1001, 64 * 256 + 67}) {
      Random random((uint64_t)n + 2);
      int64_t blocks = (n + 63) / 64, outer = (blocks + 255) / 256;
      auto codes = random.bytes((n + 1) / 2), scales = random.bytes(blocks);
      Doubles nested = rounded(0, random.normals(outer)), table = rounded(0, random.normals(256)), expected;
      if (n > 1001) nested[1] = NAN;
      const float offset = 0.37f;
      auto made = everywhere({raw(codes), raw(scales), real(0, nested), real(0, table)}, {blank(kind, n)},
                             [&](char *const *in, char *const *out, int threads) {
                               kernels->nf4_dequantise((uint8_t *)in[0], (uint8_t *)in[1], (float *)in[2],
                                                       (float *)in[3], offset, n, out[0], kind, threads);
                             });
      for (int64_t i = 0; i < n; i++)
        expected.push_back(NF4[nibble(raw(codes).bytes, i)] *
                           (table[scales[(size_t)(i / 64)]] * nested[(size_t)(i / 64 / 256)] + offset));
      close("values", decode(kind, made[0]), expected, TOLERANCE[kind], TOLERANCE[kind] / 100);
    }
}

void check_rms_norm(int kind, int64_t m, int64_t c, double shift, double odd) {
  current = "rms_norm";
  Random random((uint64_t)(m * 1000 + c));
  Doubles x = random.normals(m * c), weight = rounded(kind, random.normals(c)), grad = rounded(kind, random.normals(m * c));
  Doubles residual = rounded(kind, random.normals(m * c));
  if (odd != 0) x[(size_t)c + 3] = odd;
  x = rounded(kind, x);
  const double eps = 1e-5;
  Doubles out((size_t)(m * c)), back((size_t)(m * c)), added((size_t)(m * c)), rstd((size_t)m);
  int64_t told = mutated == "memory" ? m + 1 : m;
  auto made = everywhere({real(kind, x), real(kind, weight)}, {blank(kind, m * c), blank(0, m)},
                         [&](char *const *in, char *const *to, int threads) {
                           kernels->rms_norm(in[0], in[1], kind, told, c, (float)eps, (float)shift, to[0],
                                             (float *)to[1], threads);
                         });
  for (int64_t row = 0; row < m; row++) {
    double square = 0, dot = 0;
    for (int64_t i = 0; i < c; i++) square += x[(size_t)(row * c + i)] * x[(size_t)(row * c + i)];
    double r = rstd[(size_t)row] = 1 / sqrt(square / (double)c + eps);
    for (int64_t i = 0; i < c; i++) {
      size_t at = (size_t)(row * c + i);
      out[at] = x[at] * r * (shift + weight[(size_t)i]);
      dot += grad[at] * (shift + weight[(size_t)i]) * x[at];
    }
    for (int64_t i = 0; i < c; i++) {
      size_t at = (size_t)(row * c + i);
      back[at] = (grad[at] * (shift + weight[(size_t)i]) - x[at] * dot * r * r / (double)c) * r;
      added[at] = back[at] + residual[at];
    }
  }
  close("values", decode(kind, made[0]), out, TOLERANCE[kind], TOLERANCE[kind]);
  close("1 / root", decode(0, made[1]), rstd, 4e-6, 4e-6);
  if (odd != 0) return;
  current = "rms_norm_backward";
  for (const Doubles *wanted : {&back, &added}) {
    made = everywhere({real(kind, grad), real(kind, x), real(kind, weight), real(0, rstd), real(kind, residual)},
                      {blank(kind, m * c)}, [&](char *const *in, char *const *to, int threads) {
                        kernels->rms_norm_backward(in[0], in[1], in[2], (float *)in[3],
                                                   wanted == &added ? in[4] : nullptr, kind, m, c, (float)shift, to[0],
                                                   threads);
                      });
    // 1 / root of a single small value is large
    close("gradient", decode(kind, made[0]), *wanted, TOLERANCE[kind], TOLERANCE[kind] * (c == 1 ? 20 : 1));
  }
}

void activate(int activation, double x, double &value, double &slope) {
  const double a = 2 * sqrt(2 / M_PI), b = 0.044715;
  double s = 1 / (1 + exp(-(activation == FITUNE_SILU ? x : a * (x + b * x * x * x))));
  value = x * s;
  slope = s + x * s * (1 - s) * (activation == FITUNE_SILU ? 1 : a * (1 + 3 * b * x * x));
}

void check_gated_activation(int kind, int activation, int64_t n, bool finite) {
  Random random((uint64_t)n + 7);
  Doubles gate = random.normals(n, 3), up = rounded(kind, random.normals(n, 3)), grad = rounded(kind, random.normals(n));
  if (!finite) gate[3] = NAN, gate[4] = INFINITY, gate[5] = -INFINITY, gate[6] = -90, gate[7] = 90;
  gate = rounded(kind, gate);
  Doubles out((size_t)n), of_gate((size_t)n), of_up((size_t)n);
  for (size_t i = 0; i < gate.size(); i++) {
    double value, slope;
    activate(activation, gate[i], value, slope);
    out[i] = value * up[i];
    of_gate[i] = grad[i] * up[i] * slope;
    of_up[i] = grad[i] * value;
  }
  const double t = TOLERANCE[kind];
  current = "gated_activation";
  auto made = everywhere({real(kind, gate), real(kind, up)}, {blank(kind, n)},
                         [&](char *const *in, char *const *to, int threads) {
                           kernels->gated_activation(in[0], in[1], kind, activation, n, to[0], threads);
                         });
  close("values", decode(kind, made[0]), out, t, t);
  current = "gated_activation_backward";
  made = everywhere({real(kind, grad), real(kind, gate), real(kind, up)}, {blank(kind, n), blank(kind, n), blank(kind, n)},
                    [&](char *const *in, char *const *to, int threads) {
                      kernels->gated_activation_backward(in[0], in[1], in[2], kind, activation, n, to[0], to[1], to[2],
                                                         threads);
                    });
  close("gradient of gate", decode(kind, made[0]), of_gate, t, 3 * t, true);
  close("gradient of up", decode(kind, made[1]), of_up, t, t, true);
  close("values again", decode(kind, made[2]), out, t, t, true);
  auto in_place = everywhere({real(kind, grad)}, {real(kind, gate), real(kind, up)},
                             [&](char *const *in, char *const *to, int threads) {
                               kernels->gated_activation_backward(in[0], to[0], to[1], kind, activation, n, to[0],
                                                                  to[1], nullptr, threads);
                             });
  if (finite && mutated.empty() && (in_place[0] != made[0] || in_place[1] != made[1])) fail("other bits in place");
}

void check_token_logprob(int kind, int64_t m, int64_t v, double odd) {
  current = "token_logprob";
  Random random((uint64_t)(m * 7 + v));
  Doubles logits = random.normals(m * v, 4);
  if (odd != 0) logits[(size_t)v + 2] = odd;
  logits = rounded(kind, logits);
  std::vector<int64_t> target((size_t)m);
  for (int64_t &one : target) one = (int64_t)(random.bits() % (uint64_t)v);
  if (m && odd == 0) target[0] = v - 1;
  Doubles chosen, grads((size_t)(m * v));
  for (int64_t row = 0; row < m; row++) {
    const double *a = &logits[(size_t)(row * v)];
    double peak = *std::max_element(a, a + v, [](double x, double y) { return x < y || isnan(y); }), sum = 0;
    for (int64_t i = 0; i < v; i++) sum += exp(a[i] - peak);
    chosen.push_back(a[target[(size_t)row]] - peak - log(sum));
    for (int64_t i = 0; i < v; i++)
      grads[(size_t)(row * v + i)] = (i == target[(size_t)row]) - exp(a[i] - peak) / sum;
  }
  for (int grad = 0; grad < 2; grad++) {
    auto made = everywhere({raw(target)}, {real(kind, logits), blank(0, m)},
                           [&](char *const *in, char *const *to, int threads) {
                             kernels->token_logprob(to[0], kind, (int64_t *)in[0], m, v, grad, (float *)to[1], threads);
                           });
    close("log-probabilities", decode(0, made[1]), chosen, 1e-5, 1e-5);
    if (grad) close("gradients", decode(kind, made[0]), grads, TOLERANCE[kind], TOLERANCE[kind]);
    else if (made[0] != encode(kind, logits)) fail("changed the logits");
  }
}

void check_rotate(int kind, int64_t heads, int64_t d, int64_t half, int inverse) {
  current = "rotate";
  const int64_t tokens = 5, head_stride = d + 1, token_stride = heads * head_stride + 3;
  Random random((uint64_t)(heads * 100 + d));
  Doubles x = rounded(kind, random.normals((tokens - 1) * token_stride + (heads - 1) * head_stride + d));
  Doubles angle = random.normals(tokens * half), cosine, sine, expected((size_t)(tokens * heads * d));
  for (double a : angle) cosine.push_back((float)cos(a)), sine.push_back((float)sin(a));
  auto made = everywhere({real(kind, x), real(0, cosine), real(0, sine)}, {blank(kind, tokens * heads * d)},
                         [&](char *const *in, char *const *to, int threads) {
                           kernels->rotate(in[0], kind, tokens, heads, d, half, token_stride, head_stride,
                                           (float *)in[1], (float *)in[2], inverse, to[0], threads);
                         });
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < d; i++) {
        const double *a = &x[(size_t)(t * token_stride + h * head_stride)];
        int64_t pair = i < half ? i : i - half;
        double c = i < 2 * half ? cosine[(size_t)(t * half + pair)] : 1;
        double s = i < 2 * half ? sine[(size_t)(t * half + pair)] * (inverse ? -1 : 1) * (i < half ? -1 : 1) : 0;
        double other = i < half ? a[i + half] : i < 2 * half ? a[i - half] : 0;
        expected[(size_t)((t * heads + h) * d + i)] = a[i] * c + other * s;
      }
  close("values", decode(kind, made[0]), expected, TOLERANCE[kind], TOLERANCE[kind]);
  Doubles dense;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < d; i++) dense.push_back(x[(size_t)(t * token_stride + h * head_stride + i)]);
  auto in_place = everywhere({real(0, cosine), real(0, sine)}, {real(kind, dense)},
                             [&](char *const *in, char *const *to, int threads) {
                               kernels->rotate(to[0], kind, tokens, heads, d, half, heads * d, d, (float *)in[0],
                                               (float *)in[1], inverse, to[0], threads);
                             });
  if (mutated.empty() && in_place != made) fail("other bits in place");
}

void check_add_scaled(int kind, int64_t n) {
  current = "add_scaled";
  Random random((uint64_t)n);
  Doubles x = rounded(kind, random.normals(n)), y = rounded(kind, random.normals(n)), expected;
  for (size_t i = 0; i < x.size(); i++) expected.push_back(x[i] + 0.37f * y[i]);
  auto made = everywhere({real(kind, x), real(kind, y)}, {blank(kind, n)}, [&](char *const *in, char *const *to, int threads) {
    kernels->add_scaled(in[0], in[1], kind, n, 0.37f, to[0], threads);
  });
  close("values", decode(kind, made[0]), expected, TOLERANCE[kind], TOLERANCE[kind]);
  auto in_place = everywhere({real(kind, y)}, {real(kind, x)}, [&](char *const *in, char *const *to, int threads) {
    kernels->add_scaled(to[0], in[0], kind, n, 0.37f, to[0], threads);
  });
  if (mutated.empty() && in_place != made) fail("other bits in place");
}

// The dynamic type's 256 values as FITUNE_MOMENT_MAP_WORDS says.
std::vector<uint32_t> moment_map(bool is_signed) {
  std::vector<float> values = {0, 1};
  for (int exponent = 0; exponent < 7; exponent++)
    for (int i = 0, count = 1 << (exponent + !is_signed); i < count; i++) {
      float mean = (float)(pow(10, exponent - 6) * (0.1 + 0.9 * (i + 0.5) / count));
      values.push_back(mean);
      if (is_signed) values.push_back(-mean);
    }
  std::sort(values.begin(), values.end());
  std::vector<float> middles;
  for (size_t i = 0; i < 255; i++) middles.push_back((values[i] + values[i + 1]) / 2);
  middles.push_back(INFINITY);
  std::vector<uint32_t> words(FITUNE_MOMENT_MAP_WORDS);
  memcpy(&words[0], values.data(), 1024), memcpy(&words[256], middles.data(), 1024);
  for (uint32_t high = 0; high < 65536; high++) {
    uint32_t bits = high << 16 | (high >> 15 ? 0xffff : 0);
    float least;
    memcpy(&least, &bits, 4);
    least = isnan(least) ? 0 : std::max(-1.0f, std::min(1.0f, least));
    for (size_t i = 0; i < 255; i++) words[512 + high] += least > middles[i];
  }
  return words;
}

void check_adamw8bit(int64_t n, float decay) {
  current = "adamw8bit";
  Random random((uint64_t)n + 5);
  const int64_t blocks = (n + 255) / 256;
  const float settings[] = {0.9f, 0.1f, 0.99f, 0.01f, 1e-8f, 1 - decay, 0.02f, 0.3f};
  Doubles p = rounded(0, random.normals(n)), grad = rounded(0, random.normals(n)), expected = p, moments[2], peaks[2];
  for (int64_t i = 256; i < std::min<int64_t>(n, 512); i++) grad[(size_t)i] = 0;
  const std::vector<uint32_t> maps[] = {moment_map(true), moment_map(false)};
  std::vector<uint8_t> codes[] = {random.bytes(n), random.bytes(n)};
  std::vector<float> values[2];
  for (int which : {0, 1}) {
    values[which].resize(256);
    memcpy(values[which].data(), maps[which].data(), 1024);
    for (int64_t block = 0; block < blocks; block++) peaks[which].push_back(block == 1 ? 0 : 0.5 + 0.25 * (double)(block % 3));
    for (int64_t i = 0; i < n; i++) {
      double g = grad[(size_t)i], old = values[which][codes[which][(size_t)i]] * peaks[which][(size_t)(i / 256)];
      moments[which].push_back(old * settings[2 * which] + (which ? g * g : g) * settings[2 * which + 1]);
    }
  }
  for (size_t i = 0; i < p.size(); i++)
    expected[i] = p[i] * settings[5] - settings[6] * (moments[0][i] / (sqrt(moments[1][i]) / settings[7] + settings[4]));
  auto made = everywhere(
      {real(0, grad), raw(maps[0]), raw(maps[1])},
      {real(0, p), raw(codes[0]), raw(codes[1]), real(0, peaks[0]), real(0, peaks[1])},
      [&](char *const *in, char *const *to, int threads) {
        kernels->adamw8bit((float *)to[0], (float *)in[0], (uint8_t *)to[1], (uint8_t *)to[2], (float *)to[3],
                           (float *)to[4], n, (float *)in[1], (float *)in[2], settings, threads);
      });
  close("parameters", decode(0, made[0]), expected, 1e-5, 1e-5);
  for (int which : {0, 1}) {
    Doubles found = decode(0, made[(size_t)(3 + which)]), highest((size_t)blocks);
    for (int64_t i = 0; i < n; i++)
      highest[(size_t)(i / 256)] = std::max(highest[(size_t)(i / 256)], fabs(moments[which][(size_t)i]));
    close("peaks", found, highest, 1e-5, 1e-30);
    for (int64_t i = 0; i < n; i++) {
      double peak = found[(size_t)(i / 256)], value = peak ? moments[which][(size_t)i] / peak : 0, least = 9;
      for (double candidate : values[which]) least = std::min(least, fabs(value - candidate));
      uint8_t code = (uint8_t)made[(size_t)(1 + which)][(size_t)i];
      if (!(fabs(value - values[which][code]) <= least + 1e-6)) return fail("a code that is not the nearest");
    }
  }
}

void touched(int) {
  std::string text = std::string(kernels->instruction_set) + ", " + current + ": touched memory that is not its own\n";
  if (write(1, text.data(), text.size()) < 0) _exit(4);
  _exit(3);
}

}  // namespace

void check_elements() {
  check_nf4_quantise();
  check_nf4_dequantise();
  for (int64_t n : {0, 1, 255, 256, 257, 2000})
    for (float decay : {0.0f, 0.1f}) check_adamw8bit(n, decay);
  const int64_t norms[][2] = {{0, 16}, {1, 1}, {1, 7}, {3, 64}, {5, 33}, {2, 1000}};
  const int64_t vocabularies[][2] = {{0, 5}, {1, 1}, {1, 2}, {3, 15}, {4, 16}, {5, 17}, {2, 1001}};
  const int64_t turned[][3] = {{1, 2, 1}, {3, 64, 32}, {2, 20, 5}, {4, 33, 16}, {1, 3, 0}};
  for (int kind : KINDS) {
    for (auto [m, c] : norms)
      for (double shift : {0.0, 1.0}) check_rms_norm(kind, m, c, shift, 0);
    for (double odd : {(double)NAN, (double)INFINITY, -(double)INFINITY}) {
      check_rms_norm(kind, 3, 40, 0, odd);
      check_token_logprob(kind, 3, 40, odd);
    }
    for (int activation : {FITUNE_SILU, FITUNE_GELU_TANH}) {
      for (int64_t n : {0, 1, 15, 16, 17, 4097}) check_gated_activation(kind, activation, n, true);
      check_gated_activation(kind, activation, 37, false);
    }
    for (auto [m, v] : vocabularies) check_token_logprob(kind, m, v, 0);
    for (auto [heads, d, half] : turned)
      for (int inverse : {0, 1}) check_rotate(kind, heads, d, half, inverse);
    for (int64_t n : {0, 1, 17, 70001}) check_add_scaled(kind, n);
  }
}

int main(int count, char **words) {
  std::string sets;
  for (int i = 1; i < count; i++) {
    if (!strcmp(words[i], "--mutate") && i + 1 < count) mutated = words[++i];
    else if (!strcmp(words[i], "--margin") && i + 1 < count) margin = (size_t)atoi(words[++i]);
    else sets += std::string(words[i]) + " ";
  }
  if (fitune_abi() != FITUNE_ABI) return printf("built for interface %d, this driver for %d\n", fitune_abi(), FITUNE_ABI), 2;
  signal(SIGSEGV, touched);
  signal(SIGBUS, touched);
  if (sets.empty()) sets = std::string(fitune_available()) + " ";
  int64_t all_failures = 0;
  for (size_t at = 0, end; (end = sets.find(' ', at)) != std::string::npos; at = end + 1) {
    std::string name = sets.substr(at, end - at);
    kernels = fitune_kernels(name.c_str());
    if (!kernels) return printf("%s cannot run here; these can: %s\n", name.c_str(), fitune_available()), 2;
    checked = failures = 0;
    check_elements();
    check_attention();
    if (kernels->products) check_products();
    printf("%s: %lld calls checked, %lld failures%s\n", name.c_str(), (long long)checked, (long long)failures,
           kernels->products ? "" : "; it has no products");
    all_failures += failures;
  }
  return all_failures != 0;
}
