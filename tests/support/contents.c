#include "tests/support/contents.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/context.h"
#include "daemon/sequence/evict.h"
#include "kernels/host/dtype.h"

/* Numbers of tokens. */
struct tokens {
	uint32_t count, capacity, *list; /* owned */
};

/* A sequence, or the rows of a context. */
struct rows {
	struct list node;
	const struct fixture *fixture; /* of a sequence */
	uint64_t name;                 /* a sequence's handle, a context's id */
	struct tokens *held;           /* [rows]: of the row's pairs, by index */
	struct tokens *gone;           /* [rows]: what evictions have dropped since it was sealed */
	struct tokens ahead;           /* those at the positions from committed_pos on, where they are written */
};

struct contents {
	struct fixture *const *spaces;
	unsigned space_count;
	uint32_t rows; /* of each space */
	struct list sequences, contexts;
	struct tokens positions; /* of each token, by number */
	struct tokens marks;     /* [positions.count] */
	uint32_t mark;           /* the last one used */
	struct contents_counts counts;
};

/* ---- tokens ---- */

static void add(struct tokens *tokens, uint32_t token)
{
	if (tokens->count == tokens->capacity) {
		tokens->capacity = tokens->capacity ? 2 * tokens->capacity : 64;
		tokens->list = reallocarray(tokens->list, tokens->capacity, sizeof(uint32_t));
		assert_non_null(tokens->list);
	}
	tokens->list[tokens->count++] = token;
}

static void add_all(struct tokens *to, const struct tokens *from, uint32_t begin, uint32_t end)
{
	for (uint32_t i = begin; i < end; i++)
		add(to, from->list[i]);
}

static void clear(struct tokens *tokens)
{
	free(tokens->list);
	*tokens = (struct tokens){0};
}

static uint32_t new_token(struct contents *contents, uint32_t position)
{
	add(&contents->positions, position);
	add(&contents->marks, 0);
	return contents->positions.count - 1;
}

/* ---- rows ---- */

static struct rows *rows_new(const struct contents *contents, struct list *all, uint64_t name)
{
	struct rows *rows = calloc(1, sizeof(*rows));

	assert_non_null(rows);
	rows->name = name;
	rows->held = calloc(contents->rows, sizeof(struct tokens));
	rows->gone = calloc(contents->rows, sizeof(struct tokens));
	assert_true(rows->held && rows->gone);
	list_add_tail(all, &rows->node);
	return rows;
}

static void rows_free(const struct contents *contents, struct rows *rows)
{
	list_remove(&rows->node);
	for (uint32_t row = 0; row < contents->rows; row++) {
		clear(&rows->held[row]);
		clear(&rows->gone[row]);
	}
	clear(&rows->ahead);
	free(rows->held);
	free(rows->gone);
	free(rows);
}

static struct rows *find_context(const struct contents *contents, uint64_t id)
{
	const struct list *all = &contents->contexts;

	for (struct list *node = all->prev; node != all; node = node->prev)
		if (list_entry(node, struct rows, node)->name == id)
			return list_entry(node, struct rows, node);
	return NULL;
}

static struct rows *find_sequence(const struct contents *contents, const struct fixture *fixture, uint64_t handle)
{
	const struct list *all = &contents->sequences;

	for (struct list *node = all->next; node != all; node = node->next) {
		struct rows *rows = list_entry(node, struct rows, node);

		if (rows->fixture == fixture && rows->name == handle)
			return rows;
	}
	return NULL;
}

static struct rows *new_sequence(struct contents *contents, const struct fixture *fixture, uint64_t handle)
{
	struct rows *rows = rows_new(contents, &contents->sequences, handle);

	rows->fixture = fixture;
	return rows;
}

static void copy_held(const struct contents *contents, struct rows *to, const struct rows *from)
{
	for (uint32_t row = 0; row < contents->rows; row++)
		add_all(&to->held[row], &from->held[row], 0, from->held[row].count);
}

/* ---- bytes ---- */

/* Word `i` of a pair, K and then V; the first one is the number itself. */
static uint32_t word_of(uint32_t token, uint32_t row, uint32_t i)
{
	uint32_t x = token * 0x9e3779b1u + row * 0x85ebca77u + i * 0xc2b2ae3du;

	if (!i)
		return token;
	x = (x ^ (x >> 16)) * 0x7feb352du;
	x = (x ^ (x >> 15)) * 0x846ca68bu;
	return x ^ (x >> 16);
}

struct pair {
	uint32_t *k, *v, k_words, v_words;
};

static struct pair pair_in(const struct space *space, uint8_t *base, uint32_t block, uint32_t index)
{
	const struct arena *arena = space->arena;
	const struct kvg_group *group = &arena->layout.groups[0];
	size_t k = group->k_dim * kvg_dtype_size(group->k_dtype), v = group->v_dim * kvg_dtype_size(group->v_dtype);
	uint8_t *at = base + block * arena->stride;

	return (struct pair){.k = (uint32_t *)(void *)(at + index % KVG_BLOCK_TOKENS * k),
		.v = (uint32_t *)(void *)(at + arena->extent_size / 2 + index % KVG_BLOCK_TOKENS * v),
		.k_words = (uint32_t)k / 4,
		.v_words = (uint32_t)v / 4};
}

static uint32_t slot_of(const struct rows *rows)
{
	return (uint32_t)rows->name;
}

static const struct kvg_slot *state_of(const struct rows *rows)
{
	return &rows->fixture->space->table.slots[slot_of(rows)];
}

static uint32_t block_of(const struct rows *rows, uint32_t row, uint32_t index)
{
	return table_row(&rows->fixture->space->table, slot_of(rows), row)[index / KVG_BLOCK_TOKENS];
}

/* As the worker finds it. */
static struct pair find_pair(const struct rows *rows, uint32_t row, uint32_t index)
{
	const struct fixture *fixture = rows->fixture;
	uint32_t block = block_of(rows, row, index);

	if (!fixture->mapped[block / fixture->space->arena->ids_per_extent])
		fail_msg("sequence %#" PRIx64 ", row %u, pair %u: block %u is not mapped", rows->name, row, index,
			block);
	return pair_in(fixture->space, fixture->view, block, index);
}

static void write_pair(const struct pair *pair, uint32_t token, uint32_t row)
{
	for (uint32_t i = 0; i < pair->k_words; i++)
		pair->k[i] = word_of(token, row, i);
	for (uint32_t i = 0; i < pair->v_words; i++)
		pair->v[i] = word_of(token, row, pair->k_words + i);
}

/* Whether it is one token's in every word. */
static bool is_whole(const struct pair *pair, uint32_t token, uint32_t row)
{
	bool whole = true;

	for (uint32_t i = 0; i < pair->k_words; i++)
		whole &= pair->k[i] == word_of(token, row, i);
	for (uint32_t i = 0; i < pair->v_words; i++)
		whole &= pair->v[i] == word_of(token, row, pair->k_words + i);
	return whole;
}

static void check_pair(struct contents *contents, const char *what, uint64_t name, const struct pair *pair,
	uint32_t row, uint32_t index, uint32_t token)
{
	contents->counts.pairs++;
	if (!is_whole(pair, token, row))
		fail_msg("%s %#" PRIx64 ", row %u, pair %u: K begins with %u, V with %u, and not with token %u, %u",
			what, name, row, index, pair->k[0], pair->v[0], token, word_of(token, row, pair->k_words));
}

/* ---- a sequence ---- */

static uint32_t table_length(const struct rows *rows, uint32_t row)
{
	const struct kvg_slot *state = state_of(rows);

	return *table_base_len(&rows->fixture->space->table, slot_of(rows), row) + state->committed_pos -
	       state->fold_pos;
}

/* The daemon's own word on a pair that evictions may look at. */
static void check_place(
	const struct contents *contents, const struct rows *rows, uint32_t row, uint32_t index, uint32_t token)
{
	const struct space *space = rows->fixture->space;
	uint32_t position = contents->positions.list[token], block = block_of(rows, row, index);
	const struct meta_place *places = blocks_places(space->arena, space->pool->meta, block);

	if (index < *table_base_len(&space->table, slot_of(rows), row) && position >= state_of(rows)->shared_pos)
		assert_int_equal(places[index % KVG_BLOCK_TOKENS].pos, position);
}

static void check_row(struct contents *contents, const struct rows *rows, uint32_t row)
{
	const struct tokens *held = &rows->held[row];

	if (table_length(rows, row) != held->count)
		fail_msg("sequence %#" PRIx64 ", row %u: %u pairs, must be %u", rows->name, row,
			table_length(rows, row), held->count);
	for (uint32_t i = 0; i < held->count; i++) {
		struct pair pair = find_pair(rows, row, i);

		check_pair(contents, "sequence", rows->name, &pair, row, i, held->list[i]);
		check_place(contents, rows, row, i, held->list[i]);
	}
}

static void check_sequence(struct contents *contents, const struct rows *rows)
{
	for (uint32_t row = 0; row < contents->rows; row++)
		check_row(contents, rows, row);
}

/* Tokens of its own in all the room that it has. */
static void write_ahead(struct contents *contents, struct rows *rows)
{
	const struct kvg_slot *state = state_of(rows);

	rows->ahead.count = 0;
	for (uint32_t pos = state->committed_pos; pos < state->reserved_pos; pos++)
		add(&rows->ahead, new_token(contents, pos));
	for (uint32_t row = 0; row < contents->rows; row++)
		for (uint32_t i = 0; i < rows->ahead.count; i++) {
			struct pair pair = find_pair(rows, row, table_length(rows, row) + i);

			write_pair(&pair, rows->ahead.list[i], row);
		}
}

static void commit(struct contents *contents, struct rows *rows)
{
	uint32_t rest = state_of(rows)->reserved_pos - state_of(rows)->committed_pos, begin;

	assert_true(rest <= rows->ahead.count);
	begin = rows->ahead.count - rest;
	for (uint32_t row = 0; row < contents->rows; row++)
		add_all(&rows->held[row], &rows->ahead, 0, begin);
	for (uint32_t i = 0; i < rest; i++)
		rows->ahead.list[i] = rows->ahead.list[begin + i];
	rows->ahead.count = rest;
}

/* ---- evictions and recalls ---- */

/* A dropped pair, or one that must still be there. */
static void miss(struct contents *contents, struct rows *rows, uint32_t row, uint32_t token, bool may_drop)
{
	const struct meta_seq *meta = &rows->fixture->space->part.seqs[slot_of(rows)];
	uint32_t position = contents->positions.list[token];

	if (!may_drop || position < meta->shared_pos || evict_is_protected(meta, position))
		fail_msg("sequence %#" PRIx64 ", row %u has lost token %u of position %u", rows->name, row, token,
			position);
	add(&rows->gone[row], token);
	contents->counts.dropped++;
}

static void mark_all(const struct contents *contents, const struct tokens *tokens, uint32_t mark)
{
	for (uint32_t i = 0; i < tokens->count; i++)
		contents->marks.list[tokens->list[i]] = mark;
}

/* What the row holds in whatever order: pairs that it held or, after a recall, that had gone. */
static void read_row(struct contents *contents, struct rows *rows, uint32_t row, bool recall)
{
	uint32_t was_held = ++contents->mark, was_gone = ++contents->mark, *marks;
	struct tokens held = rows->held[row], gone = rows->gone[row];

	rows->held[row] = rows->gone[row] = (struct tokens){0};
	mark_all(contents, &held, was_held);
	mark_all(contents, &gone, was_gone);
	marks = contents->marks.list;
	for (uint32_t i = 0; i < table_length(rows, row); i++) {
		struct pair pair = find_pair(rows, row, i);
		uint32_t token = *pair.k;

		if (token >= contents->marks.count ||
			(marks[token] != was_held && !(recall && marks[token] == was_gone)))
			fail_msg("sequence %#" PRIx64 ", row %u, pair %u: token %u is not of those that it may hold",
				rows->name, row, i, token);
		contents->counts.recalled += marks[token] == was_gone;
		marks[token] = 0;
		add(&rows->held[row], token);
	}
	for (uint32_t i = 0; i < held.count; i++)
		if (marks[held.list[i]] == was_held)
			miss(contents, rows, row, held.list[i], !recall);
	for (uint32_t i = 0; i < gone.count; i++)
		if (marks[gone.list[i]] == was_gone)
			add(&rows->gone[row], gone.list[i]);
	clear(&held);
	clear(&gone);
}

static void read_sequence(struct contents *contents, struct rows *rows, const struct request *request)
{
	bool recall = request->sqe.op == KVG_OP_RECALL;
	uint64_t *moved = recall ? &contents->counts.recalled : &contents->counts.dropped, before = *moved, pairs = 0;

	for (uint32_t row = 0; row < contents->rows; row++) {
		read_row(contents, rows, row, recall);
		pairs += rows->held[row].count;
	}
	assert_int_equal(request->cqe.value[0], pairs);
	assert_int_equal(request->cqe.value[1], *moved - before);
}

/* ---- contexts ---- */

/* A context is found before its publisher's request is completed, which may never be. */
static void note_publish(
	struct contents *contents, const struct fixture *fixture, const struct request *request, uint64_t handle)
{
	const struct rows *rows = find_sequence(contents, fixture, handle);
	uint64_t id = request->cqe.value[0];

	if (request->sqe.op == KVG_OP_PUBLISH && rows && id && !request->cqe.value[3] && !find_context(contents, id))
		copy_held(contents, rows_new(contents, &contents->contexts, id), rows);
}

static void note_publishes(struct contents *contents, const struct fixture *fixture)
{
	const struct list *calls = &fixture->calls;

	for (struct list *node = calls->next; node != calls; node = node->next) {
		const struct request *request = &list_entry(node, struct call, node)->request;

		if (request->sequence)
			note_publish(contents, fixture, request, sequence_handle(request->sequence));
	}
}

/* The sequence goes on behind a context. What it had of full blocks was as many pairs, of its own tokens. */
static void join_context(struct contents *contents, struct rows *rows, uint64_t id)
{
	const struct rows *context = find_context(contents, id);
	const uint32_t *shared = space_sequence(rows->fixture->space, rows->name)->shared;

	assert_non_null(context);
	for (uint32_t row = 0; row < contents->rows; row++) {
		const struct tokens *from = &context->held[row];

		assert_int_equal(rows->held[row].count, from->count);
		for (uint32_t i = 0; i < shared[row] * KVG_BLOCK_TOKENS; i++)
			rows->held[row].list[i] = from->list[i];
	}
	contents->counts.joined++;
}

static void seal(const struct contents *contents, struct rows *rows)
{
	for (uint32_t row = 0; row < contents->rows; row++)
		rows->gone[row].count = 0;
}

/* Through the daemon's mapping: no worker needs to have one. */
static void check_context_row(
	struct contents *contents, const struct context *context, const struct rows *rows, uint32_t row)
{
	const struct meta_context_row *own = &context->part.rows[row];
	uint32_t first = (context->shared[row] - own->blocks) * KVG_BLOCK_TOKENS;
	uint32_t full = own->blocks * KVG_BLOCK_TOKENS;
	const struct space *space = contents->spaces[0]->space;

	assert_int_equal(rows->held[row].count, first + full + own->tail);
	for (uint32_t i = 0; i < full + own->tail; i++) {
		uint32_t block = i < full ? context->part.ids[own->first + i / KVG_BLOCK_TOKENS] : own->tail_block;
		struct pair pair = pair_in(space, context->arena->base, block, i);

		check_pair(contents, "context", rows->name, &pair, row, i, rows->held[row].list[first + i]);
	}
}

static void check_contexts(struct contents *contents)
{
	const struct list *all = &contents->contexts;

	for (struct list *node = all->next; node != all; node = node->next) {
		const struct rows *rows = list_entry(node, struct rows, node);
		const struct context *context = context_find_id(contents->spaces[0]->tenant, rows->name);

		if (!context || context->move || context->part.context->residency != META_RESIDENT)
			continue;
		for (uint32_t row = 0; row < contents->rows; row++)
			check_context_row(contents, context, rows, row);
		contents->counts.contexts++;
	}
}

/* ---- completions ---- */

/* Those after which the worker has other room than before, or may have. */
static bool makes_room(uint8_t op)
{
	return op != KVG_OP_STAGE && op != KVG_OP_QUERY && op != KVG_OP_PROTECT && op != KVG_OP_IDLE &&
	       op != KVG_OP_COMMIT;
}

/* Reads it and writes behind it, as far as its worker may. */
static void look_at(struct contents *contents, struct rows *rows, uint8_t op)
{
	const struct meta_seq *meta = &rows->fixture->space->part.seqs[slot_of(rows)];

	if (meta->residency != META_RESIDENT || !makes_room(op))
		return;
	check_sequence(contents, rows);
	if (!meta->idle)
		write_ahead(contents, rows);
}

/* What its slot held before is not the sequence's. */
static void check_empty(const struct contents *contents, const struct rows *rows)
{
	const struct meta_row *meta = meta_rows(&rows->fixture->space->part, slot_of(rows));

	for (uint32_t row = 0; row < contents->rows; row++)
		if (meta[row].held_blocks || meta[row].held_len || meta[row].base_len || table_length(rows, row))
			fail_msg("sequence %#" PRIx64 ", row %u: %u blocks, and it is new", rows->name, row,
				meta[row].held_blocks);
}

static void begin_sequence(struct contents *contents, const struct fixture *fixture, const struct request *request)
{
	struct rows *rows = new_sequence(contents, fixture, request->cqe.seq);
	const struct rows *context;

	if (request->sqe.op == KVG_OP_CREATE) {
		check_empty(contents, rows);
		return;
	}
	context = find_context(contents, request->sqe.seq);
	assert_non_null(context);
	copy_held(contents, rows, context);
}

static void fork_sequence(struct contents *contents, struct rows *parent, const struct request *request)
{
	struct rows *child = new_sequence(contents, parent->fixture, request->cqe.value[1]);

	copy_held(contents, child, parent);
	if (state_of(parent)->shared_pos == state_of(parent)->committed_pos)
		seal(contents, parent);
	look_at(contents, child, KVG_OP_FORK);
}

static void truncate_rows(const struct contents *contents, struct rows *rows)
{
	for (uint32_t row = 0; row < contents->rows; row++) {
		assert_true(table_length(rows, row) <= rows->held[row].count);
		rows->held[row].count = table_length(rows, row);
	}
}

/* What a request that succeeded has made of the rows. */
static void change(struct contents *contents, struct rows *rows, const struct request *request)
{
	switch (request->sqe.op) {
	case KVG_OP_COMMIT:
		assert_int_equal(state_of(rows)->committed_pos, request->sqe.commit.pos);
		commit(contents, rows);
		break;
	case KVG_OP_TRUNCATE:
		assert_int_equal(state_of(rows)->committed_pos, request->sqe.truncate.pos);
		truncate_rows(contents, rows);
		break;
	case KVG_OP_EVICT:
	case KVG_OP_RECALL:
		read_sequence(contents, rows, request);
		break;
	case KVG_OP_PUBLISH:
		if (request->cqe.value[3])
			join_context(contents, rows, request->cqe.value[0]);
		seal(contents, rows);
		break;
	case KVG_OP_FORK:
		fork_sequence(contents, rows, request);
		break;
	default:
		break;
	}
}

void contents_completed(struct contents *contents, struct fixture *fixture, const struct request *request)
{
	uint8_t op = request->sqe.op;
	bool ok = request->cqe.status >= 0;
	struct rows *rows;

	for (unsigned i = 0; i < contents->space_count; i++)
		if (contents->spaces[i] && !atomic_load(&contents->spaces[i]->space->dying))
			note_publishes(contents, contents->spaces[i]);
	if (ok && op == KVG_OP_PUBLISH)
		note_publish(contents, fixture, request, request->cqe.seq);
	if (ok && (op == KVG_OP_CREATE || op == KVG_OP_ATTACH))
		begin_sequence(contents, fixture, request);
	rows = request->cqe.seq ? find_sequence(contents, fixture, request->cqe.seq) : NULL;
	if (!rows)
		return;
	if (ok && op == KVG_OP_FREE) {
		rows_free(contents, rows);
		return;
	}
	if (ok)
		change(contents, rows, request);
	look_at(contents, rows, op);
}

static void completed(void *user, struct fixture *fixture, const struct request *request)
{
	contents_completed(user, fixture, request);
}

/* ---- from beginning to end ---- */

void contents_check(struct contents *contents)
{
	const struct list *all = &contents->sequences;

	for (struct list *node = all->next; node != all; node = node->next) {
		const struct rows *rows = list_entry(node, struct rows, node);
		const struct sequence *sequence = space_sequence(rows->fixture->space, rows->name);

		assert_non_null(sequence);
		if (!sequence->busy && sequence->meta->residency == META_RESIDENT)
			check_sequence(contents, rows);
	}
	check_contexts(contents);
}

void contents_join(struct contents *contents, struct fixture *fixture)
{
	fixture->told = completed;
	fixture->told_user = contents;
}

void contents_leave(struct contents *contents, const struct fixture *fixture)
{
	note_publishes(contents, fixture);
	for (struct list *node = contents->sequences.next, *next; node != &contents->sequences; node = next) {
		struct rows *rows = list_entry(node, struct rows, node);

		next = node->next;
		if (rows->fixture == fixture)
			rows_free(contents, rows);
	}
}

struct contents *contents_new(struct fixture *const *spaces, unsigned count)
{
	struct contents *contents = calloc(1, sizeof(*contents));

	assert_non_null(contents);
	contents->spaces = spaces;
	contents->space_count = count;
	contents->rows = spaces[0]->space->rows;
	list_init(&contents->sequences);
	list_init(&contents->contexts);
	for (unsigned i = 0; i < count; i++)
		contents_join(contents, spaces[i]);
	return contents;
}

void contents_free(struct contents *contents)
{
	while (!list_empty(&contents->sequences))
		rows_free(contents, list_entry(contents->sequences.next, struct rows, node));
	while (!list_empty(&contents->contexts))
		rows_free(contents, list_entry(contents->contexts.next, struct rows, node));
	clear(&contents->positions);
	clear(&contents->marks);
	free(contents);
}

struct contents_counts contents_counts(const struct contents *contents)
{
	return contents->counts;
}
