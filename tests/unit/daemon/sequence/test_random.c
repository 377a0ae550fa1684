/*
 * Entries at random in three workers' spaces of one tenant, that no case by itself would try: for sequences that are
 * there, that will be, and that never were, in bursts, while the daemon's own requests, reclaim, kills, other budgets
 * and failures of the host's memory come in between. Each one is completed, the metadata is right, every pair is what
 * its place says (contents.h), and in the end every byte is back.
 *
 * KVG_RANDOM_SEED (1) is the first seed and KVG_RANDOM_SEEDS (24) how many there are. Each is printed when it begins,
 * so that the last one of the output is the one that failed, also when a sanitizer ended the program. A seed does not
 * fix when the executor's thread has done its part, on which later entries depend: what one run finds may take several
 * to find again.
 */
#include "daemon/sequence/context.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/offload.h"
#include "tests/support/contents.h"
#include "tests/support/space_model.h"
#include "tests/support/test_kind.h"

#define SPACES      3
#define SEEDS       24
#define ROUNDS      300
#define AUDITED     60 /* rounds with an audit after each completion: under a sanitizer they are slow */
#define LAYERS      2
#define HEADS       2
#define EXTENT      (16u << 10)
#define WIDE_EXTENT (256u << 10)
#define OPS         32
#define SORTS       17
#define MOST_TURNS  200000
#define LONG_SCORES 1024 /* the reactor itself stores that many, the executor more */
#define LONG_ROWS   (LONG_SCORES / (LAYERS * HEADS))

static const size_t one_tenant = 1;

struct count {
	unsigned succeeded, failed;
};

/* Of all seeds. */
struct counts {
	struct count worker[OPS], own[OPS]; /* by operation; own: the daemon's own requests */
	struct count short_stage, long_stage;
	unsigned killed, longest_burst;
	struct contents_counts contents;
};

/* What differs from seed to seed besides the entries. */
struct variation {
	size_t extent_size;
	uint32_t k_dim, v_dim; /* of floats, so many that copies of blocks take several slices; 0: few */
	uint64_t device_max, host_size;
	uint32_t fail_one_in;     /* creations of extents; 0: none */
	uint32_t context_entries; /* that the metadata's table has for contexts; 0: all */
	bool audit;               /* after each completion, not only now and then */
	unsigned rounds;
	uint32_t most_tokens; /* that a sequence grows by at a time */
	uint32_t kill_one_in; /* rounds */
	bool budgets;         /* they change */
	bool biased;          /* some operations are submitted often and others not at all */
};

struct world {
	struct test_kind kind; /* first: create() casts */
	uint32_t fail_one_in;
	_Atomic(uint32_t) creations;
	struct variation variation;
	uint32_t weights[SORTS]; /* how often each sort of entry is submitted */
	struct random random;
	struct reclaim reclaim;
	struct contents *contents;
	struct fixture *spaces[SPACES]; /* the first one has the loop, the pool and the tenant */
	uint32_t context_entries;       /* that the table had */
	unsigned own;                   /* requests of the daemon's own that have not ended */
	struct counts *counts;
};

/* A request of the daemon's own. */
struct own {
	struct request request;
	struct world *world;
};

static uint32_t below(struct world *world, uint32_t limit)
{
	return random_below(&world->random, limit);
}

static bool one_in(struct world *world, uint32_t n)
{
	return below(world, n) == 0;
}

static struct variation variation_of(unsigned seed)
{
	static const uint64_t host_sizes[] = {0, 256 << 10, 4 << 20};
	bool wide = seed % 7 == 6;
	size_t extent_size = wide ? WIDE_EXTENT : (size_t)EXTENT << seed % 3;

	return (struct variation){.extent_size = extent_size,
		.k_dim = wide ? 128 : 0,
		.v_dim = wide ? 96 : 0,
		.device_max = (20 + seed % 5 * 20) * (uint64_t)extent_size,
		.host_size = host_sizes[(seed + seed / 3) % 3],
		.fail_one_in = seed % 6 == 1 ? 20 : 0,
		.context_entries = seed % 5 == 2 ? 24 : 0,
		.audit = seed % 8 == 0,
		.rounds = seed % 8 == 0 ? AUDITED : ROUNDS,
		.most_tokens = seed % 5 == 4 ? KVG_BLOCK_TOKENS - 4 : LONG_ROWS + 150,
		.kill_one_in = seed % 5 == 3 ? 10 : 40,
		.budgets = seed % 3 == 2,
		.biased = seed % 2 == 1};
}

/* ---- what an entry says ---- */

/* A sequence that is there, rather one that its worker has released if idle is set; 0: there is none. */
static uint64_t random_sequence(struct world *world, const struct fixture *fixture, bool idle)
{
	uint32_t most = fixture->layout.max_sequences, first = below(world, most);
	uint64_t found = 0;

	for (uint32_t i = 0; i < most; i++) {
		const struct sequence *sequence = fixture->space->sequences[(first + i) % most];

		if (sequence && (!found || (idle && sequence->meta->idle)))
			found = sequence_handle(sequence);
	}
	return found;
}

/* Most name a sequence; some one that the next CREATE, ATTACH or FORK makes, or none. */
static uint64_t random_handle(struct world *world, const struct fixture *fixture)
{
	const struct space *space = fixture->space;
	uint32_t later = one_in(world, 3) && space->free_count > 1;
	uint64_t there = random_sequence(world, fixture, false);

	if (there && !one_in(world, 5))
		return there;
	if (space->free_count && !one_in(world, 4))
		return (uint64_t)(space->epoch + 1 + later) << 32 | space->free_slots[space->free_count - 1 - later];
	return (uint64_t)below(world, 50) << 32 | below(world, 8);
}

static uint64_t random_context(struct world *world)
{
	const struct tenant *tenant = world->spaces[0]->tenant;
	const struct context *context = context_first(tenant);

	for (uint32_t skip = below(world, 5); context && skip; skip--)
		context = context_next(context);
	if (context && !one_in(world, 8))
		return context->part.context->id;
	return tenant->next_context > 8 ? tenant->next_context - below(world, 8) : tenant->next_context;
}

static struct kvg_policy random_policy(struct world *world)
{
	struct kvg_policy policy = {.mode = (uint8_t)below(world, 4),
		.level = (uint8_t)below(world, 4),
		.ratio = 0.001 + 0.9 * below(world, 1000) / 1000.0,
		.threshold = 0.5f,
		.context_tokens = below(world, 300),
		.max_new_tokens = below(world, 300),
		.window = below(world, 30)};

	if (one_in(world, 2))
		policy.flags |= KVG_POLICY_WINDOW_ABSOLUTE;
	if (one_in(world, 2))
		policy.flags |= KVG_POLICY_RETAIN_HOST;
	if (one_in(world, 2))
		policy.chunk_tokens = below(world, 100);
	if (one_in(world, 3))
		policy.budget = 1 + below(world, 100);
	if (one_in(world, 5))
		policy.prefix_tokens = below(world, 20);
	if (one_in(world, 8))
		policy.floor = below(world, 20);
	return policy;
}

static void fill_create(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->create = random_policy(world);
	sqe->seq = 0;
}

/* Some are fewer than a block, so that there is nothing to share; some so many that their scores are not few. */
static uint32_t random_tokens(struct world *world)
{
	static const uint32_t limits[] = {KVG_BLOCK_TOKENS, 170, 170, 170, 170, LONG_ROWS + 150};

	uint32_t limit = limits[below(world, sizeof(limits) / sizeof(limits[0]))], most = world->variation.most_tokens;

	return 1 + below(world, limit < most ? limit : most);
}

static void fill_reserve(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->reserve.tokens = random_tokens(world);
}

static void fill_commit(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	const struct meta_seq *meta = sequence ? sequence->meta : NULL;

	if (!meta)
		return;
	sqe->commit.pos = meta->committed_pos + below(world, meta->reserved_pos - meta->committed_pos + 1);
	if (one_in(world, 2))
		sqe->commit.pos = meta->reserved_pos;
}

/* The first position that has no scores in the first layer. */
static uint32_t scored_to(const struct sequence *sequence)
{
	return sequence->space->part.scored[(size_t)sequence->slot * LAYERS];
}

static void stage_rows(struct kvg_sqe *sqe, uint32_t begin, uint32_t end)
{
	sqe->stage.kind = KVG_STAGE_SCORE;
	sqe->stage.layer_count = LAYERS;
	sqe->stage.pos = begin;
	sqe->stage.rows = end > begin ? end - begin : 1;
}

/* What has no scores yet, or all rows anew, of which there may be many; some with other layers and places. */
static void fill_stage(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	if (!sequence)
		stage_rows(sqe, 0, 1);
	else if (one_in(world, 4))
		stage_rows(sqe, sequence->meta->fold_pos, sequence->meta->reserved_pos);
	else
		stage_rows(sqe, scored_to(sequence), sequence->meta->reserved_pos);
	if (one_in(world, 4))
		sqe->stage.rows = 1 + below(world, sqe->stage.rows);
	if (one_in(world, 12)) {
		sqe->stage.layer_begin = below(world, LAYERS + 1);
		sqe->stage.layer_count = below(world, LAYERS + 1);
	}
	if (one_in(world, 12)) {
		sqe->stage.offset = below(world, 64);
		sqe->stage.layer_stride = below(world, 8192);
	}
}

static void fill_evict(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->evict.mode = one_in(world, 2) ? KVG_EVICT_DECODE : KVG_EVICT_PREFILL;
}

static void fill_truncate(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	const struct meta_seq *meta = sequence ? sequence->meta : NULL;

	if (meta)
		sqe->truncate.pos = meta->fold_pos + below(world, meta->committed_pos - meta->fold_pos + 1);
}

static void fill_protect(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->protect.begin = below(world, 200);
	sqe->protect.end = sqe->protect.begin + below(world, 30);
}

/* Few keys, so that they meet, and some new ones. */
static void fill_publish(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->publish.key[3] = (uint8_t)below(world, one_in(world, 4) ? 60 : 6);
}

static void fill_find(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	fill_publish(world, sequence, sqe);
	sqe->seq = 0;
}

static void fill_attach(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->attach = random_policy(world);
	sqe->seq = random_context(world);
}

static void fill_recall(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)sequence;
	sqe->recall.ratio = 0.01 + 0.9 * below(world, 100) / 100.0;
	if (one_in(world, 3)) {
		sqe->recall.flags = KVG_RECALL_BUDGET;
		sqe->recall.budget = 1 + below(world, 200);
	}
}

static void fill_nothing(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe)
{
	(void)world;
	(void)sequence;
	(void)sqe;
}

/* ---- entries ---- */

static const struct sort {
	uint8_t op, weight;
	bool named; /* it names a sequence */
	void (*fill)(struct world *world, const struct sequence *sequence, struct kvg_sqe *sqe);
} sorts[SORTS] = {
	{KVG_OP_RESERVE, 3, true, fill_reserve},
	{KVG_OP_COMMIT, 2, true, fill_commit},
	{KVG_OP_STAGE, 2, true, fill_stage},
	{KVG_OP_EVICT, 2, true, fill_evict},
	{KVG_OP_TRUNCATE, 1, true, fill_truncate},
	{KVG_OP_FREE, 2, true, fill_nothing},
	{KVG_OP_PROTECT, 1, true, fill_protect},
	{KVG_OP_QUERY, 1, true, fill_nothing},
	{KVG_OP_OFFLOAD, 1, true, fill_nothing},
	{KVG_OP_RESTORE, 1, true, fill_nothing},
	{KVG_OP_IDLE, 2, true, fill_nothing},
	{KVG_OP_RECALL, 1, true, fill_recall},
	{KVG_OP_PUBLISH, 2, true, fill_publish},
	{KVG_OP_FORK, 2, true, fill_nothing},
	{KVG_OP_CREATE, 2, false, fill_create},
	{KVG_OP_FIND, 1, false, fill_find},
	{KVG_OP_ATTACH, 3, false, fill_attach},
};

static const struct sort create_sort = {.op = KVG_OP_CREATE, .fill = fill_create};

static const uint8_t own_ops[] = {KVG_OP_OFFLOAD, KVG_OP_RESTORE, KVG_OP_EVICT, KVG_OP_RECALL};

static const struct sort *random_sort(struct world *world)
{
	uint32_t sum = 0, at;

	for (size_t i = 0; i < SORTS; i++)
		sum += world->weights[i];
	at = below(world, sum);
	for (size_t i = 0;; i++) {
		if (at < world->weights[i])
			return &sorts[i];
		at -= world->weights[i];
	}
}

/* Without CREATE nothing would be there; what all do the same share of the time hardly ever meets itself. */
static void weigh(struct world *world)
{
	static const uint32_t factors[] = {0, 1, 1, 6};

	for (size_t i = 0; i < SORTS; i++) {
		world->weights[i] = sorts[i].weight;
		if (world->variation.biased && sorts[i].op != KVG_OP_CREATE)
			world->weights[i] *= factors[below(world, 4)];
	}
}

static void submit(struct world *world, struct fixture *fixture, const struct sort *sort, uint64_t handle)
{
	struct kvg_sqe sqe = {.op = sort->op, .seq = handle};
	const struct sequence *sequence = space_sequence(fixture->space, handle);

	if (sequence)
		sqe.generation = sequence->meta->generation + one_in(world, 12);
	sort->fill(world, sequence, &sqe);
	(void)fixture_start(fixture, &sqe);
}

/* What the worker was asked to unmap, as a rule; or some of it, or more than that. */
static void acknowledge(struct world *world, struct fixture *fixture)
{
	struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED, .unmapped.event = fixture->dropped_event};

	if (one_in(world, 3))
		sqe.unmapped.event += (uint32_t)one_in(world, 10) - below(world, 3);
	(void)fixture_start(fixture, &sqe);
}

static void submit_some(struct world *world, struct fixture *fixture)
{
	if (!fixture->space->sequence_count)
		submit(world, fixture, &create_sort, 0);
	for (uint32_t n = 1 + below(world, 5); n; n--) {
		if (one_in(world, 16))
			acknowledge(world, fixture);
		else
			submit(world, fixture, random_sort(world), random_handle(world, fixture));
	}
}

/* Many entries for one sequence, of which few end it: those that follow would only find it gone. */
static void burst(struct world *world, struct fixture *fixture)
{
	uint64_t there = random_sequence(world, fixture, false), handle = there ? there : random_handle(world, fixture);
	unsigned count = 1 + below(world, 200);

	for (unsigned n = 0; n < count; n++) {
		const struct sort *sort = random_sort(world);

		if (!sort->named || (sort->op == KVG_OP_FREE && !one_in(world, 20)))
			sort = sorts; /* RESERVE */
		submit(world, fixture, sort, handle);
	}
	if (world->counts->longest_burst < count)
		world->counts->longest_burst = count;
}

/* Each worker a sequence of its own under one key: all but one of them wait. */
static void publish_together(struct world *world)
{
	struct kvg_sqe sqe = {.op = KVG_OP_PUBLISH};

	fill_publish(world, NULL, &sqe);
	for (unsigned i = 0; i < SPACES; i++) {
		const struct sequence *sequence;

		sqe.seq = random_handle(world, world->spaces[i]);
		sequence = space_sequence(world->spaces[i]->space, sqe.seq);
		sqe.generation = sequence ? sequence->meta->generation : 0;
		(void)fixture_start(world->spaces[i], &sqe);
	}
}

/* What a worker does for a chunk of its prompt, as one chain of entries. */
static void append(struct world *world, struct fixture *fixture)
{
	uint64_t handle = random_handle(world, fixture);
	const struct sequence *sequence = space_sequence(fixture->space, handle);
	uint32_t tokens = random_tokens(world), end, scored;
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = tokens};
	struct kvg_policy policy;

	if (!sequence || sequence->busy)
		return;
	policy = sequence->meta->policy;
	end = sequence->meta->committed_pos + tokens;
	scored = scored_to(sequence);
	sqe.generation = sequence->meta->generation;
	(void)fixture_start(fixture, &sqe);
	sqe.op = KVG_OP_COMMIT;
	sqe.commit.pos = end;
	(void)fixture_start(fixture, &sqe);
	if (end > scored) {
		sqe.op = KVG_OP_STAGE;
		stage_rows(&sqe, scored, end);
		(void)fixture_start(fixture, &sqe);
	}
	if (one_in(world, 2))
		return;
	sqe = (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = handle, .generation = sqe.generation};
	if (policy.budget && end >= policy.prefix_tokens + policy.context_tokens)
		sqe.evict.mode = KVG_EVICT_DECODE;
	(void)fixture_start(fixture, &sqe);
}

/* Few sequences have anything that a recall could bring back. */
static void recall_one(struct world *world, struct fixture *fixture)
{
	static const struct sort recall_sort = {.op = KVG_OP_RECALL, .fill = fill_recall};
	uint32_t most = fixture->layout.max_sequences, first = below(world, most);

	for (uint32_t i = 0; i < most; i++) {
		const struct sequence *sequence = fixture->space->sequences[(first + i) % most];

		if (!sequence || sequence->busy || !sequence->meta->retained_bytes)
			continue;
		submit(world, fixture, &recall_sort, sequence_handle(sequence));
		return;
	}
}

/* ---- what the daemon does of its own accord ---- */

static void note(struct count *count, const struct request *request)
{
	if (request->cqe.status < 0)
		count->failed++;
	else
		count->succeeded++;
}

static void own_completed(struct request *request)
{
	struct own *own = list_entry(request, struct own, request);

	note(&own->world->counts->own[request->sqe.op], request);
	contents_completed(own->world->contents, request->space->user, request);
	own->world->own--;
	request_deinit(request);
	free(own);
}

static void submit_own(struct world *world, struct fixture *fixture)
{
	struct own *own = calloc(1, sizeof(*own));
	struct request *request = &own->request;

	assert_non_null(own);
	own->world = world;
	/* Most evictions find no scores, or a prompt that is not complete. */
	request->sqe.op = one_in(world, 3) ? KVG_OP_EVICT : own_ops[below(world, sizeof(own_ops))];
	request->sqe.seq = one_in(world, 3) ? random_handle(world, fixture) : random_sequence(world, fixture, true);
	request->completed = own_completed;
	if (request->sqe.op == KVG_OP_EVICT) {
		request->sqe.evict.mode = KVG_EVICT_DECODE;
		request->share = 0.01 + 0.5 * below(world, 100) / 100.0;
	}
	if (request->sqe.op == KVG_OP_RECALL)
		request->sqe.recall.ratio = 0.5;
	world->own++;
	offload_submit(fixture->space, request);
}

static void forget_one(struct world *world)
{
	struct context *context = context_find_id(world->spaces[0]->tenant, random_context(world));

	if (context && (!context->part.context->refs || one_in(world, 2)))
		context_forget(context);
}

/* What the administrator does; also to less than is in use. */
static void change_budget(struct world *world)
{
	enum tenant_tier tier = one_in(world, 2) ? TENANT_DEVICE : TENANT_HOST;
	struct tenant *tenant = world->spaces[0]->tenant;
	uint64_t most = tier == TENANT_DEVICE ? world->variation.device_max : world->variation.host_size;
	struct budget budget = {.max = most * (1 + below(world, 4)) / 4};
	char text[QUOTA_TEXT];

	if (one_in(world, 2))
		budget.high = budget.max * (1 + below(world, 4)) / 4;
	if (one_in(world, 2))
		budget.min = (budget.high ? budget.high : budget.max) * below(world, 3) / 4;
	if (tenant_set_budget(tenant, tier, &budget, text) < 0)
		fail_msg("%s", text);
	reclaim_check(tenant);
}

static void restore_budgets(struct world *world)
{
	const struct variation *v = &world->variation;
	struct tenant *tenant = world->spaces[0]->tenant;
	char text[QUOTA_TEXT];

	assert_int_equal(tenant_set_budget(tenant, TENANT_DEVICE, &(struct budget){.max = v->device_max}, text), 0);
	assert_int_equal(tenant_set_budget(tenant, TENANT_HOST, &(struct budget){.max = v->host_size}, text), 0);
}

static void on_pressure(void *user, struct tenant *tenant, bool on)
{
	struct world *world = user;

	(void)tenant;
	for (unsigned i = 0; on && i < SPACES; i++) {
		const struct fixture *fixture = world->spaces[i];

		if (fixture && !fixture->closed && !atomic_load(&fixture->space->dying))
			space_return_spare(fixture->space);
	}
}

static const struct reclaim_ops reclaim_ops = {.pressure = on_pressure};

/* On the executor. */
static int create(struct kind *kind, size_t size)
{
	struct world *world = (struct world *)(void *)kind;

	if (world->fail_one_in && ++world->creations % world->fail_one_in == 0)
		return -ENOMEM;
	return test_kind_host(kind)->create(kind, size);
}

/* ---- what becomes of it ---- */

static void note_stage(struct counts *counts, const struct request *request)
{
	uint64_t scores = (uint64_t)request->sqe.stage.rows * request->sqe.stage.layer_count * HEADS;

	note(scores > LONG_SCORES ? &counts->long_stage : &counts->short_stage, request);
}

/* Frees the calls that are done. Returns how many are not. */
static unsigned reap(struct world *world, struct fixture *fixture)
{
	unsigned left = 0;

	for (struct list *node = fixture->calls.next, *next; node != &fixture->calls; node = next) {
		struct call *call = list_entry(node, struct call, node);
		const struct request *request = &call->request;

		next = node->next;
		if (!call->done) {
			left++;
			continue;
		}
		note(&world->counts->worker[request->sqe.op], request);
		if (request->sqe.op == KVG_OP_STAGE)
			note_stage(world->counts, request);
		if (request->cqe.status < 0 && !request->text[0])
			fail_msg("operation %u failed with %d and no text", request->sqe.op, request->cqe.status);
		list_remove(&call->node);
		request_deinit(&call->request);
		free(call);
	}
	return left;
}

static void fill_staging(struct world *world, const struct fixture *fixture)
{
	float *scores = (float *)(void *)fixture->staging;

	for (size_t i = 0; i < fixture->staging_size / sizeof(float); i++)
		scores[i] = (float)below(world, 1000) / 1000.0f;
}

static struct fixture_options options_of(const struct world *world)
{
	const struct variation *v = &world->variation;

	return (struct fixture_options){.extent_size = v->extent_size,
		.device_max = v->device_max,
		.host_size = v->host_size,
		.layers = LAYERS,
		.heads = HEADS,
		.k_dim = v->k_dim,
		.v_dim = v->v_dim,
		.k_dtype = v->k_dim ? KVG_F32 : KVG_BF16,
		.v_dtype = v->v_dim ? KVG_F32 : KVG_BF16,
		.max_tokens = 1024,
		.max_sequences = 6,
		.view = true};
}

static void join(struct world *world, unsigned i)
{
	const struct fixture_options options = options_of(world);

	world->spaces[i] = fixture_join(world->spaces[0], NULL, &options);
	world->spaces[i]->no_audit = !world->variation.audit;
	fill_staging(world, world->spaces[i]);
}

/* A worker dies, in the middle of whatever it had asked for. */
static void leave(struct world *world, unsigned i)
{
	struct fixture *fixture = world->spaces[i];

	contents_leave(world->contents, fixture);
	fixture_kill(fixture);
	fixture_audit(world->spaces[0]);
	(void)reap(world, fixture);
	world->spaces[i] = NULL;
	fixture_free(fixture);
}

static void replace_one(struct world *world)
{
	unsigned i = 1 + below(world, SPACES - 1);

	leave(world, i);
	join(world, i);
	contents_join(world->contents, world->spaces[i]);
	world->counts->killed++;
}

static void one_round(struct world *world)
{
	struct fixture *fixture = world->spaces[below(world, SPACES)];

	submit_some(world, fixture);
	if (one_in(world, 2))
		append(world, fixture);
	if (one_in(world, 2))
		submit_own(world, fixture);
	if (one_in(world, 4))
		recall_one(world, fixture);
	if (one_in(world, 40))
		burst(world, fixture);
	if (one_in(world, 60))
		(void)reclaim_begin(fixture->tenant, below(world, 40) * EXTENT, NULL);
	if (one_in(world, 80))
		forget_one(world);
	if (world->variation.budgets && one_in(world, 50))
		change_budget(world);
	if (one_in(world, 10))
		publish_together(world);
	if (one_in(world, world->variation.kill_one_in))
		replace_one(world);
	for (unsigned turns = below(world, 4); turns; turns--)
		fixture_turn(world->spaces[0]);
	for (unsigned i = 0; i < SPACES; i++)
		(void)reap(world, world->spaces[i]);
	if (!one_in(world, 8))
		return;
	fixture_audit(world->spaces[0]);
	contents_check(world->contents);
}

/* ---- from beginning to end ---- */

static void begin(struct world *world)
{
	const struct variation *v = &world->variation;
	struct fixture_options options = options_of(world);
	struct fixture *first;

	weigh(world);
	test_kind_init(&world->kind);
	world->kind.ops.create = create;
	world->fail_one_in = v->fail_one_in;
	options.kind = &world->kind.kind;
	first = world->spaces[0] = fixture_new(&options);
	first->no_audit = !v->audit;
	fill_staging(world, first);
	assert_int_equal(reclaim_init(&world->reclaim, first->loop, first->pool, &first->tenant, &one_tenant, 2000000,
				 &reclaim_ops, world),
		0);
	first->tenant->reclaim = &world->reclaim;
	world->context_entries = first->pool->meta->free_context_count;
	if (v->context_entries)
		first->pool->meta->free_context_count = v->context_entries;
	for (unsigned i = 1; i < SPACES; i++)
		join(world, i);
	world->contents = contents_new(world->spaces, SPACES);
}

static void fail_unfinished(const struct world *world)
{
	for (unsigned i = 0; i < SPACES; i++) {
		const struct list *calls = &world->spaces[i]->calls;

		for (struct list *node = calls->next; node != calls; node = node->next)
			print_error("space %u: operation %u\n", i, list_entry(node, struct call, node)->request.sqe.op);
	}
	fail_msg("these and %u of the daemon's own never end", world->own);
}

/* Without new entries, but with workers that unmap what they are asked to, all that wait do end. */
static void settle(struct world *world)
{
	unsigned left = 1;

	for (unsigned turns = 0; left; turns++) {
		left = world->own;
		for (unsigned i = 0; i < SPACES; i++) {
			struct fixture *fixture = world->spaces[i];
			struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED, .unmapped.event = fixture->dropped_event};

			if (turns % 16 == 0)
				(void)fixture_start(fixture, &sqe);
			left += reap(world, fixture);
		}
		fixture_turn(world->spaces[0]);
		if (turns == MOST_TURNS)
			fail_unfinished(world);
	}
	fixture_audit(world->spaces[0]);
	contents_check(world->contents);
}

static void note_contents(const struct world *world)
{
	struct contents_counts *all = &world->counts->contents, counts = contents_counts(world->contents);

	all->pairs += counts.pairs;
	all->dropped += counts.dropped;
	all->recalled += counts.recalled;
	all->joined += counts.joined;
	all->contexts += counts.contexts;
	contents_free(world->contents);
}

static void end(struct world *world)
{
	struct fixture *first = world->spaces[0];

	for (unsigned i = SPACES - 1; i; i--)
		leave(world, i);
	contents_leave(world->contents, first);
	note_contents(world);
	fixture_kill(first);
	restore_budgets(world);
	first->tenant->reclaim = NULL;
	fixture_forget_contexts(first, first->tenant);
	if (world->variation.context_entries) {
		assert_int_equal(first->pool->meta->free_context_count, world->variation.context_entries);
		first->pool->meta->free_context_count = world->context_entries;
	}
	reclaim_deinit(&world->reclaim);
	fixture_free(first);
	test_kind_deinit(&world->kind);
}

static void run_seed(unsigned seed, struct counts *counts)
{
	struct world world = {.variation = variation_of(seed),
		.random = {.state = seed * UINT64_C(0x9e3779b97f4a7c15) | 1},
		.counts = counts};

	print_message("seed %u\n", seed);
	(void)fflush(stdout); /* a sanitizer ends the program without that */
	begin(&world);
	for (unsigned round = 0; round < world.variation.rounds; round++)
		one_round(&world);
	settle(&world);
	end(&world);
}

static unsigned setting(const char *name, unsigned otherwise)
{
	const char *value = getenv(name);

	return value ? (unsigned)strtoul(value, NULL, 10) : otherwise;
}

static unsigned judge(const char *what, unsigned number, const struct count *count)
{
	print_message("%s %u: %u succeeded, %u failed\n", what, number, count->succeeded, count->failed);
	return count->succeeded == 0;
}

/* What never succeeds finds nothing. */
static void judge_all(const struct counts *counts)
{
	static const struct sort unmapped = {.op = KVG_OP_UNMAPPED};
	unsigned useless = judge("operation", unmapped.op, &counts->worker[unmapped.op]);

	for (size_t i = 0; i < SORTS; i++)
		useless += judge("operation", sorts[i].op, &counts->worker[sorts[i].op]);
	for (size_t i = 0; i < sizeof(own_ops); i++)
		useless += judge("the daemon's own operation", own_ops[i], &counts->own[own_ops[i]]);
	useless += judge("stage of scores up to", LONG_SCORES, &counts->short_stage);
	useless += judge("stage of scores from", LONG_SCORES + 1, &counts->long_stage);
	print_message("pairs read %" PRIu64 ", dropped %" PRIu64 ", recalled %" PRIu64 "; joined %" PRIu64
		      ", contexts read %" PRIu64 "\n",
		counts->contents.pairs, counts->contents.dropped, counts->contents.recalled, counts->contents.joined,
		counts->contents.contexts);
	assert_int_equal(useless, 0);
	assert_true(counts->short_stage.succeeded > counts->long_stage.succeeded);
	assert_true(counts->killed > 0);
	assert_true(counts->contents.pairs > 0 && counts->contents.dropped > 0 && counts->contents.recalled > 0);
	assert_true(counts->contents.joined > 0 && counts->contents.contexts > 0);
	assert_in_range(counts->longest_burst, 150, 200);
}

static void test_random(void **state)
{
	unsigned first = setting("KVG_RANDOM_SEED", 1), count = setting("KVG_RANDOM_SEEDS", SEEDS);
	struct counts counts = {0};

	(void)state;
	for (unsigned seed = first; seed < first + count; seed++)
		run_seed(seed, &counts);
	if (count >= SEEDS)
		judge_all(&counts);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_random)};

	return runner_run("random", tests, sizeof(tests) / sizeof(tests[0]));
}
