/*
 * kvgate_abi.h - the binary interface between kvgated and its workers.
 *
 * Everything here is shared memory or travels in it, so nothing may change
 * meaning: fields are only ever added in reserved space, and reserved space
 * is zero. All integers are little endian. A size is in bytes unless its name
 * says otherwise (tokens, blocks, pairs, rows).
 *
 * Addressing. A tenant's extents of one layout are mapped at slots of one
 * arena; slot i starts at arena + i * extent_size. K lies in the first half of
 * an extent and V in the second, and block ids number the arena with a gap:
 *     K(id) = arena + id * stride,  V(id) = arena + extent_size / 2 + id * stride
 * holds for every block, where stride is the larger of the K and V halves of
 * a block. Token t of a block starts at t * k_dim * sizeof(k_dtype) (same for V).
 *
 * Lengths. The row of one KV head of one layer of one sequence has
 *     base_len[layer][slot][head] + appended[slot]
 * pairs: base_len is the daemon's and changes only in an eviction, appended is
 * the worker's counter. Token j appended since the last eviction has index
 * base_len + j in each row; index i lives in block ids[..][i / block_tokens],
 * place i % block_tokens. Order within a row means nothing: keys are rotated.
 */
#ifndef KVGATE_ABI_H
#define KVGATE_ABI_H

#include <stdint.h>

#define KVG_ABI_VERSION   1u
#define KVG_RING_MAGIC    0x676e6972u /* "ring" */
#define KVG_TABLE_MAGIC   0x6c626174u /* "tabl" */
#define KVG_BLOCK_TOKENS  16u         /* tokens of one block */
#define KVG_RUN_BLOCKS    8u          /* blocks of one nursery run: ids consecutive, first a multiple of 8 */
#define KVG_STRIPE_TOKENS 128u        /* tokens of one nursery stripe: a run for every head of every layer */
#define KVG_MAX_GROUPS    8u
#define KVG_TEXT_SIZE     256u /* error text of one completion, NUL-terminated */
#define KVG_MAX_PROTECTED 8u   /* protected ranges of one sequence, besides the prefix */

enum kvg_dtype { KVG_BF16 = 1, KVG_F16 = 2, KVG_F32 = 3 };

enum kvg_group_kind { KVG_GROUP_GLOBAL = 1, KVG_GROUP_WINDOW = 2, KVG_GROUP_MLA = 3, KVG_GROUP_STATE = 4 };

/* Layers that store their KV alike. heads: begin and count of this rank's slice of total. */
struct kvg_group {
	uint32_t kind; /* enum kvg_group_kind */
	uint32_t layers;
	uint32_t head_begin, head_count, head_total;
	uint32_t rank, world, group_id;
	uint32_t k_dim, v_dim;     /* elements of one token of one KV head */
	uint32_t k_dtype, v_dtype; /* enum kvg_dtype */
	uint32_t scale_kind, scale_offset;
	uint32_t block_tokens; /* 16 */
	uint32_t window, max_rollback;
	uint32_t query_heads; /* per KV head: the group size G */
	uint32_t reserved[6];
};

struct kvg_layout {
	char model[128]; /* identity of the model, NUL-terminated */
	uint32_t hidden_dim;
	uint32_t group_count;
	uint32_t max_sequences;
	uint32_t max_tokens; /* of one sequence */
	uint32_t reserved[12];
	struct kvg_group groups[KVG_MAX_GROUPS];
};

/* ---- policy of one sequence ---- */

enum kvg_mode {
	KVG_MODE_OFF = 0,       /* prefill eviction never drops a pair */
	KVG_MODE_CHUNKED = 1,   /* after each chunk (Fast KVzip) */
	KVG_MODE_ONCE = 2,      /* once, after the whole prompt */
	KVG_MODE_THRESHOLD = 3, /* after each chunk; pairs scoring at most `threshold` go */
};

enum kvg_level { KVG_LEVEL_PAIR = 0, KVG_LEVEL_PAIR_HEAD = 1, KVG_LEVEL_PAIR_LAYER = 2, KVG_LEVEL_ADAKV_LAYER = 3 };

#define KVG_POLICY_WINDOW_ABSOLUTE 1u /* flags: `window` holds even where n < chunk */
#define KVG_POLICY_RETAIN_HOST     2u /* flags: what evictions drop is kept in host memory, for RECALL */

#define KVG_KEY_SIZE 32u /* bytes of a published context's key */

struct kvg_policy {
	double ratio;           /* share of the context's KV to keep, (0, 1] */
	uint8_t mode;           /* enum kvg_mode */
	uint8_t level;          /* enum kvg_level */
	uint16_t flags;         /* KVG_POLICY_* */
	uint32_t prefix_tokens; /* system prompt: never evicted, not counted in context_tokens */
	uint32_t context_tokens;
	uint32_t chunk_tokens; /* 0: the whole prompt is one chunk; boundaries count the prefix */
	uint32_t max_new_tokens;
	uint32_t window;                      /* newest context tokens that an eviction leaves alone */
	uint32_t floor;                       /* least pairs that stay of a row's evicted range; 0: none */
	float threshold;                      /* KVG_MODE_THRESHOLD */
	uint32_t budget;                      /* decode eviction: tokens per head on average; 0: none */
	uint32_t decode_first, decode_window; /* tokens that count as score 1.0 in decode eviction; 0: 4 and 128 */
	uint32_t reserved[6];
};

/* ---- rings ---- */

enum kvg_op {
	KVG_OP_NOP = 0,
	KVG_OP_CREATE = 1, /* create: policy -> seq, value[0] = slot, value[1] = bytes promised */
	KVG_OP_RESERVE =
		2, /* reserve: room for `tokens` beyond the committed ones -> value[0] = tokens reserved in all */
	KVG_OP_COMMIT = 3,   /* commit: tokens below `pos` are written */
	KVG_OP_STAGE = 4,    /* stage: score rows, of hidden states or scores in the staging area */
	KVG_OP_EVICT = 5,    /* evict -> value[0] = pairs held, value[1] = pairs dropped, value[2] = bytes of the
				sequence's blocks */
	KVG_OP_TRUNCATE = 6, /* truncate: forget tokens from `pos` on */
	KVG_OP_FREE = 7,     /* free the sequence */
	KVG_OP_PROTECT = 8,  /* protect: positions [begin, end) are never evicted */
	KVG_OP_UNMAPPED = 9, /* unmapped: every dropped extent named by events up to `event` is unmapped; completes when
				its bytes are back in the pool */
	KVG_OP_QUERY =
		10, /* -> value[0] = pairs held, value[1] = blocks, value[2] = committed_pos, value[3] = reserved_pos */
	KVG_OP_OFFLOAD = 11, /* offload: the sequence's blocks go to the host -> value[0] = bytes there, value[1] =
				bytes of blocks given back, value[2] = ns of copying. Nobody reads or writes the
				sequence until a RESERVE or RESTORE of it has completed */
	KVG_OP_RESTORE = 12, /* restore: its blocks come back, bit for bit; it is in use again -> value[0] = bytes
				moved, value[1] = ns of copying */
	KVG_OP_IDLE = 13, /* idle: nobody reads or writes it until a RESERVE or RESTORE has completed, so the daemon may
			     offload it when memory is short */
	KVG_OP_RECALL = 14,  /* recall: pairs that evictions dropped and the host kept come back, best first ->
				value as of EVICT, but value[1] = pairs that came back */
	KVG_OP_PUBLISH = 15, /* publish: seals what the sequence holds under `key`; it is attached to that context
				afterwards -> value[0] = context, value[1] = bytes of its blocks, value[2] = tokens,
				value[3] = 1 when another sequence had published that key */
	KVG_OP_FIND = 16,    /* find: the context of `key` -> value[0] = context (0: there is none), value[1] = bytes of
				its blocks, value[2] = tokens, value[3] = sequences attached to it */
	KVG_OP_ATTACH = 17,  /* attach: `seq` names a context. A new sequence that begins with it: policy (the context's
				tokens count as prefix, besides prefix_tokens) -> as of CREATE, value[2] = tokens,
				value[3] = bytes of the blocks that are its own */
	KVG_OP_FORK = 18, /* fork -> value[0] = slot, value[1] = handle, value[2] = bytes promised, value[3] = bytes of
			     the blocks that are its own. The copy shares all full blocks; its generation and lengths
			     are the table's */
	KVG_OP_RELIEF = 19, /* relief: the worker has seen `pressure` and unmapped what it was asked to */
};

#define KVG_RECALL_BUDGET 1u /* recall.flags: `budget` counts, otherwise `ratio` */

enum kvg_stage_kind { KVG_STAGE_HIDDEN = 1, KVG_STAGE_PREACT = 2, KVG_STAGE_SCORE = 3 };

enum kvg_buffer { KVG_BUFFER_STAGING = 0, KVG_BUFFER_DEVICE = 1 }; /* the staging memfd's rows, the device staging */

enum kvg_evict_mode { KVG_EVICT_PREFILL = 0, KVG_EVICT_DECODE = 1 };

/* One submission. Every entry gets exactly one completion; entries of one sequence run in order. */
struct kvg_sqe {
	uint8_t op; /* enum kvg_op */
	uint8_t flags;
	uint16_t reserved0;
	uint32_t layout; /* 0: the connection's only layout */
	uint64_t user_data;
	uint64_t seq;        /* handle: epoch << 32 | slot */
	uint32_t generation; /* of the sequence, for COMMIT, STAGE, EVICT, TRUNCATE; another one is -ESTALE */
	uint32_t wait_event; /* an imported event that must have happened before; 0: none */
	/* Timeline semaphores (struct kvg_sync), 0 on the host kind. The daemon touches nothing of the entry's before
	 * sync.worker >= wait_value; it raises the sequence's slot to signal_value (if that is not 0) in the order
	 * of its stream when the entry's work is done, and in any case before the completion. */
	uint64_t wait_value, signal_value;
	union {
		struct kvg_policy create;
		struct {
			uint32_t tokens;
		} reserve;
		struct {
			uint32_t pos;
		} commit, truncate;
		struct {
			uint32_t begin, end;
		} protect;
		/* HIDDEN: bf16 [layer_count][rows][hidden_dim]; PREACT: bf16 [layer_count][rows][(G + 1) * H * d], the
		 * products with wq (without bias) and wk; SCORE: fp32 [layer_count][rows][heads]. Rows are positions
		 * pos .. pos + rows - 1. offset counts from the start of the staging rows or of the buffer;
		 * layers are layer_stride bytes apart (0: they follow each other). */
		struct {
			uint32_t kind, layer_begin, layer_count, pos, rows;
			uint32_t buffer; /* KVG_BUFFER_* or an imported buffer */
			uint64_t offset, layer_stride;
		} stage;
		struct {
			uint32_t mode; /* enum kvg_evict_mode */
		} evict;
		struct {
			uint32_t event;
		} unmapped;
		struct {
			double ratio;    /* as of an eviction of everything that had its eviction so far, (0, 1] */
			uint32_t budget; /* tokens per head on average */
			uint32_t flags;  /* KVG_RECALL_* */
		} recall;
		struct {
			uint8_t key[KVG_KEY_SIZE];
		} publish, find;
		struct kvg_policy attach;
		struct {
			uint32_t pressure;
		} relief;
		uint8_t bytes[80];
	};
};

struct kvg_cqe {
	uint64_t user_data;
	int32_t status;      /* 0 or a negative errno */
	uint32_t text;       /* 1: the text slot of this entry's index says why */
	uint64_t seq;        /* handle of the sequence concerned, or 0 */
	uint32_t generation; /* of that sequence, after the operation */
	uint32_t events;     /* control events to have processed before the result is used */
	uint64_t value[4];   /* by operation, see enum kvg_op */
};

/*
 * The ring memfd. sq_tail, cq_head and sleeping are the worker's to write, the
 * rest is the daemon's. The daemon takes none of the worker's words on trust:
 * it keeps its own cursors, reads a shared one once and checks it.
 *
 * Doorbell: after publishing sq_tail and a full fence the worker reads
 * need_wakeup; if set it writes 1 to the doorbell eventfd. To sleep, the worker
 * sets `sleeping`, fences, looks at cq_tail and events again, and polls its
 * control socket; the daemon clears `sleeping` and sends a wake event there.
 * Indices run freely; entry = index & (entries - 1); entries are powers of two.
 */
struct kvg_ring {
	uint32_t magic, version;
	uint32_t sq_entries, cq_entries;
	uint32_t sq_offset, cq_offset, text_offset, size;
	uint32_t reserved0[8];
	uint32_t sq_tail __attribute__((aligned(64)));
	uint32_t reserved1[15];
	uint32_t sq_head __attribute__((aligned(64)));
	uint32_t need_wakeup;
	uint32_t reserved2[14];
	uint32_t cq_tail __attribute__((aligned(64)));
	uint32_t events;   /* control events sent so far */
	uint32_t pressure; /* not 0: memory is short, and this worker is asked for what it can give: a new number for
			      each time; to be answered with RELIEF */
	uint32_t reserved3[13];
	uint32_t cq_head __attribute__((aligned(64)));
	uint32_t sleeping;
	uint32_t reserved4[14];
};

/* ---- tables: one memfd for each (worker, layout), read-only for the worker ---- */

#define KVG_SLOT_OFFLOADED 1u /* its blocks are on the host: RESERVE or RESTORE brings them back */
#define KVG_SLOT_IDLE      2u /* released with IDLE */

/* State of one sequence slot, as of its last completion. */
struct kvg_slot {
	uint32_t epoch; /* 0: no sequence here */
	uint32_t generation;
	uint32_t fold_pos;      /* position of appended token 0: tokens below it are in base_len */
	uint32_t committed_pos; /* tokens below it are committed */
	uint32_t reserved_pos;  /* tokens below it have room */
	uint32_t flags;         /* KVG_SLOT_* */
	uint32_t shared_pos;    /* tokens below it belong to a published or forked context */
	uint32_t reserved[9];
};

/* base_len: uint32 [layers][max_sequences][heads]; ids: uint32 [layers][max_sequences][heads][row_cap]. */
struct kvg_table {
	uint32_t magic, version;
	uint32_t layers, heads, max_sequences, row_cap;
	uint64_t slot_offset, base_len_offset, ids_offset, size;
	uint32_t reserved[18];
};

/* The staging memfd: uint32 appended[max_sequences] at 0 (the worker's), rows from rows_offset (in the reply). */

/*
 * Timeline semaphores of the cuda kind, in the staging memfd at sync_offset: 64-bit counters that only grow, in memory
 * that both processes register with their driver, so that streams write them and wait for them. Requests of
 * one sequence run in order, so each slot's counter does.
 */
struct kvg_sync {
	uint64_t worker; /* raised by the worker's stream */
	uint64_t reserved[7];
	uint64_t slots[]; /* [max_sequences]: raised by the daemon; INT64_MAX by the library when the connection breaks
			     (streams compare the difference as a signed number) */
};

#ifndef __cplusplus
_Static_assert(sizeof(struct kvg_group) == 96, "ABI");
_Static_assert(sizeof(struct kvg_layout) == 192 + 8 * 96, "ABI");
_Static_assert(sizeof(struct kvg_policy) == 80, "ABI");
_Static_assert(sizeof(struct kvg_sqe) == 128, "ABI");
_Static_assert(sizeof(struct kvg_cqe) == 64, "ABI");
_Static_assert(sizeof(struct kvg_ring) == 320, "ABI");
_Static_assert(sizeof(struct kvg_slot) == 64, "ABI");
_Static_assert(sizeof(struct kvg_table) == 128, "ABI");
#endif

#endif
