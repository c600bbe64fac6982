#define FITUNE_NAME fitune_kernels_neon
#define FITUNE_INSTRUCTION_SET "neon"
#include "kernels.inc"
