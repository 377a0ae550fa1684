/*
 * meta.h - everything that must survive the daemon, in one memfd and in
 * position-independent form: offsets and indices, never pointers.
 *
 * The fixed part (header, tenants, workers, extents, their block bitmaps and slot metadata)
 * is mapped once; each worker's part (sequences, rows, tables of ids, redo record) is
 * a range of the same memfd, mapped while the worker lives, and so are each context's rows and ids. The file is sparse:
 * what was never touched costs nothing. Free lists, counters of free blocks and the like are derived from it and kept
 * elsewhere.
 *
 * meta_extent.state: EMPTY -> BORN (charged, being created) -> LIVE -> DROPPED (the worker was asked to unmap) -> EMPTY
 *                    BORN, LIVE -> DYING (its worker is gone) -> EMPTY
 *                    EMPTY -> RAW (of its tenant's min, in nobody's use and not charged) -> BORN or EMPTY
 */
#ifndef KVG_META_H
#define KVG_META_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/base/list.h"
#include "daemon/quota/quota.h"
#include "proto/kvgate_abi.h"

#define META_MAGIC        0x6174656d67766bULL /* "kvgmeta" */
#define META_VERSION      4u
#define META_MAX_TENANTS  256u
#define META_MAX_WORKERS  1024u
#define META_MAX_CONTEXTS 8192u
#define META_NO_WORKER    UINT32_MAX
#define META_NAME         128u
#define META_MIN_STRIDE   128u /* bytes; bounds the blocks of an extent */
#define META_RECORDS      8u   /* redo records of a worker: evictions at a time */

enum meta_extent_state { META_EMPTY = 0, META_BORN = 1, META_LIVE = 2, META_DROPPED = 3, META_DYING = 4, META_RAW = 5 };
enum meta_generation { META_NURSERY = 0, META_HELD = 1 };
enum meta_redo_state { META_REDO_NONE = 0, META_REDO_PLANNED = 1, META_REDO_MOVED = 2 };
/* RECALL: pairs from the host fill the pending blocks; a successor gives those back instead. */
enum meta_redo_kind { META_REDO_PACK = 0, META_REDO_RELOCATE = 1, META_REDO_RECALL = 2 };

/*
 * How far a sequence's eviction is. A successor of the daemon undoes MARKING (marks become score 0 again: nothing has
 * moved), goes on with MOVING stripe by stripe, and repeats FOLDING, which only sets what it says.
 */
enum meta_phase { META_PHASE_NONE = 0, META_PHASE_MARKING = 1, META_PHASE_MOVING = 2, META_PHASE_FOLDING = 3 };

/*
 * RESIDENT -> OFFLOADING -> OFFLOADED -> RESTORING -> RESIDENT. Blocks are given back when the image is complete, and
 * the image when the blocks are: a successor repeats what was under way or forgets it. Of sequences and contexts.
 */
enum meta_residency { META_RESIDENT = 0, META_OFFLOADING = 1, META_OFFLOADED = 2, META_RESTORING = 3 };

/* COPYING: nobody finds it, and a successor forgets it. ENDING: its extents are on their way back. */
enum meta_context_state { META_CONTEXT_COPYING = 1, META_CONTEXT_SEALED = 2, META_CONTEXT_ENDING = 3 };

struct meta_header {
	uint64_t magic;
	uint32_t version, tenant_count;
	uint64_t extent_size, pool_size;
	uint32_t extent_count; /* capacity */
	uint32_t granularity;  /* of the memory kind */
	uint64_t tenants_offset, workers_offset, extents_offset, contexts_offset;
	uint32_t context_count; /* entries that have been used: those behind them are empty */
	uint32_t reserved0;
	uint64_t bitmaps_offset, bitmap_size; /* of one extent */
	uint64_t places_offset, places_size;  /* of one extent */
	uint64_t fixed_size;
	struct quota_account pool, host; /* the pool's, of each tier */
	uint64_t frames_offset;          /* struct meta_frame [frame_count], within fixed_size */
	uint32_t frame_count;            /* 0: there is no host tier */
	uint32_t frame_size;
};

struct meta_tenant {
	char name[META_NAME];
	struct quota_account account, host; /* of device memory; of the host tier */
	uint64_t reserved[8];
};

/* Offsets count from the start of the memfd. R = layers * heads. */
struct meta_worker {
	uint64_t id; /* 0: unused */
	uint32_t tenant, uid, pid, reserved0;
	uint64_t stride;
	uint64_t promised; /* bytes that its sequences may still draw */
	uint32_t layers, heads, max_sequences, row_cap, stripe_cap, move_cap;
	uint64_t offset, size;  /* this worker's range */
	uint64_t seqs_offset;   /* struct meta_seq [max_sequences] */
	uint64_t rows_offset;   /* struct meta_row [max_sequences][R] */
	uint64_t scored_offset; /* uint32 [max_sequences][layers]: positions below are scored */
	uint64_t held_offset;   /* uint32 block ids [max_sequences][R][row_cap] */
	uint64_t runs_offset;   /* uint32 first block ids [max_sequences][stripe_cap][R] */
	/* META_RECORDS times: struct meta_redo, meta_redo_row [R], meta_move [move_cap], meta_relocation [move_cap] */
	uint64_t redo_offset;
	uint64_t redo_size; /* of one */
	char name[META_NAME];
	struct kvg_layout layout;
};

struct meta_extent {
	uint32_t state, tenant;
	uint32_t worker; /* index in the workers' table; META_NO_WORKER: a published context's */
	uint32_t slot;   /* in the arena */
	uint32_t generation;
	uint32_t owner; /* sequence slot + 1, or 0: blocks of any sequence of the worker; index + 1 of the context */
	uint32_t blocks, used;
	uint32_t event; /* DROPPED: number of the event that asked for it */
	uint32_t reserved0;
	uint64_t bytes;
	uint32_t reserved[4];
};

/* A frame of the host tier. Frames are chained: what names an object names its first frame. */
struct meta_frame {
	uint32_t tenant; /* index + 1; 0: free */
	uint32_t next;   /* frame + 1; 0: the last of its chain */
};

/* What is known of one KV pair. score = -inf: an eviction under way has dropped it. */
struct meta_place {
	int32_t pos;
	float score;
};

struct meta_seq {
	uint32_t epoch; /* 0: free */
	uint32_t generation;
	uint32_t fold_pos, committed_pos, reserved_pos;
	uint32_t prune_start;           /* context tokens below it have had their eviction */
	uint32_t stripe_first, stripes; /* runs [stripe_first, stripes) hold blocks; first is 0 outside of evictions */
	uint32_t evictions, protected_count;
	uint32_t phase;            /* enum meta_phase */
	uint32_t next_prune_start; /* prune_start after the eviction under way */
	uint64_t pairs;            /* in base_len, over all rows */
	uint64_t blocks;           /* in use */
	uint64_t admitted;         /* blocks that it may come to have */
	uint32_t residency;        /* enum meta_residency */
	uint32_t idle;             /* 1: released by its worker */
	uint32_t context;          /* index + 1 of the context whose full blocks its rows begin with; 0: none */
	uint32_t image;            /* OFFLOADED: first frame + 1 of its blocks on the host */
	uint32_t retained;         /* first frame + 1 of what evictions dropped and the host keeps; 0: nothing */
	uint32_t shared_pos;       /* tokens below it were sealed: in the context, or in its copy of the tail */
	uint64_t image_bytes, retained_bytes;
	uint64_t admitted_before; /* OFFLOADED: admitted, which is 0 meanwhile */
	uint32_t protect_begin[KVG_MAX_PROTECTED], protect_end[KVG_MAX_PROTECTED];
	struct kvg_policy policy;
};

/*
 * Places 0 .. held_len - 1 of the held blocks are pairs. pending blocks follow the held ones:
 * taken for the moves of the redo record, not yet published. Outside of evictions base_len == held_len.
 */
struct meta_row {
	uint32_t base_len;
	uint32_t held_len, held_blocks, pending;
};

/*
 * A context: rows of full blocks that many sequences begin with, after those of its parent. A published one has extents
 * of its own, with copies of the tails besides; an anonymous one (of a fork) has blocks in a worker's extents.
 */
struct meta_context {
	uint64_t id;     /* among its tenant's; 0: unused */
	uint32_t state;  /* enum meta_context_state */
	uint32_t tenant; /* index in the tenants' table */
	uint32_t worker; /* of an anonymous one; META_NO_WORKER: published */
	uint32_t parent; /* index + 1 of the context that it goes on from; 0: none */
	uint32_t refs;   /* sequences and contexts that go on from it */
	uint32_t tokens; /* of the whole chain */
	uint64_t blocks; /* of its own, tails with them */
	uint64_t stride;
	uint64_t offset, size; /* its range: struct meta_context_row [rows], then block ids, row by row */
	uint32_t rows, ids;
	uint8_t key[KVG_KEY_SIZE];
	uint32_t residency; /* enum meta_residency; OFFLOADED: its rows name no blocks, and it has no extents */
	uint32_t image;     /* first frame + 1 of its blocks on the host */
	uint64_t image_bytes;
	uint64_t reserved[6];
	struct kvg_layout layout;
};

struct meta_context_row {
	uint32_t first, blocks;    /* ids of the row's full blocks */
	uint32_t tail, tail_block; /* pairs behind them, and where they are; 0: none */
};

struct meta_redo {
	uint32_t state;        /* enum meta_redo_state */
	uint32_t seq;          /* slot */
	uint32_t stripe_first; /* after publishing */
	uint32_t row_begin, row_end;
	uint32_t move_count;
	uint32_t kind; /* enum meta_redo_kind */
	uint32_t reserved[9];
};

struct meta_redo_row {
	uint32_t held_len, held_blocks; /* after publishing */
};

/* RELOCATE: move i takes a whole block, and held[row][index] names its destination afterwards. */
struct meta_relocation {
	uint32_t row, index;
};

/* The same layout as struct kvg_move in kernels/host/move.h. */
struct meta_move {
	uint32_t src, dst;
	uint8_t src_place, dst_place, count, reserved;
};

struct meta {
	int fd;
	struct meta_header *header;
	struct meta_tenant *tenants;
	struct meta_worker *workers;
	struct meta_extent *extents;
	struct meta_frame *frames; /* NULL: there is no host tier */
	size_t mapped;             /* bytes of the fixed part without frames */
	struct meta_context *contexts;
	struct list ranges;                          /* of parts, by offset */
	uint32_t *free_contexts, free_context_count; /* the lowest one last */
};

/* Where a part lies. */
struct meta_range {
	struct list node;
	uint64_t offset, size;
};

/* A context's part, mapped. */
struct meta_context_part {
	struct meta_context *context;
	struct meta_range *range;
	struct meta_context_row *rows;
	uint32_t *ids;
};

/* A redo record, mapped: the step of one eviction. */
struct meta_record {
	struct meta_redo *redo;
	struct meta_redo_row *rows;
	struct meta_move *moves;
	struct meta_relocation *relocations;
};

/* A worker's part, mapped. */
struct meta_part {
	struct meta_worker *worker;
	struct meta_range *range;
	void *base;
	struct meta_seq *seqs;
	struct meta_row *rows;
	uint32_t *scored, *held, *runs;
	struct meta_record records[META_RECORDS];
};

/* A new metadata memfd. 0 or a negative errno. */
int meta_new(uint64_t pool_size, uint64_t extent_size, uint32_t granularity, struct meta **ret);
struct meta *meta_free(struct meta *meta);

/* Adds the table of the host tier's frames to the fixed part: once, before there are workers. 0 or a negative errno. */
int meta_add_frames(struct meta *meta, uint32_t count, uint32_t frame_size);

/* The bitmap of used blocks (bit id-in-extent) and the places [blocks][KVG_BLOCK_TOKENS] of an extent. */
uint8_t *meta_bitmap(const struct meta *meta, uint32_t extent);
struct meta_place *meta_places(const struct meta *meta, uint32_t extent);

/* Creates the memory of the places of an extent's first blocks together, which costs less than a fault for each page.
 */
void meta_populate_places(const struct meta *meta, uint32_t extent, uint32_t blocks);

/* Gives the memory of an extent's places back. */
void meta_forget_places(const struct meta *meta, uint32_t extent);

/*
 * Finds a free entry of the workers' table and a range for a layout, and maps it. The caller has
 * set nothing before and fills tenant, names and ids. -EUSERS: the table is full; -EFBIG: the layout's tables are too
 * large.
 */
int meta_part_new(struct meta *meta, const struct kvg_layout *layout, uint32_t row_cap, struct meta_part *ret);
void meta_part_deinit(struct meta *meta, struct meta_part *part);

/*
 * Takes a free entry of the contexts' table and a range for its rows and ids, zeroed; the caller fills it. id is set:
 * the entry is in use. -EUSERS: the table is full.
 */
int meta_context_new(struct meta *meta, uint64_t id, uint32_t rows, uint32_t ids, struct meta_context_part *ret);
void meta_context_deinit(struct meta *meta, struct meta_context_part *part);

/* Clears what must be zero for the next sequence in a slot; forget() gives back the memory of its rows as well. */
void meta_part_clear(const struct meta_part *part, uint32_t slot);
void meta_part_forget(const struct meta *meta, const struct meta_part *part, uint32_t slot);

/* Bytes of memory that the metadata occupies. */
uint64_t meta_physical(const struct meta *meta);

static inline struct meta_row *meta_rows(const struct meta_part *part, uint32_t slot)
{
	return part->rows + (size_t)slot * part->worker->layers * part->worker->heads;
}

static inline uint32_t *meta_held(const struct meta_part *part, uint32_t slot, uint32_t row)
{
	return part->held + ((size_t)slot * part->worker->layers * part->worker->heads + row) * part->worker->row_cap;
}

static inline uint32_t *meta_run(const struct meta_part *part, uint32_t slot, uint32_t stripe)
{
	return part->runs +
	       ((size_t)slot * part->worker->stripe_cap + stripe) * part->worker->layers * part->worker->heads;
}

#endif
