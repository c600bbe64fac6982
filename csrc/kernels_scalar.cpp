#define FITUNE_NAME fitune_kernels_scalar
#define FITUNE_INSTRUCTION_SET "scalar"
#include "kernels.inc"
