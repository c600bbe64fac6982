/* The whole interface of the native kernels: plain C, no torch, no Python.
 *
 * Legend: M rows (tokens), C hidden width, F feed-forward width, V vocabulary, D head dimension.
 * `kind` of a floating-point buffer: 0 float32, 1 bfloat16 (as uint16_t), 2 float16 (as uint16_t).
 * Every pointer is to contiguous memory and may lie at any alignment that its element type allows.
 * `threads` is the number of OpenMP threads to use. Results are the same from run to run; only `split` (of
 * attention_backward), which a caller may choose by the number of threads, changes the order of a sum.
 */
#ifndef FITUNE_KERNELS_H
#define FITUNE_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FITUNE_ABI = 8 };
enum { FITUNE_FLOAT32 = 0, FITUNE_BFLOAT16 = 1, FITUNE_FLOAT16 = 2 };
enum { FITUNE_MOMENT_MAP_WORDS = 256 + 256 + 65536 };
enum { FITUNE_SILU = 0, FITUNE_GELU_TANH = 1 };

/* Where a tensor [rows, tokens, heads, D] lies: D is contiguous, the strides are in elements. */
typedef struct FituneStrides {
  int64_t row, token, head;
} FituneStrides;

/* A document of packed rows: its tokens [start, stop) within row `row`, and the tokens [prefix_start,
 * prefix_stop) of the same row that come before them (empty: none), which it attends to as its own beginning. */
typedef struct FituneDocument {
  int32_t row, start, stop, prefix_start, prefix_stop;
} FituneDocument;

#define FITUNE_ATTENTION_ARGUMENTS                                                                         \
  const void *q, FituneStrides q_strides, const void *k, FituneStrides k_strides, const void *v,           \
      FituneStrides v_strides, int kind, int64_t rows, int64_t tokens, int64_t heads, int64_t kv_heads,    \
      int64_t d, const FituneDocument *documents, int64_t document_count, int64_t window, float scale, float cap, \
      void *out, float *lse, float *workspace, int threads

#define FITUNE_ATTENTION_BACKWARD_ARGUMENTS                                                                \
  const void *q, FituneStrides q_strides, const void *k, FituneStrides k_strides, const void *v,           \
      FituneStrides v_strides, int kind, int64_t rows, int64_t tokens, int64_t heads, int64_t kv_heads,    \
      int64_t d, const FituneDocument *documents, int64_t document_count, int64_t window, float scale, float cap, \
      const void *out, const void *grad_out, const float *lse, void *grad_q, void *grad_k, void *grad_v,   \
      int64_t split, float *workspace, int threads

/* One new token of each of n rows: q [n, heads, D], k and v [n, kv_heads, D], all contiguous. Row i's keys and values
 * lie in slot i of `keys` and `values` [slots, kv_heads, capacity, D]; its new ones are written to column columns[i],
 * and it attends to columns 0 .. columns[i], with a window above 0 to the last `window` of them. The first `shared`
 * columns are the same in all slots, and are read from the first. */
#define FITUNE_SLOT_ATTENTION_ARGUMENTS                                                                        \
  const void *q, const void *k, const void *v, int kind, int64_t n, int64_t heads, int64_t kv_heads, int64_t d, \
      void *keys, void *values, int64_t capacity, const int64_t *columns, int64_t shared, int64_t window,      \
      float scale, float cap, void *out, int threads

/* A frozen matrix W [n, k] with, where r > 0, an adapter: W + B A, A [r, k], B [n, r] with its scaling in it.
 * `weight` is bfloat16 [n, k], or where absmax_codes is given NF4 codes with double-quantised scales.
 * Forward: y [m, n] = x W^T + bias + u B^T with u [m, r] = x A^T, both written.
 * Backward: y is the gradient g [m, n], which is read, and u receives v [m, r] = g B. */
typedef struct FituneSegment {
  const void *weight;
  const uint8_t *absmax_codes;
  const float *nested_absmax;
  double offset;
  const uint16_t *bias, *a, *b; /* bias [n] or null */
  int64_t n, r;
  uint16_t *y;
  int64_t y_stride;
  uint16_t *u;
} FituneSegment;

/* One gradient of an adapter: out = scale * p^T q [r, c] (+ out), or its transpose [c, r].
 * p [m, r] and q [m, c] are bfloat16 with row strides. */
typedef struct FituneAdapterGradient {
  const uint16_t *p, *q;
  int64_t p_stride, q_stride, r, c;
  double scale;
  float *out;
  int64_t transposed, accumulate;
} FituneAdapterGradient;

/* What a layer's owner keeps for products in 8-bit integers: scales [n], one for each row of W (its largest magnitude
 * / 127; 0 for a row of zeros, NaN for one that is not finite), and W's outlier columns [n, outliers] in bfloat16. */
typedef struct FituneInt8Segment {
  const float *scales;
  const uint16_t *outlier_columns;
} FituneInt8Segment;

/* Products of which the frozen part is done in 8-bit integers with exact sums, and the adapters' part in bfloat16.
 * Rows of x and g are recoded on the way, to nearest, one scale for each row and block of depth: at most `block`
 * values (a multiple of 64, or 0 for all of a segment's). Otherwise as FituneProducts. */
typedef struct FituneInt8Products {
  void (*row_scales)(const FituneSegment *segment, int64_t k, const float *table, float *scales, int threads);

  /* outliers [count] increasing -> columns [n, count]. */
  void (*outlier_columns)(const FituneSegment *segment, int64_t k, const float *table, const int32_t *outliers,
                          int64_t count, uint16_t *columns, int threads);

  int64_t (*workspace_bytes)(const FituneSegment *segments, int64_t count, int64_t m, int64_t k, int64_t outliers,
                             int64_t block, int backward, int threads);

  /* The columns `outliers` of x are multiplied in bfloat16 with outlier_columns. */
  void (*forward)(const uint16_t *x, int64_t x_stride, int64_t m, int64_t k, const FituneSegment *segments,
                  const FituneInt8Segment *recoded, int64_t count, const int32_t *outliers, int64_t outlier_count,
                  int64_t block, const float *table, void *workspace, int threads);

  void (*backward)(int64_t m, int64_t k, const FituneSegment *segments, const FituneInt8Segment *recoded,
                   int64_t count, int64_t block, const float *table, void *grad_x, int64_t grad_x_stride, int kind,
                   int accumulate, void *workspace, int threads);
} FituneInt8Products;

/* Products of bfloat16 with float32 sums. At most 16 segments a call. `table` is the one of nf4_dequantise.
 * Workspaces are of the size that the function before says, at any alignment. */
typedef struct FituneProducts {
  int64_t (*workspace_bytes)(const FituneSegment *segments, int64_t count, int64_t m, int64_t k, int backward,
                             int threads);

  /* All segments share x [m, k]. */
  void (*forward)(const uint16_t *x, int64_t x_stride, int64_t m, int64_t k, const FituneSegment *segments,
                  int64_t count, const float *table, void *workspace, int threads);

  /* grad_x [m, k], float32 or bfloat16 = the sum over segments of g W + v A (+ grad_x). */
  void (*backward)(int64_t m, int64_t k, const FituneSegment *segments, int64_t count, const float *table,
                   void *grad_x, int64_t grad_x_stride, int kind, int accumulate, void *workspace, int threads);

  int64_t (*gradient_workspace_bytes)(const FituneAdapterGradient *gradients, int64_t count, int64_t m, int threads);

  /* At most 32 a call; neighbours with the same q are done together. */
  void (*adapter_gradients)(const FituneAdapterGradient *gradients, int64_t count, int64_t m, void *workspace,
                            int threads);

  const FituneInt8Products *int8;
} FituneProducts;

typedef struct FituneKernels {
  const char *instruction_set;

  /* n weights in blocks of 64 -> codes[(n + 1) / 2], the first of a pair in the high four bits; absmax[ceil(n / 64)]. */
  void (*nf4_quantise)(const void *weight, int kind, int64_t n, uint8_t *codes, float *absmax, int threads);

  /* The inverse, with double-quantised scales:
   * absmax of block i = table[absmax_codes[i]] * nested_absmax[i / 256] + offset. */
  void (*nf4_dequantise)(const uint8_t *codes, const uint8_t *absmax_codes, const float *nested_absmax,
                         const float *table, float offset, int64_t n, void *out, int kind, int threads);

  /* out[m] = x[m] * rstd[m] * (shift + weight), rstd[m] = 1 / sqrt(mean(x[m]^2) + eps). x, out [M, C]. */
  void (*rms_norm)(const void *x, const void *weight, int kind, int64_t m, int64_t c, float eps, float shift,
                   void *out, float *rstd, int threads);

  /* grad_x of the same, from x and rstd; `residual` [M, C] (may be null) is added to it. */
  void (*rms_norm_backward)(const void *grad_out, const void *x, const void *weight, const float *rstd,
                            const void *residual, int kind, int64_t m, int64_t c, float shift, void *grad_x,
                            int threads);

  /* out = activation(gate) * up, element by element, n elements. */
  void (*gated_activation)(const void *gate, const void *up, int kind, int activation, int64_t n, void *out,
                           int threads);

  /* Gradients of the same; grad_gate and grad_up may be the buffers of gate and up.
   * `out` (may be null) receives activation(gate) * up again, for those that did not keep it. */
  void (*gated_activation_backward)(const void *grad_out, const void *gate, const void *up, int kind,
                                    int activation, int64_t n, void *grad_gate, void *grad_up, void *out,
                                    int threads);

  /* logits [M, V] -> logprob[m] = log softmax(logits[m])[target[m]]; and, if `grad`, in place:
   * logits[m, v] = (v == target[m]) - softmax(logits[m])[v], the gradient of logprob[m]. */
  void (*token_logprob)(void *logits, int kind, const int64_t *target, int64_t m, int64_t v, int grad,
                        float *logprob, int threads);

  /* x [tokens, heads, D] with row stride `stride`, rotated in the first 2 * half columns of every head by the
   * angles of its position: (a, b) -> (a cos - b sin, b cos + a sin), a = x[i], b = x[i + half].
   * cos, sin [tokens, half] float32. `inverse` turns the other way (the gradient). out [tokens, heads, D], which may
   * be x where x has no gaps. */
  void (*rotate)(const void *x, int kind, int64_t tokens, int64_t heads, int64_t d, int64_t half,
                 int64_t token_stride, int64_t head_stride, const float *cos, const float *sin, int inverse,
                 void *out, int threads);

  /* Causal attention within documents: out, lse[rows, heads, tokens] = log of each query's sum of e^score.
   * Scores are q.k * scale, and with a cap above 0: cap * tanh(q.k * scale / cap).
   * A key counts if it is at most `window` - 1 positions back (window 0: any distance). Positions count from the
   * prefix's first token. workspace: threads * fitune_attention_floats(tokens, d, 0) float32. */
  void (*attention)(FITUNE_ATTENTION_ARGUMENTS);

  /* Its gradients [rows, tokens, heads or kv_heads, D], contiguous. `split` (1, or heads / kv_heads) spreads the
   * queries that share a key head over so many tasks. workspace: threads * fitune_attention_floats(tokens, d, 1)
   * + 2 * rows * kv_heads * split * tokens * roundup(d, 32) float32. */
  void (*attention_backward)(FITUNE_ATTENTION_BACKWARD_ARGUMENTS);

  /* Causal attention of one new token a row over keys and values in slots; scores as above. out [n, heads, D]. */
  void (*slot_attention)(FITUNE_SLOT_ATTENTION_ARGUMENTS);

  /* out = x + scale * y, n elements; out may be x. */
  void (*add_scaled)(const void *x, const void *y, int kind, int64_t n, float scale, void *out, int threads);

  /* One step of AdamW on p [n] from grad [n]. Both moments are codes [n] with absmax [ceil(n / 256)]; a map is
   * FITUNE_MOMENT_MAP_WORDS words of 4 bytes: the 256 values of the codes, increasing; the middles between neighbours,
   * and infinity; and for the high 16 bits of every float32 the code (int32) nearest to the least value in [-1, 1]
   * with these bits: the greatest may be one code higher, no more.
   * settings: beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - rate * weight decay, rate / (1 - beta1^step),
   * sqrt(1 - beta2^step). Gradients must be finite. */
  void (*adamw8bit)(float *p, const float *grad, uint8_t *codes1, uint8_t *codes2, float *absmax1, float *absmax2,
                    int64_t n, const float *map1, const float *map2, const float *settings, int threads);

  /* Null where the instruction set has no dot products of bfloat16. */
  const FituneProducts *products;
} FituneKernels;

/* A root mean square norm over `width` values; no norm where weight [width] (bfloat16) is null. */
typedef struct FituneNorm {
  const uint16_t *weight;
  double eps, shift;
  int64_t width;
} FituneNorm;

/* A decoder layer, bfloat16, as generation steps through it: x + residual * after(part(before(x))), first for the
 * attention, then for the gated MLP.
 * norms: before and after the attention, before and after the MLP. head_norms: of queries and keys, over a head's D
 * or over all heads of a token; turned_first: they come after the rotary embedding (half 0: there is none).
 * The segments' results (y, u) have room for all rows, contiguous: what lies between the kernels is kept there. */
typedef struct FituneDecodeLayer {
  FituneNorm norms[4], head_norms[2];
  const FituneSegment *inputs, *output, *branches, *down; /* queries, keys, values; 1; gate, up; 1 */
  int64_t c, f, heads, kv_heads, d, half, turned_first, activation, window;
  double scale, cap, residual;
  void *keys, *values; /* slots, as slot_attention takes them */
  int64_t capacity;
} FituneDecodeLayer;

/* x [m, c], one token a row -> out [m, c]; cos, sin [m, half] of their positions. Needs kernels->products. */
void fitune_decode_layer(const FituneKernels *kernels, const FituneDecodeLayer *layer, const uint16_t *x, int64_t m,
                         const float *cos, const float *sin, const int64_t *columns, int64_t shared,
                         const float *table, uint16_t *out, int threads);

int fitune_abi(void);

/* Scratch that one thread needs for attention, in float32 values. */
int64_t fitune_attention_floats(int64_t tokens, int64_t d, int backward);

/* The instruction sets this build has kernels for and this machine (CPU and operating system) can run, best
 * first, separated by spaces. */
const char *fitune_available(void);

/* The kernels for one of these sets; null for any other name. */
const FituneKernels *fitune_kernels(const char *instruction_set);

#ifdef __cplusplus
}
#endif
#endif
