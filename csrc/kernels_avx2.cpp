#define FITUNE_NAME fitune_kernels_avx2
#define FITUNE_INSTRUCTION_SET "avx2"
#include "kernels.inc"
