#include <immintrin.h>

#define FITUNE_DEQUANTISE_BF16_BLOCK "nf4_avx512.inc"
#define FITUNE_SET avx512
#include "names.inc"
#include "kernels.inc"
