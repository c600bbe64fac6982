#define FITUNE_SET avx2
#include "names.inc"
#include "kernels.inc"
