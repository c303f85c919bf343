/* flashprefill: sparse attention for the prefill of long prompts. The C ABI.
 *
 * This header is the one binding contract of the library: every language reaches it through here. Three verbs:
 *
 *     Problem --fp_select(policy)--> BlockMask --fp_attend--> out, lse          fp_prefill does both
 *
 * Conventions
 *   - Descriptors are plain structs whose first field is their own size: set it with sizeof. The functions fp_*_init do
 *     that and fill the defaults; later versions of the library append fields and read only what the
 *     caller's size covers.
 *   - Strides count elements, not bytes. Lengths count tokens.
 *   - No call allocates, synchronises or reads an environment variable: results, masks and scratch memory are
 *     the caller's.
 *   - A bad argument is refused before any work, with nothing written; fp_last_error() then says in one line which
 *     argument, what it was and what it must be.
 *   - Functions may be called from many threads at once, on different outputs and workspaces.
 *   - CPU calls return when the work is done. CUDA calls return when the work is on the stream.
 */
#ifndef FLASHPREFILL_FLASHPREFILL_H_
#define FLASHPREFILL_FLASHPREFILL_H_

#include <stddef.h>
#include <stdint.h>

#include "policies.h"

#if defined(_WIN32)
#define FP_API __declspec(dllexport)
#else
#define FP_API __attribute__((visibility("default")))
#endif

#define FP_VERSION_MAJOR 0
#define FP_VERSION_MINOR 1
#define FP_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- status */

typedef enum fp_status {
  FP_OK = 0,
  FP_INVALID_ARGUMENT = 1, /* fp_last_error() names the argument, its value and what it must be */
  FP_UNSUPPORTED = 2,      /* right, but no backend here does it */
  FP_OUT_OF_MEMORY = 3,
  FP_DEVICE_ERROR = 4, /* the device or its driver refused; the message is theirs */
  FP_INTERNAL = 5
} fp_status;

/* The message of the calling thread's last failed call; "" if there was none. Valid until that thread's next call. */
FP_API const char* fp_last_error(void);

/* "0.1.0" */
FP_API const char* fp_version(void);

/* ---------------------------------------------------------------- problem */

/* FP_E4M3 is for k and v only: FP8 caches with 4 bits of exponent, 3 of mantissa, NaN and no infinity (OCP E4M3;
 * PyTorch's float8_e4m3fn). On FP_CUDA the workspace also holds the call's k and v in q's dtype then. */
typedef enum fp_dtype { FP_F32 = 0, FP_BF16 = 1, FP_F16 = 2, FP_E4M3 = 3 } fp_dtype;

typedef enum fp_device { FP_CPU = 0, FP_CUDA = 1 } fp_device;

/* A view of q, k, v or out. The axes are (sequence or page, token, head, head_dim).
 *   rectangular  element(b, t, h, d) = data + b*stride[0] + t*stride[1] + h*stride[2] + d*stride[3]
 *   packed       one list of all sequences' tokens: t runs over it, stride[0] is not read
 *   paged        stride[0] steps from page to page, t is the slot inside the page
 * Strides of inputs may be negative or zero. */
typedef struct fp_tensor {
  void* data;
  int32_t dtype; /* fp_dtype */
  int32_t reserved;
  int64_t stride[4]; /* in elements */
} fp_tensor;

/* One attention call: non-owning views, the batch layout, and what is computed over it.
 *
 * q is packed if cu_seqlens_q is given, else rectangular [batch, max_seqlen_q, q_heads, head_dim].
 * k and v are paged if block_table is given, else packed if cu_seqlens_k is given, else rectangular
 * [batch, max_seqlen_k, kv_heads, head_dim]. The keys of sequence b: seqused_k[b] if given, else what cu_seqlens_k
 * says, else max_seqlen_k. Query head h reads KV head h / (q_heads / kv_heads).
 *
 * causal is aligned bottom-right: query row i of a sequence with Lq rows and Lk keys sits at position P + i, P = Lk -
 * Lq, and sees the keys at positions 0 .. P + i. P must not be negative. Without causal every row sees every key;
 * then dense, xattention (on FP_CPU) and spargeattn select, and window_blocks may be at most 1 and
 * dense_tail_blocks 0, since there is no diagonal to count them from.
 *
 * On FP_CUDA q, k, v, out, masks, workspaces and the four index arrays are device memory; on FP_CPU all is host memory.
 */
typedef struct fp_problem {
  uint32_t struct_size;
  int32_t device;       /* fp_device */
  int32_t device_index; /* which one of them */
  int32_t batch;        /* sequences, >= 0 */
  int32_t q_heads;      /* a multiple of kv_heads */
  int32_t kv_heads;     /* >= 1 */
  int32_t head_dim;     /* 1 .. 512 on the CPU; of q, k and v alike */
  int32_t causal;       /* 0 or 1 */
  int32_t final_chunk;  /* 1: the rows end their prompts, so a policy's dense tail applies; 0: more chunks follow */
  float softmax_scale;  /* > 0 */
  int64_t total_q;      /* rows of q in all: packed: its tokens; rectangular: batch * max_seqlen_q */
  int64_t total_k;      /* tokens of packed k and v; not read otherwise */
  int64_t max_seqlen_q; /* the longest sequence; an upper bound will do if packed */
  int64_t max_seqlen_k;
  fp_tensor q, k, v;
  const int32_t* cu_seqlens_q; /* [batch + 1], cumulative, from 0 to total_q; or NULL */
  const int32_t* cu_seqlens_k; /* [batch + 1], cumulative, from 0 to at most total_k; or NULL */
  const int32_t* seqused_k;    /* [batch]; or NULL */
  const int32_t* block_table;  /* [batch, pages_per_seq]: page of each run of page_size tokens; or NULL */
  int64_t block_table_stride;  /* elements from one sequence's row to the next */
  int32_t pages_per_seq;       /* columns of block_table */
  int32_t page_size;           /* tokens per page */
  int64_t page_count;          /* pages in the cache; entries of block_table are below it */
  const uint8_t* final_chunks; /* [batch], host memory: final_chunk of each sequence; NULL: final_chunk holds for all */
  /* Scales of FP_E4M3 keys and values: what their stored numbers are multiplied by. That of sequence b and KV head h is
   * at scale + b*stride[0] + h*stride[1], so strides of 0 make one scale for all. NULL: 1. Elsewhere NULL. */
  const float* k_scale;
  const float* v_scale;
  int64_t k_scale_stride[2];
  int64_t v_scale_stride[2];
} fp_problem;

/* ---------------------------------------------------------------- execution */

/* Where the seconds of a synchronous call went. */
typedef struct fp_timings {
  double select_seconds;
  double attend_seconds;
  double guard_seconds; /* audits, and what they made the guard repair */
} fp_timings;

/* How exact attention's products are.
 *
 * FP_MATH_8BIT permits 8-bit products where a backend has them: q k in int8, with a scale per query row and per 128
 * keys, and weights times values in e4m3 (FP8), with fp32 sums. Outputs err by about 4 % then, as the inputs' own
 * products do by 0.3 %; selection is what it is without. Today that is Hopper's kernels (target "sm90a"), for head_dim
 * above 64 up to 128 and blocks of a multiple of 128; everything else goes on with the inputs' own. A NaN or infinity
 * in a key makes the rows that attend to it NaN, one in a value that value's column; a key that is far larger than its
 * neighbours makes them inexact. The workspace also holds K and V in 8 bits then. */
typedef enum fp_math { FP_MATH_INPUT = 0, FP_MATH_8BIT = 1 } fp_math;

typedef enum fp_guard_mode {
  FP_GUARD_OBSERVE = 0, /* measure, and change nothing */
  FP_GUARD_REPAIR = 1,  /* heads that keep too little get a larger budget, once, before anything is attended to */
  FP_GUARD_STRICT = 2   /* heads that keep too little keep everything */
} fp_guard_mode;

/* What became of a head. */
typedef enum fp_guard_outcome {
  FP_GUARD_WHOLE = 0,    /* nothing is left out, so nothing was audited: its recall is 1 */
  FP_GUARD_HELD = 1,     /* it keeps enough */
  FP_GUARD_REPAIRED = 2, /* it kept too little, and now keeps more */
  FP_GUARD_DENSE = 3,    /* it kept too little, and now keeps everything */
  FP_GUARD_LOW = 4       /* it keeps too little, and was left as it is (observe) */
} fp_guard_outcome;

/* The guard: it measures how much of the attention a mask keeps, and may act on it.
 *
 * The *recall* of a query row is the share of its softmax that lies on keys which the mask keeps, without its mean
 * correction. An *audit* computes it exactly, for a sample of rows: those of a head whose tile leaves something out, in
 * the order of the prompt, are cut into as many equal strata as rows are audited, and one row of each is drawn. What is
 * drawn depends on seed, layer, sequence, head and prefix alone, and differs from head to head. docs/guard.md says what
 * follows from such a sample, and with which probability.
 *
 * A head keeps too little if recall_low is below target, or if more than 1 in 20 of its audited rows have a recall
 * below 0.5. After a repair all heads are audited once more, with rows drawn afresh, and these are reported.
 *
 * The arrays are the caller's, device memory on FP_CUDA, else host memory, or NULL. Heads are query heads; those that
 * share a list are repaired together. On FP_CUDA, where nothing is read back, FP_GUARD_REPAIR always selects twice. */
typedef struct fp_guard {
  uint32_t struct_size;
  int32_t mode;  /* fp_guard_mode */
  int32_t rows;  /* audited rows per sequence and head; 0: one in 2048, at least 32 per prompt and 8 per chunk */
  int32_t layer; /* of the model: part of the seed */
  uint64_t seed;
  float target; /* in (0, 1] */
  float risk;   /* in (0, 1): the probability with which a certificate may be wrong */
  /* What is learned from call to call, [q_heads], from 0 on; NULL: nothing. Of repair and strict. A head whose level is
   * x is selected for with 4^x times the budget (gain / 4^x, 1 - (1 - mass) / 4^x, ...). A head that keeps too little
   * rises by 1, up to 4; a head that keeps enough sinks by a tenth. On FP_CPU. */
  float* levels;
  float* recall;         /* [batch, q_heads]: mean over the rows whose tile leaves something out */
  float* recall_low;     /* [batch, q_heads]: one-sided lower bound at 95 %, approximate */
  float* recall_p05;     /* [batch, q_heads]: 5th percentile of the audited rows */
  int32_t* rows_audited; /* [batch, q_heads] */
  int32_t* missed_block; /* [batch, q_heads]: of the blocks left out that weigh most in some audited row, the one that
                            weighs most over all of them; -1: none */
  int32_t* outcome;      /* [batch, q_heads]: fp_guard_outcome */
  float* certificate;    /* [batch]: lower bound of the mean over all heads' audited strata; holds with probability
                            1 - risk */
  double* moments;       /* [batch, 3]: number, sum and sum of squares of the recalls of all audited rows, from which a
                            certificate for several calls together follows */
} fp_guard;

/* Who does the work, and with what. NULL wherever this is asked for means all defaults. */
typedef struct fp_exec {
  uint32_t struct_size;
  int32_t threads;     /* CPU: threads at most; 0: as many as OpenMP would use */
  const char* backend; /* a name from fp_backend_name; NULL: the best one for the problem's device */
  const char* target;  /* from fp_backend_targets: an instruction set, or a GPU's kernels; NULL: the best one here */
  void* stream;        /* CUDA: a cudaStream_t; NULL: the default stream */
  fp_timings* timings; /* written by CPU backends; may be NULL */
  fp_guard* guard;     /* of fp_prefill and fp_audit; NULL: no guard, and no cost */
  int32_t math;        /* fp_math */
  int32_t reserved;
} fp_exec;

/* ---------------------------------------------------------------- policies */

/* The structs of all policies are in policies.h. Fill one with its published defaults: policy points at the struct of
 * that kind, size is its sizeof. */
FP_API fp_status fp_policy_init(int32_t kind, void* policy, size_t size);

/* The name of a method in text ("sketch"), by index from 0 on; NULL past the end. *kind, if kind is not NULL, becomes
 * its fp_policy_kind. */
FP_API const char* fp_policy_name(int32_t index, int32_t* kind);

/* Describe a field of the policies of this kind, by index from 0 on: the method's own fields first, then those of
 * fp_policy that it has. FP_INVALID_ARGUMENT past the end. */
FP_API fp_status fp_policy_field_at(int32_t kind, int32_t index, fp_policy_field* field);

/* Read a policy from text, such as "sketch" or "sketch(mass=0.9, sink_blocks=2)". The name may be in upper or lower
 * case. Fields that are not named keep their defaults, and a given alternative (Sketch's alpha) unsets the others.
 * Values are numbers, true and false, the names of a choice, none where a field may be unset, and lists for tables
 * ("xattention(head_thresholds=[0.9, 0.8])", "minference(heads=[[0, 1000, 6096], [1, 128, 1024]])").
 *
 * *needed, if needed is not NULL, becomes the bytes that the policy takes: its struct, and its tables behind it. With
 * policy NULL nothing is written. Otherwise policy points at size bytes, aligned to 8, and size must be at least that;
 * pointers to tables lead into the same memory. */
FP_API fp_status fp_policy_parse(const char* text, void* policy, size_t size, size_t* needed);

/* Write a policy as text that fp_policy_parse reads back: what decides (alpha, mass, ...) and what is not a default.
 * Returns the length of the whole text; writes at most size bytes of it, with a final zero. 0 for a policy that
 * fp_policy_parse would refuse. */
FP_API size_t fp_policy_print(const fp_policy* policy, char* text, size_t size);

/* ---------------------------------------------------------------- block mask */

/* Why a sequence was not selected for. */
typedef enum fp_fallback {
  FP_SELECTED = 0,
  FP_FALLBACK_SHORT = 1, /* the forced blocks alone are all there is, or the policy asks for more tokens than there are,
                            or (fp_prefill on CUDA) the sequence has too few keys for a selection to pay: nothing was
                            scored, everything is kept */
  FP_FALLBACK_DENSE = 2, /* the policy keeps everything: Dense, or a share of 1 */
  FP_BAD_SEQUENCE = -1 /* CUDA: its lengths in device memory are impossible (out of range, or fewer keys than rows with
                          causal); nothing was selected or computed for it */
} fp_fallback;

/* One bit for each (mask head, query tile, key block). The caller owns the memory.
 *
 * A mask head is a query head, or with share_heads a KV head. A tile is tile_tokens query tokens of one sequence: 128,
 * or with share_heads floor(128 / group), whose rows are those tokens times the group's heads, heads fastest. Tile m of
 * sequence b is row base + m of each head, with base = (rows of q before sequence b) / tile_tokens + b. So rows need no
 * prefix sums, at most one per sequence stays unused, and tile_rows = total_q / tile_tokens + batch. Bit j of word w of
 * a row is block 64 w + j. Bits of blocks that no row of the tile may see are zero when select wrote the mask, and
 * ignored when attend reads it. */
typedef struct fp_block_mask {
  uint32_t struct_size;
  int32_t heads;           /* mask heads */
  int32_t tile_tokens;     /* query tokens per tile */
  int32_t block_size;      /* keys per block */
  int32_t share_heads;     /* 0 or 1 */
  int32_t mean_correction; /* fp_mean_correction: how blocks whose bit is zero count */
  int64_t tile_rows;
  int64_t words;     /* 64-bit words per row */
  uint64_t* bits;    /* [heads, tile_rows, words] */
  int32_t* counts;   /* [heads, tile_rows]: bits set; written by select; may be NULL */
  int32_t* fallback; /* [batch]: fp_fallback; written by select; may be NULL */
  /* Verticals and slashes: keys finer than blocks, for causal masks of query heads (MInference). Every tile of a
   * (sequence, head) sees, besides its blocks, the keys in a list of verticals, and for each slash d the keys d before
   * its rows' positions, from the first row's to the last's. vertical_slash is [batch, heads, 2 + max_verticals +
   * max_slashes]: the number of verticals, the number of slashes, the verticals, ascending, and from index
   * 2 + max_verticals on the slashes, ascending. With max_verticals = max_slashes = 0 there are none. With them, counts
   * are kept keys in blocks, rounded up. */
  int32_t* vertical_slash;
  int32_t max_verticals;
  int32_t max_slashes;
  /* Key lists: single keys that are gathered for a *segment*, segment_tiles neighbouring tiles of a (sequence, mask
   * head), for causal masks (Gather). Its tiles see, besides their blocks, the keys of its list; rows still see no
   * further than themselves, and a key in a kept block counts once. Segment i of sequence b is row base + i of each
   * head, with base = (rows of q before sequence b) / segment tokens + b, segment tokens = segment_tiles * tile_tokens,
   * and segment_rows = total_q / segment tokens + batch. key_lists is [heads, segment_rows, 2 + max_keys]: how many
   * keys the list holds, how many the policy wanted (more than max_keys: the list holds the best of them), and the
   * keys, ascending. With max_keys = 0 there are none. With them, counts are kept keys in blocks, rounded to the
   * nearest, and with mean_correction a block counts by the mean of its keys that are in no list. Not together with
   * verticals or slashes. */
  int32_t* key_lists;
  int64_t segment_rows; /* 0 without lists */
  int32_t segment_tiles;
  int32_t max_keys;
  /* Skipping: what attend leaves out of the kept blocks when it sees the scores. A tile's kept keys are taken 128 at a
   * time, in order, those of blocks on the diagonal apart from those before. A row to which the heaviest of such a
   * chunk weighs less than `skip` times the heaviest key that it met before counts none of the chunk. So of all weights
   * of a row that sees n keys, at most the share n skip / (1 + n skip) is lost. Sequences of at most 8 rows per KV head
   * (decoding) skip nothing. For masks without verticals, slashes and key lists; on FP_CUDA with head_dim up to 128,
   * and, but on Hopper, at most 2048 blocks per sequence. */
  float skip; /* in [0, 1); 0: nothing is skipped */
  int32_t reserved;
  int32_t* skipped; /* [heads, tile_rows]: blocks that a tile's rows skipped on average, rounded to the nearest; written
                       by attend where skip > 0; may be NULL */
} fp_block_mask;

/* Fill in the geometry of the mask that this policy makes for this problem. The pointers are left alone. */
FP_API fp_status fp_mask_describe(const fp_problem* problem, const fp_policy* policy, fp_block_mask* mask);

/* What a mask keeps. The arrays are the caller's, in host memory; any of them may be NULL. */
typedef struct fp_stats {
  uint32_t struct_size;
  int32_t reserved;
  int64_t* kept;     /* [batch, mask heads]: kept blocks, summed over tiles */
  int64_t* total;    /* [batch]: blocks that are visible to some row of their tile, summed over the tiles of one head */
  int32_t* fallback; /* [batch] */
  int64_t* overflowed; /* [batch, mask heads]: key lists for which the policy wanted more keys than they hold */
  int64_t* skipped;    /* [batch, mask heads]: blocks among the kept ones that attend skipped, summed over tiles: after
                          it, of a mask with `skipped`; else 0 */
} fp_stats;

/* density of a sequence and head = kept / total. CPU masks only. */
FP_API fp_status fp_mask_stats(const fp_problem* problem, const fp_block_mask* mask, fp_stats* stats);

/* ---------------------------------------------------------------- the three verbs */

/* out has q's dtype and q's layout (packed or rectangular). lse, if given, is the natural logarithm of the softmax
 * denominator, fp32, correction included: element (b, h, t) at lse + b*lse_stride[0] + h*lse_stride[1] +
 * t*lse_stride[2]; packed: b counts as 0 and t runs over all sequences. A row that sees nothing gets zeros and -inf. */
typedef struct fp_output {
  uint32_t struct_size;
  int32_t reserved;
  fp_tensor out;
  float* lse; /* may be NULL */
  int64_t lse_stride[3];
} fp_output;

/* Bytes of scratch memory that the call with the same arguments needs (at 64-byte alignment). May be 0. */
FP_API fp_status fp_select_workspace(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec,
                                     size_t* bytes);
FP_API fp_status fp_attend_workspace(const fp_problem* problem, const fp_block_mask* mask, const fp_exec* exec,
                                     size_t* bytes);
FP_API fp_status fp_prefill_workspace(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec,
                                      size_t* bytes);

/* Find the blocks that matter. Reads q and k; writes mask's bits, and its counts and fallback where given. */
FP_API fp_status fp_select(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec, fp_block_mask* mask,
                           void* workspace, size_t workspace_bytes);

/* Exact softmax attention over the kept blocks. */
FP_API fp_status fp_attend(const fp_problem* problem, const fp_block_mask* mask, const fp_exec* exec,
                           const fp_output* output, void* workspace, size_t workspace_bytes);

/* Both. mask may be NULL (its memory is then part of the workspace), or a described mask with memory, to be kept. Of
 * such a mask bits, vertical_slash and key_lists may be NULL too, and are then part of the workspace: whoever counts
 * what is kept needs counts alone. */
FP_API fp_status fp_prefill(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec,
                            fp_block_mask* mask, const fp_output* output, void* workspace, size_t workspace_bytes);

/* Measure what a mask keeps, by exec's guard, which must be given. Reads q and k. Modes other than FP_GUARD_OBSERVE
 * write to the mask: a head that keeps too little then keeps everything, since a mask tells no budget to enlarge. */
FP_API fp_status fp_audit_workspace(const fp_problem* problem, const fp_block_mask* mask, const fp_exec* exec,
                                    size_t* bytes);
FP_API fp_status fp_audit(const fp_problem* problem, fp_block_mask* mask, const fp_exec* exec, void* workspace,
                          size_t workspace_bytes);

/* *keys becomes the number of keys up to which fp_prefill keeps all of a sequence's blocks, whatever it holds, since a
 * selection would take more time than it saves (FP_FALLBACK_SHORT): by this policy, on exec's backend or the best one
 * for the device (fp_device), on CUDA for the current GPU. An engine with a dense kernel of its own may use that for
 * them. 0: there is no such number. Sink and window, which a policy's fields tell, are not counted. */
FP_API fp_status fp_prefill_dense_keys(const fp_policy* policy, int32_t device, const fp_exec* exec, int64_t* keys);

/* Zero a struct and set its size; fp_problem also gets causal = final_chunk = 1, fp_guard target = 0.9 and risk =
 * 0.001.
 */
FP_API void fp_problem_init(fp_problem* problem);
FP_API void fp_exec_init(fp_exec* exec);
FP_API void fp_guard_init(fp_guard* guard);
FP_API void fp_block_mask_init(fp_block_mask* mask);
FP_API void fp_output_init(fp_output* output);
FP_API void fp_stats_init(fp_stats* stats);

/* ---------------------------------------------------------------- what is here */

/* Backends in this build, in no order: "cpu", "reference", ... NULL past the end. */
FP_API const char* fp_backend_name(int32_t index);

/* 1 if the backend can run on this machine, else 0. */
FP_API int32_t fp_backend_available(const char* backend);

/* One line about the backend on this machine: instruction sets, device names, or why it can't run. Returns the length
 * of the whole line; writes at most size bytes of it, with a final zero. */
FP_API size_t fp_backend_describe(const char* backend, char* text, size_t size);

/* Names of the backend's instruction sets that this machine has, best first, separated by spaces. Same return. */
FP_API size_t fp_backend_targets(const char* backend, char* text, size_t size);

/* The OpenMP runtime that CPU threads come from ("libgomp-1e6c3fc7.so.1 (torch)"), or "none". Same return. */
FP_API size_t fp_thread_runtime(char* text, size_t size);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FLASHPREFILL_FLASHPREFILL_H_ */
