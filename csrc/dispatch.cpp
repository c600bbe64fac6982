// Which kernels this build has, and which of them this machine can run.
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(FITUNE_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "fitune_kernels.h"

extern const FituneKernels fitune_kernels_scalar;
#if defined(__x86_64__)
extern const FituneKernels fitune_kernels_avx2;
extern const FituneKernels fitune_kernels_avx512;
extern const FituneKernels fitune_kernels_avx512_bf16;  // where the compiler knows the instructions
extern const FituneKernels fitune_kernels_amx;
#elif defined(__aarch64__)
extern const FituneKernels fitune_kernels_neon;
#endif

namespace {

#if defined(__x86_64__)
// Dot products of bfloat16 and of 8-bit integers in 512-bit registers.
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c & (1u << 11))) return false;  // AVX512-VNNI
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));                // AVX512-BF16
}

// Tiles, which Linux gives to a process that asks for them (5.16 and later).
bool has_amx() {
#if defined(FITUNE_HAS_AMX) && defined(__linux__)
  unsigned a, b, c, d;
  const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
  const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

bool among(const char *name, const char *names) {
  size_t length = strlen(name);
  for (const char *at = names; (at = strstr(at, name)); at += length)
    if ((at == names || at[-1] == ' ') && (at[length] == ' ' || !at[length])) return true;
  return false;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int fitune_abi(void) { return FITUNE_ABI; }

// What either kernel needs: the generic one (attention.inc) two transposed copies, three copies in rows, two blocks
// of queries, two of scores and one of results, each with room for what a product writes past its end; the one of
// bfloat16 (attention_bf16_*.inc) three copies in bfloat16 of the keys and values, and a list of queries with their
// gradients. The forward passes need less.
extern "C" __attribute__((visibility("default"))) int64_t fitune_attention_floats(int64_t tokens, int64_t d,
                                                                                   int backward) {
  int64_t wide = (d + 31) / 32 * 32, whole = (tokens + 31) / 32 * 32, longer = whole + 32, pad = 32, queries = 32;
  int64_t list = wide <= 64 ? 512 : 256, block = 512, slack = 512;
  int64_t one = d * longer + tokens * wide + queries * (wide + longer + wide + pad) + 4 * pad;
  int64_t generic = backward ? one + d * longer + 2 * tokens * wide + queries * (wide + longer) + 8 * pad : one;
  int64_t dot = backward ? 3 * whole * wide / 2 + 3 * list * (wide + 1) + 128 * wide + 28 * block + slack
                         : whole * wide + 48 * wide + 24 * block + slack;
  return generic > dot ? generic : dot;
}

extern "C" __attribute__((visibility("default"))) const char *fitune_available(void) {
#if defined(__x86_64__)
  // The compiler's run-time support reads cpuid and XCR0, so that a set the operating system does not save
  // is not reported.
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(FITUNE_HAS_AVX512_BF16)
  static const bool avx512_bf16 = avx512 && has_avx512_bf16(), amx = avx512_bf16 && has_amx();
  if (amx) return "amx avx512_bf16 avx512 avx2 scalar";
  if (avx512_bf16) return "avx512_bf16 avx512 avx2 scalar";
#endif
  return avx512 ? "avx512 avx2 scalar" : avx2 ? "avx2 scalar" : "scalar";
#elif defined(__aarch64__)
  return "neon scalar";  // NEON is part of every AArch64
#else
  return "scalar";
#endif
}

extern "C" __attribute__((visibility("default"))) const FituneKernels *fitune_kernels(const char *instruction_set) {
  const FituneKernels *all[] = {
#if defined(FITUNE_HAS_AMX)
      &fitune_kernels_amx,
#endif
#if defined(FITUNE_HAS_AVX512_BF16)
      &fitune_kernels_avx512_bf16,
#endif
#if defined(__x86_64__)
      &fitune_kernels_avx512, &fitune_kernels_avx2,
#elif defined(__aarch64__)
      &fitune_kernels_neon,
#endif
      &fitune_kernels_scalar};
  for (const FituneKernels *table : all)
    if (!strcmp(table->instruction_set, instruction_set))
      return among(instruction_set, fitune_available()) ? table : nullptr;
  return nullptr;
}
