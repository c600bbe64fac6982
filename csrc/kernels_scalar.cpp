#define FITUNE_SET scalar
#include "names.inc"
#include "kernels.inc"
