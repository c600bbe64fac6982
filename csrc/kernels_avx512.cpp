#include <immintrin.h>

#define FITUNE_NAME fitune_kernels_avx512
#define FITUNE_INSTRUCTION_SET "avx512"
#define FITUNE_DEQUANTISE_BF16_BLOCK "nf4_avx512.inc"
#include "kernels.inc"
