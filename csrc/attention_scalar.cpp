#define FITUNE_SET scalar
#include "names.inc"
#include "attention.inc"
