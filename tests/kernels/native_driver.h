// What the checks of native_driver*.cpp share: buffers between pages that nobody may touch, numbers of every kind, one
// call in many circumstances, comparison with what is expected.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fitune_kernels.h"

typedef std::vector<double> Doubles;
typedef std::vector<char> Bytes;

inline const FituneKernels *kernels;  // the instruction set under test
inline std::string current;           // the kernel under test
inline std::string mutated;           // the kernel whose expectation is spoilt, to see that the driver can fail
inline int64_t checked, failures;

inline void fail(const std::string &what) {
  if (++failures <= 20) printf("%s, %s: %s\n", kernels->instruction_set, current.c_str(), what.c_str());
}

// ---- numbers

const int KINDS[] = {FITUNE_FLOAT32, FITUNE_BFLOAT16, FITUNE_FLOAT16};
const double TOLERANCE[] = {4e-6, 0x1p-7, 0x1p-10};  // two to four units of a result's last place

inline size_t size_of(int kind) { return kind == FITUNE_FLOAT32 ? 4 : 2; }

// The 16-bit float with so many bits of mantissa and the bits of its largest finite exponent, to nearest, ties to even.
inline uint16_t halved(double value, int mantissa, int bias) {
  uint16_t sign = signbit(value) ? 0x8000 : 0, infinite = (uint16_t)((2 * bias + 1) << mantissa);
  if (isnan(value)) return (uint16_t)(infinite | 1 << (mantissa - 1));
  if (value == 0 || isinf(value)) return value == 0 ? sign : (uint16_t)(sign | infinite);
  int exponent = std::max(ilogb(value), 1 - bias);
  double units = nearbyint(ldexp(fabs(value), mantissa - exponent));  // may carry into the next exponent
  int64_t bits = (int64_t)units + ((int64_t)(exponent + bias - 1) << mantissa);
  return (uint16_t)(sign | std::min<int64_t>(bits, infinite));
}

inline double doubled(uint16_t bits, int mantissa, int bias) {
  int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  double value = exponent == 2 * bias + 1 ? (fraction ? NAN : INFINITY)
                 : exponent ? ldexp(fraction + (1 << mantissa), exponent - bias - mantissa)
                            : ldexp(fraction, 1 - bias - mantissa);
  return bits & 0x8000 ? -value : value;
}

inline Bytes encode(int kind, const Doubles &values) {
  Bytes bytes(values.size() * size_of(kind));
  for (size_t i = 0; i < values.size(); i++) {
    float wide = (float)values[i];
    uint16_t half = kind == FITUNE_BFLOAT16 ? halved(values[i], 7, 127) : halved(values[i], 10, 15);
    if (kind == FITUNE_FLOAT32) memcpy(&bytes[4 * i], &wide, 4);
    else memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

inline Doubles decode(int kind, const Bytes &bytes) {
  Doubles values(bytes.size() / size_of(kind));
  for (size_t i = 0; i < values.size(); i++) {
    float wide;
    uint16_t half;
    if (kind == FITUNE_FLOAT32) memcpy(&wide, &bytes[4 * i], 4);
    else memcpy(&half, &bytes[2 * i], 2);
    values[i] = kind == FITUNE_FLOAT32 ? wide : kind == FITUNE_BFLOAT16 ? doubled(half, 7, 127) : doubled(half, 10, 15);
  }
  return values;
}

// As the kernel will read them.
inline Doubles rounded(int kind, const Doubles &values) { return decode(kind, encode(kind, values)); }
inline double to_bfloat16(double value) { return doubled(halved(value, 7, 127), 7, 127); }

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  double uniform() { return (double)(bits() >> 11) * 0x1p-53; }
  double normal() { return sqrt(-2 * log(1 - uniform())) * cos(2 * M_PI * uniform()); }
  Doubles normals(int64_t n, double scale = 1) {
    Doubles values((size_t)n);
    for (double &value : values) value = scale * normal();
    return values;
  }
  std::vector<uint8_t> bytes(int64_t n) {
    std::vector<uint8_t> values((size_t)n);
    for (uint8_t &value : values) value = (uint8_t)(bits() >> 32);
    return values;
  }
};

// ---- memory

enum Placement { AT_START, AT_END, ODD };  // of a page: what is read or written before, or past, a buffer ends the program
inline Placement placement;
inline size_t margin = 0;  // bytes that may be touched past the last one: some emulators read more than the processor

// Bytes beside pages that cannot be touched; ODD: one element past an aligned address. An input cannot be written.
class Buffer {
  char *pages;
  size_t whole;

 public:
  char *data;
  Buffer(const Bytes &content, size_t element, bool writable) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), own = (content.size() + element + margin + page - 1) / page * page;
    whole = own + 2 * page;
    pages = (char *)mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) abort();
    char *first = pages + page;
    data = placement == AT_START ? first : placement == ODD ? first + element : first + own - margin - content.size();
    std::copy(content.begin(), content.end(), data);
    if (!writable) mprotect(first, own, PROT_READ);
    mprotect(pages, page, PROT_NONE);
    mprotect(first + own, page, PROT_NONE);
  }
  ~Buffer() { munmap(pages, whole); }
  Buffer(const Buffer &) = delete;
};

// Room for the kernel's own use; nothing in it is a number.
struct Workspace : Buffer {
  explicit Workspace(int64_t bytes, size_t element = 1) : Buffer(Bytes((size_t)bytes, (char)0xff), element, true) {}
};

// An operand: its bytes and the size of its elements.
struct Operand {
  Bytes bytes;
  size_t element = 1;
};
inline Operand real(int kind, const Doubles &values) { return {encode(kind, values), size_of(kind)}; }
inline Operand blank(int kind, int64_t n) { return {Bytes((size_t)n * size_of(kind), (char)0xff), size_of(kind)}; }
template <typename T>
inline Operand raw(const std::vector<T> &values) {
  return {Bytes((const char *)values.data(), (const char *)(values.data() + values.size())), sizeof(T)};
}

// ---- one call in many circumstances

typedef std::function<void(char *const *in, char *const *out, int threads)> Call;

// The results, of which nothing may depend on the number of threads, on time, or on where the operands lie.
inline std::vector<Bytes> everywhere(const std::vector<Operand> &in, const std::vector<Operand> &out, const Call &call) {
  const std::pair<Placement, int> circumstances[] = {{AT_END, 1}, {AT_START, 2}, {ODD, 3}, {AT_END, 3}, {AT_END, 1}};
  std::vector<Bytes> first;
  for (auto [where, threads] : circumstances) {
    placement = where;
    std::vector<std::unique_ptr<Buffer>> buffers;
    std::vector<char *> read, written;
    for (const Operand &o : in) {
      buffers.emplace_back(new Buffer(o.bytes, o.element, false));
      read.push_back(buffers.back()->data);
    }
    for (const Operand &o : out) {
      buffers.emplace_back(new Buffer(o.bytes, o.element, true));
      written.push_back(buffers.back()->data);
    }
    call(read.data(), written.data(), threads);
    std::vector<Bytes> found;
    for (size_t i = 0; i < out.size(); i++) found.emplace_back(written[i], written[i] + out[i].bytes.size());
    if (first.empty()) {
      first = found;
      if (mutated == "bits" && !first.empty() && !first[0].empty()) first[0][0] ^= 1;
    } else if (found != first) {
      fail("other bits with " + std::to_string(threads) + " threads, placement " + std::to_string(where));
    }
    checked++;
  }
  return first;
}

// ---- comparison

// |found - expected| <= relative * |expected| + absolute; what is not finite must be the same, or with
// `only_whether_finite` both must not be.
inline void close(const std::string &what, const Doubles &found, Doubles expected, double relative, double absolute,
                  bool only_whether_finite = false) {
  if (found.size() != expected.size()) return fail(what + ": another size");
  if (mutated == current && !expected.empty())
    *std::max_element(expected.begin(), expected.end(), [](double a, double b) {
      return (isfinite(a) ? fabs(a) : 0) < (isfinite(b) ? fabs(b) : 0);
    }) *= 1.05;
  for (size_t i = 0; i < found.size(); i++) {
    double f = found[i], e = expected[i];
    bool good = isfinite(e) ? fabs(f - e) <= relative * fabs(e) + absolute
                            : only_whether_finite ? !isfinite(f) : isnan(e) ? isnan(f) : f == e;
    if (good) continue;
    fail(what + ": element " + std::to_string(i) + " of " + std::to_string(found.size()) + " is " + std::to_string(f) +
         ", expected " + std::to_string(e));
    return;
  }
}

inline double root_mean_square(const Doubles &values) {
  double sum = 0, count = 0;
  for (double value : values)
    if (isfinite(value)) sum += value * value, count++;
  return count ? sqrt(sum / count) : 0;
}

// The same where results are sums, whose rounding goes by the size of their terms; `least` where all may be zero.
inline void close_sums(const std::string &what, const Doubles &found, const Doubles &expected, double tolerance,
                       double least = 0) {
  close(what, found, expected, tolerance, tolerance * std::max(root_mean_square(expected), least));
}

void check_elements();
void check_attention();
void check_products();
