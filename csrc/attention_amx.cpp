#define FITUNE_SET amx
#define FITUNE_TILES
#include "attention_bf16_forward.inc"
#include "attention_bf16_backward.inc"
#define FITUNE_ATTENTION_BF16
#include "names.inc"
#include "attention.inc"
