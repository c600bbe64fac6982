#define FITUNE_SET neon
#include "names.inc"
#include "attention.inc"
