// Which kernels this build has, and which of them this machine can run.
#include <string.h>

#include "fitune_kernels.h"

extern const FituneKernels fitune_kernels_scalar;
#if defined(__x86_64__)
extern const FituneKernels fitune_kernels_avx2;
extern const FituneKernels fitune_kernels_avx512;
#elif defined(__aarch64__)
extern const FituneKernels fitune_kernels_neon;
#endif

extern "C" __attribute__((visibility("default"))) int fitune_abi(void) { return FITUNE_ABI; }

// Two transposed copies, three copies in rows, two blocks of queries, two of scores and one of results, each
// with room for what a product writes past its end (attention.inc); the forward pass needs less.
extern "C" __attribute__((visibility("default"))) int64_t fitune_attention_floats(int64_t tokens, int64_t d,
                                                                                   int backward) {
  int64_t wide = (d + 31) / 32 * 32, long_ = (tokens + 31) / 32 * 32 + 32, pad = 32, queries = 32;
  int64_t one = d * long_ + tokens * wide + queries * (wide + long_ + wide + pad) + 4 * pad;
  return backward ? one + d * long_ + 2 * tokens * wide + queries * (wide + long_) + 8 * pad : one;
}

extern "C" __attribute__((visibility("default"))) const char *fitune_available(void) {
#if defined(__x86_64__)
  // The compiler's run-time support reads cpuid and XCR0, so that a set the operating system does not save
  // is not reported.
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? "avx512 avx2 scalar" : avx2 ? "avx2 scalar" : "scalar";
#elif defined(__aarch64__)
  return "neon scalar";  // NEON is part of every AArch64
#else
  return "scalar";
#endif
}

extern "C" __attribute__((visibility("default"))) const FituneKernels *fitune_kernels(const char *instruction_set) {
  const FituneKernels *all[] = {
#if defined(__x86_64__)
      &fitune_kernels_avx512, &fitune_kernels_avx2,
#elif defined(__aarch64__)
      &fitune_kernels_neon,
#endif
      &fitune_kernels_scalar};
  for (const FituneKernels *table : all) {
    if (strcmp(table->instruction_set, instruction_set)) continue;
    // a whole name among the available ones
    const char *found = strstr(fitune_available(), instruction_set);
    return found ? table : nullptr;
  }
  return nullptr;
}
