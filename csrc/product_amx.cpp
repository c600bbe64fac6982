#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 about its own undefined vectors
#include <immintrin.h>
#define FITUNE_SET amx
#include "names.inc"
#include "product_tiles.inc"
#include "product_int8_tiles.inc"
#include "product.inc"
