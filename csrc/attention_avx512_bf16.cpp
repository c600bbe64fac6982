#define FITUNE_SET avx512_bf16
#include "attention_bf16_forward.inc"
#include "attention_bf16_backward.inc"
#define FITUNE_ATTENTION_BF16
#include "names.inc"
#include "attention.inc"
