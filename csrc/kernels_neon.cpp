#define FITUNE_SET neon
#include "names.inc"
#include "kernels.inc"
