#include <immintrin.h>

#define FITUNE_NF4_BLOCKS "nf4_avx512.inc"
#define FITUNE_SET avx512_bf16
#include "names.inc"
#include "kernels.inc"
