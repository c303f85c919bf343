/* The structs of all policies. A policy is a method with its parameters: the head that all share, and the method's own.
 *
 * Fill one with fp_policy_init or fp_policy_parse and change what you like. The names, defaults and ranges of all
 * fields are told by fp_policy_field_at; what each method computes is in docs/methods. */
#ifndef FLASHPREFILL_POLICIES_H_
#define FLASHPREFILL_POLICIES_H_

#include <stddef.h>
#include <stdint.h>

typedef enum fp_policy_kind {
  FP_DENSE = 0,
  FP_STREAMING = 1,
  FP_FLASHPREFILL = 2,
  FP_SKETCH = 3,
  FP_FLEXPREFILL = 4,
  FP_MINFERENCE = 5,
  FP_XATTENTION = 8,
  FP_RRATTENTION = 9,
  FP_SPARGE_ATTN = 10,
  FP_PRISM = 11,
  FP_SAMPLE_ATTENTION = 12,
  FP_GATHER = 13,
  FP_VSPREFILL = 16,
  FP_S2O = 17
} fp_policy_kind;

/* Whether blocks that are left out, and visible to the whole tile, count in the softmax. */
typedef enum fp_mean_correction {
  FP_NO_CORRECTION = 0,
  FP_BLOCK_MEANS = 1, /* each by its mean key and value, weighing as much as it has keys (FlashPrefill V2) */
  FP_SUMMARY_KEYS = 2 /* one key and value for up to FP_SUMMARY_BLOCKS of them, which are those means as the tile's mean
                         query weighs them: exact for that query, and to first order around it. On FP_CPU */
} fp_mean_correction;

/* A summary key stands for the blocks left out of FP_SUMMARY_BLOCKS neighbouring ones, from a multiple of it on. */
#define FP_SUMMARY_BLOCKS 16

/* The head of every policy: its geometry, and the blocks that are kept whatever the scores say. "The last block" of a
 * tile below is the key block of its last row. */
typedef struct fp_policy {
  uint32_t struct_size;      /* of the whole policy, this head included */
  int32_t kind;              /* fp_policy_kind */
  int32_t block_size;        /* keys per block: a multiple of 16 from 16 to 1024 */
  int32_t sink_blocks;       /* the first sink_blocks blocks are always kept */
  int32_t window_blocks;     /* from window_blocks - 1 before the block of the tile's first row up to the last block */
  int32_t dense_tail_blocks; /* the last ceil(dense_tail_blocks * block_size / tile rows) tiles of a final chunk are
                                dense */
  int32_t share_heads;       /* 1: the query heads of a KV head share one list, their rows packed into tiles of 128 */
  int32_t mean_correction;   /* fp_mean_correction */
} fp_policy;

/* Everything is kept. With skip, attention itself leaves out what weighs next to nothing (BLASST, arXiv 2512.12087;
 * skip softmax): see fp_block_mask. */
typedef struct fp_dense {
  fp_policy common;
  float skip; /* in [0, 1); 0: nothing is left out */
  int32_t reserved;
} fp_dense;

/* Sink and window blocks only (StreamingLLM; A-shape; with a dense tail, Tri-shape). */
typedef struct fp_streaming {
  fp_policy common;
} fp_streaming;

/* FlashPrefill, arXiv 2603.06199: mean-pooled keys, energies summed over the rows of a tile, kept from alpha times the
 * tile's largest energy. query_pool = 1 is the paper; larger values score means of query_pool query rows. */
typedef struct fp_flashprefill {
  fp_policy common;
  float alpha;        /* in [0, inf) */
  int32_t query_pool; /* rows per mean: 1 .. 128 */
  int32_t min_blocks; /* the top min_blocks visible blocks are always kept */
  int32_t reserved;
} fp_flashprefill;

/* Sketch: FlashPrefill whose key blocks are described by their outliers (the keys farthest from the mean) beside the
 * mean and variance of the rest. One of alpha, mass and gain decides; the others are NaN.
 *
 * gain: from the largest energy down, a block is kept while share * sqrt(rest) >= gain, where share is the block's
 * share of the tile's energy and rest the share of all blocks from it on. query_metric: distances from the mean weigh
 * dimension d by the sum of q_d^2 over the last rows of all tiles of the KV head's query heads, so that outliers are
 * keys that some query can tell from the mean. */
typedef struct fp_sketch {
  fp_policy common;
  float alpha;        /* in [0, inf), or NaN */
  float mass;         /* in (0, 1]: the smallest set of blocks with this share of the tile's energy; or NaN */
  int32_t outliers;   /* 0 .. 16 */
  int32_t query_pool; /* 1 .. 128 */
  int32_t min_blocks;
  float gain;           /* in (0, 1), or NaN */
  int32_t query_metric; /* 0 or 1 */
  int32_t reserved;
} fp_sketch;

/* FlexPrefill, arXiv 2502.20766: each head looks at the softmax of its last block_size query rows. If pooled queries
 * and keys predict it (Jensen-Shannon distance below tau), the head is query-aware: it keeps blocks by pooled scores
 * until they hold the share gamma of the head's whole map. Otherwise it keeps verticals and slashes of blocks, as many
 * as it takes tokens to hold gamma of those rows' mass. Each query head selects for itself: share_heads must be 0. */
typedef enum fp_flex_cover {
  FP_COVER_FIRST = 0, /* a slash line keeps the nearer one of the two block diagonals that it crosses, as published */
  FP_COVER_BOTH = 1   /* both */
} fp_flex_cover;

typedef struct fp_flexprefill {
  fp_policy common;
  float gamma;        /* in (0, 1] */
  float tau;          /* at least 0; 0: no head is query-aware */
  int32_t min_budget; /* tokens: the least in verticals and in slashes, rounded up to blocks, at least one block */
  int32_t max_budget; /* tokens: the most; 0: no limit */
  int32_t cover;      /* fp_flex_cover */
  int32_t reserved;
} fp_flexprefill;

/* MInference, arXiv 2407.02490: each head has a pattern of its own, found once for a model. Each query
 * head selects for itself: share_heads must be 0. */
typedef enum fp_minference_pattern {
  FP_VERTICAL_SLASH = 0, /* a columns and b diagonals of tokens, by the softmax of the last 64 query rows */
  FP_A_SHAPE = 1,        /* the first a tokens and the nearest b */
  FP_BLOCK_SPARSE = 2    /* a blocks of each block of queries, by pooled scores; b is not read */
} fp_minference_pattern;

typedef struct fp_minference_head {
  int32_t pattern; /* fp_minference_pattern */
  int32_t a, b;    /* at least 0 */
} fp_minference_head;

typedef enum fp_rounding {
  FP_ROUND_BLOCKS = 0, /* columns and diagonals become the blocks that hold some of them */
  FP_ROUND_TOKENS = 1  /* they stay tokens: the mask's verticals and slashes; on FP_CUDA blocks. No mean_correction */
} fp_rounding;

typedef struct fp_minference {
  fp_policy common;
  int32_t vertical; /* without a list of heads all are FP_VERTICAL_SLASH with a = vertical, b = slash */
  int32_t slash;
  int32_t head_count;              /* q_heads, or 0: no list */
  int32_t rounding;                /* fp_rounding */
  const fp_minference_head* heads; /* [head_count], host memory that lives until the call returns; or NULL */
} fp_minference;

/* XAttention, arXiv 2503.16428: queries and keys are cut into cells of `stride` tokens, a pair of cells scored by the
 * sum of its anti-diagonal, softmax over each row of cells, and blocks kept by descending mass until they hold
 * `threshold` of the tile's; the forced blocks are counted first. Each query head selects for itself: share_heads must
 * be 0. */
typedef struct fp_xattention {
  fp_policy common;
  float threshold;              /* in [0, 1]; 0: the forced blocks alone */
  float norm;                   /* scores are divided by stride * norm; above 0 */
  int32_t stride;               /* tokens per cell: 4, 8, 16, 32, 64 or 128, and a divisor of block_size */
  int32_t head_count;           /* q_heads, or 0: no list */
  const float* head_thresholds; /* [head_count], in place of threshold; host memory that lives until the call returns;
                                   or NULL */
} fp_xattention;

/* RRAttention, arXiv 2602.05853: as XAttention, but a row of the grid is one query, whose place in its cell moves on
 * from head to head, and a key cell is its mean. The smallest set of blocks with `threshold` of the tile's mass is
 * kept. share_heads must be 0. */
typedef struct fp_rrattention {
  fp_policy common;
  float threshold; /* in (0, 1] */
  int32_t stride;  /* as XAttention's */
} fp_rrattention;

/* SpargeAttn, arXiv 2502.18137. Its first stage: blocks by the softmax of mean query times mean key, where the tokens
 * of a block are similar to each other. Key blocks without self-similarity are kept, and a tile of queries without it
 * keeps everything. Either cdf or topk decides; the other is NaN. Its second stage, off by default, is skip.
 * share_heads must be 0. */
typedef struct fp_sparge_attn {
  fp_policy common;
  float similarity; /* in [-1, 1]: a block is self-similar where the mean cosine of its tokens is above this; NaN (the
                       default) is what the authors use: 0.6 with cdf, -0.1 with topk */
  float cdf;        /* in [0, 1]: the top blocks whose probabilities sum up to at most this, at least one; or NaN */
  float topk;       /* in [0, 1]: the top floor(topk * all key blocks of the sequence); or NaN */
  float skip;       /* in [0, 1): as fp_dense's. The authors' pvthreshd is -log2 of it */
} fp_sparge_attn;

/* Prism, arXiv 2602.08426: mean query times mean key in two bands of rotary frequencies, each with a softmax of its
 * own, and the union of what they keep. share_heads must be 0. */
typedef struct fp_prism {
  fp_policy common;
  float mass;          /* in (0, 1]: the smallest set of blocks with this share of a band's probability */
  int32_t rotary_dim;  /* the first rotary_dim dimensions are rotated; even, at most head_dim; 0: head_dim */
  int32_t high_pairs;  /* rotary pairs of the high band, fastest first; 0: half of them */
  int32_t low_pairs;   /* of the low band, slowest first, besides what is not rotated; 0: three quarters of them */
  int32_t interleaved; /* 0: dimension i is paired with i + rotary_dim / 2; 1: 2i with 2i + 1 */
  int32_t reserved;
} fp_prism;

/* SampleAttention, arXiv 2406.15486: the exact softmax of sampled query rows, summed by key block and by distance in
 * blocks; the smallest sets of columns and of diagonals with `coverage` of the mass are kept, beside a window.
 * share_heads must be 0. */
typedef struct fp_sample_attention {
  fp_policy common;
  float coverage;      /* in (0, 1] */
  float sample_ratio;  /* in (0, 1]: share of the query rows that are sampled */
  float window_ratio;  /* in [0, 1]: tokens before a tile that are kept, as a share of the sequence's keys */
  int32_t sample_rows; /* rows sampled at the end of each segment of about sample_rows / sample_ratio rows: 1 .. 128 */
} fp_sample_attention;

/* Gather: single keys in place of blocks. For each *segment* of `segment` query tokens, the keys before its window are
 * ranked by the softmax of the segment's mean query (the root mean square over the query heads that share a list: all
 * of a KV head with share_heads, the default), and the best go into the mask's key list. The segment's own keys, the
 * window before it and the sink are kept as blocks. Either gain or budget decides; the other is NaN. On FP_CPU.
 *
 * gain: from the best key down, a key is kept while 128 * share * sqrt(rest) >= gain, where share is the key's share of
 * the softmax and rest that of all keys of the ranking from it on: Sketch's rule, for 128 keys as for a block. */
typedef struct fp_gather {
  fp_policy common;
  float gain;       /* in (0, 1), or NaN */
  float budget;     /* in (0, 1]: the best keys, as a share of those that are ranked; or NaN */
  int32_t segment;  /* query tokens per list, rounded down to whole tiles, one at least: 1 .. 65536 */
  int32_t max_keys; /* keys that a list has room for; where more are wanted it holds the best: 128 .. 2^20 */
} fp_gather;

/* VSPrefill, arXiv 2603.04460: for each KV head a small trained network, its *indexer*, reads every key and its value
 * and predicts how much attention the key gets (a vertical) and the distance that is its number (a slash):
 *
 *     z = SiLU(up [k | v] + bias),   logits vertical . z and slash . z,   a softmax of each over the sequence's keys
 *
 * The fewest verticals with `vertical_mass` of the one softmax are kept, and the fewest slashes with `slash_mass` of
 * the other. Without an indexer (hidden = 0) the forced blocks alone are kept. It is the one policy that reads v in
 * select.
 *
 * Logits are of single tokens, so prompts may be read in chunks, and the caller may keep them: `logits` holds those of
 * keys that an earlier call has seen. An entry says which key and value it is of (a hash of their numbers), so that no
 * call can be wrong about it: where it is of others, the logits are computed, and written. */
typedef struct fp_vsprefill_logits {
  uint64_t of; /* 0: of nothing */
  float vertical, slash;
} fp_vsprefill_logits;

typedef struct fp_vsprefill {
  fp_policy common;
  float vertical_mass; /* in (0, 1] */
  float slash_mass;    /* in (0, 1] */
  int32_t rounding;    /* fp_rounding; with FP_ROUND_TOKENS share_heads and mean_correction must be 0 */
  int32_t indexer;     /* a number by which a binding knows the weights; the library does not read it */
  int32_t kv_heads;    /* of the weights: the problem's */
  int32_t head_dim;    /* the same */
  int32_t hidden;      /* units of each network: 0 .. 65536 */
  int32_t reserved;
  const float* up;       /* [kv_heads][hidden][2 head_dim]: of keys, then of values. Host memory that lives until the */
  const float* bias;     /* [kv_heads][hidden]                                                           call returns */
  const float* vertical; /* [kv_heads][hidden] */
  const float* slash;    /* [kv_heads][hidden] */
  fp_vsprefill_logits* logits; /* [batch][kv_heads][logit_tokens], zeros at first; or NULL. Written by select */
  int64_t logit_tokens;        /* keys of a sequence that `logits` has room for */
} fp_vsprefill;

/* S2O, arXiv 2602.22575: as Gather, but a segment's keys are taken 128 at a time, in the order of its mean query, until
 * they add too little. What is added is measured: the exact exponentials of stop_rows rows of each head of the list,
 * evenly spaced in the segment, over those of the keys that a row has already. It stops where the mean of these ratios
 * is below tau for two groups of 128 in a row, which are kept. On FP_CPU. */
typedef struct fp_s2o {
  fp_policy common;
  float tau;         /* in [0, 1) */
  int32_t segment;   /* query tokens per list, rounded down to whole tiles, one at least: 1 .. 65536 */
  int32_t max_keys;  /* keys that a list has room for: 128 .. 2^20 */
  int32_t stop_rows; /* 1 .. 65536; more than the segment has: all of them */
} fp_s2o;

/* ---------------------------------------------------------------- fields */

typedef enum fp_field_type {
  FP_FIELD_INT = 0,        /* int32_t */
  FP_FIELD_FLOAT = 1,      /* float */
  FP_FIELD_BOOL = 2,       /* int32_t, 0 or 1 */
  FP_FIELD_CHOICE = 3,     /* int32_t, an index into choices */
  FP_FIELD_INT_TABLE = 4,  /* const int32_t*, rows of `columns` values; their number is the int32_t at count_offset */
  FP_FIELD_FLOAT_TABLE = 5 /* const float*, the same */
} fp_field_type;

typedef enum fp_field_flags {
  FP_FIELD_ALTERNATIVE = 1,  /* one of several that exclude each other; NaN where another one is given */
  FP_FIELD_DECIDES = 2,      /* what the policy is known by: always printed */
  FP_FIELD_ZERO_IS_NONE = 4, /* 0 is no value: text may say none */
  FP_FIELD_ABOVE_LEAST = 8,  /* the value must be above `least`, not at it */
  FP_FIELD_BELOW_MOST = 16,  /* the value must be below `most`, not at it */
  FP_FIELD_OPTIONAL = 32,    /* NaN: not given, and the value follows from other fields; text may say none */
  /* How much is kept follows from it. Of these a guard makes f times the budget: */
  FP_FIELD_KEEPS_FROM = 64,  /* what is worth at least so much is kept: the value / f */
  FP_FIELD_KEEPS_MASS = 128, /* this share of an estimated mass is kept: 1 - (1 - the value) / f */
  FP_FIELD_KEEPS_SHARE = 256 /* this share of keys or blocks is kept: the value * sqrt(f), at most 1 */
} fp_field_flags;

/* What a field of a policy is. The strings are the library's. */
typedef struct fp_policy_field {
  const char* name;
  const char* about;   /* one line: what it is, with its unit */
  const char* choices; /* FP_FIELD_CHOICE: the names of its values, separated by spaces; else "" */
  double initial;      /* the default; NaN: not given. Tables are empty by default */
  double least, most;  /* the range; infinity: finite, without a bound on that side */
  size_t offset;       /* in the policy's struct, in bytes */
  size_t count_offset; /* of tables */
  int32_t type;        /* fp_field_type */
  int32_t flags;       /* fp_field_flags */
  int32_t columns;     /* of tables: values per row */
  int32_t reserved;
} fp_policy_field;

#endif /* FLASHPREFILL_POLICIES_H_ */
