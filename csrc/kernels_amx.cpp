#include <immintrin.h>

#define FITUNE_NF4_BLOCKS "nf4_avx512.inc"
#define FITUNE_SET amx
#include "names.inc"
#include "kernels.inc"
