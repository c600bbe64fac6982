#define FITUNE_SET avx512
#include "names.inc"
#include "attention.inc"
