#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 about its own undefined vectors
#include <immintrin.h>
#define FITUNE_SET avx512_bf16
#include "names.inc"
#include "product_registers.inc"
#include "product_int8_registers.inc"
#include "product.inc"
