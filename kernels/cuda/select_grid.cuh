/*
 * select_grid.cuh - select_grid: thresholds (and masks) of segments of many rows, each by a group of blocks.
 *
 * A block copies its part of the segment to shared memory and stays with it. While the copies are under way, a sample
 * of the whole segment bounds the threshold. The first round counts the keys in those bounds as they arrive; the
 * group's blocks add up their counts in device memory, meet, and each finds the bin that holds the rank. Later rounds
 * do the same with that bin's range until it is one key.
 */
#ifndef KVG_CUDA_SELECT_GRID_CUH
#define KVG_CUDA_SELECT_GRID_CUH

#include "kernels/cuda/select_keys.cuh"

#define GRID_THREADS KVG_SELECT_GRID_THREADS
#define GRID_BINS    KVG_SELECT_GRID_BINS
#define COARSE_BINS  (GRID_BINS / COPIES) /* of a first round, which has several copies against crowding */
#define COPIES       4
#define STAGES       KVG_SELECT_GRID_STAGES
#define SAMPLES      GRID_THREADS
#define SAMPLE_LEAST (32u * SAMPLES) /* smaller segments are not worth it */
#define DIRECT       2048            /* so few candidates are counted in device memory at once */

/* The part of a segment that is this block's. */
struct part {
	uint32_t begin, end;   /* of the segment */
	uint32_t first, quads; /* of the block */
	uint32_t staged;       /* of these, in shared memory */
};

/* What is known of the wanted key: it lies in [low, high], with `above` greater keys and `inside` in the range. */
struct search {
	uint32_t rank;
	uint32_t low, high, above, inside;
};

struct grid_shared {
	alignas(16) uint32_t bins[GRID_BINS];
	uint64_t arrived[STAGES]; /* of the copies to shared memory */
	uint32_t sums[GRID_THREADS / 32];
	uint32_t least[GRID_THREADS / 32], most[GRID_THREADS / 32];
	struct found found[2];
	uint32_t greater, inside; /* of the first round, as far as counted */
	uint64_t tally[2];
};

/* -- staging: whole quads come to shared memory as they are; the first round puts keys in their place -- */

#if __CUDA_ARCH__ >= 900
#define STAGING_THREADS STAGES

static __device__ void stage_init(struct grid_shared *shared)
{
	if (threadIdx.x < STAGES)
		asm volatile(
			"mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(shared->arrived + threadIdx.x))
			: "memory");
	if (threadIdx.x < STAGES)
		asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* By STAGING_THREADS threads, after a barrier behind the last use of shared memory. */
static __device__ void stage_begin(
	const struct kvg_select_grid_args &args, const struct part &part, float4 *staged, struct grid_shared *shared)
{
	uint32_t first = (part.begin + 3) / 4, last = part.end / 4;

	asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
	for (uint32_t stage = threadIdx.x; stage * GRID_THREADS < part.staged; stage += STAGING_THREADS) {
		uint32_t from = stage * GRID_THREADS, to = min(from + GRID_THREADS, part.staged);
		uint32_t arrived = shared_address(shared->arrived + stage), bytes;

		if (part.first + from < first)
			from++;
		if (part.first + to > last)
			to--;
		bytes = to > from ? (to - from) * 16 : 0;
		asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived), "r"(bytes)
			     : "memory");
		if (bytes)
			asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
				     "[%0], [%1], %2, [%3];" ::"r"(shared_address(staged + from)),
				     "l"((const float4 *)args.scores + part.first + from), "r"(bytes), "r"(arrived)
				     : "memory");
	}
}

static __device__ __forceinline__ void stage_wait(struct grid_shared *shared, uint32_t stage, uint32_t parity)
{
	uint32_t done = 0;

	for (uint32_t polls = 0; !done; polls++) {
		asm volatile(
			"{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
			: "=r"(done)
			: "r"(shared_address(shared->arrived + stage)), "r"(parity)
			: "memory");
		if (polls == POLL_LIMIT)
			__trap();
	}
}
#else
#define STAGING_THREADS GRID_THREADS

static __device__ void stage_init(struct grid_shared *)
{
}

static __device__ void stage_begin(
	const struct kvg_select_grid_args &args, const struct part &part, float4 *staged, struct grid_shared *)
{
	for (uint32_t i = threadIdx.x; i < part.staged; i += GRID_THREADS) {
		uint32_t quad = part.first + i;

		if (quad_inside(quad, part.begin, part.end))
			copy_quad(staged + i, (const float4 *)args.scores + quad);
	}
}

static __device__ __forceinline__ void stage_wait(struct grid_shared *, uint32_t, uint32_t)
{
	copies_wait(); /* each thread reads what it copied */
}
#endif

static __device__ __forceinline__ uint4 load_keys(
	const struct kvg_select_grid_args &args, const struct part &part, uint32_t i)
{
	return keys_of(load_quad(args.scores, args.safe ? args.keep : NULL, part.first + i, part.begin, part.end));
}

/* The keys of a quad that has arrived as scores; they take its place. */
static __device__ __forceinline__ uint4 stage_convert(
	const struct kvg_select_grid_args &args, const struct part &part, float4 *staged, uint32_t i)
{
	uint4 keys = args.safe || !quad_inside(part.first + i, part.begin, part.end) ? load_keys(args, part, i)
										     : keys_of(staged[i]);

	((uint4 *)staged)[i] = keys;
	return keys;
}

/* Calls f(i, keys) for the block's quads. */
template <typename F>
static __device__ __forceinline__ void part_each(
	const struct kvg_select_grid_args &args, const struct part &part, const float4 *staged, F f)
{
#pragma unroll 2
	for (uint32_t i = threadIdx.x; i < part.staged; i += GRID_THREADS)
		f(i, ((const uint4 *)staged)[i]);
#pragma unroll 1
	for (uint32_t i = part.staged + threadIdx.x; i < part.quads; i += GRID_THREADS)
		f(i, load_keys(args, part, i));
}

/* -- rounds -- */

/*
 * Adds this block to the round's tally and waits until all of the group are in it. Cooperative launches run all blocks
 * at the same time. This orders nothing else: round_find() sees by the sum of the bins when they are complete.
 */
static __device__ void round_meet(struct kvg_select_round *round, uint32_t members, struct grid_shared *shared,
	uint32_t *ret_above, uint32_t *ret_inside)
{
	__syncthreads();
	if (threadIdx.x == 0) {
		uint64_t above, inside;
		uint32_t polls = 0;

		atomicAdd((unsigned long long *)round->tally, KVG_SELECT_ARRIVED | shared->greater);
		atomicAdd((unsigned long long *)round->tally + 1, KVG_SELECT_ARRIVED | shared->inside);
		shared->greater = shared->inside = 0;
		do {
			asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
				     : "=l"(above), "=l"(inside)
				     : "l"(round->tally)
				     : "memory");
			if (++polls == POLL_LIMIT)
				__trap();
		} while (above / KVG_SELECT_ARRIVED < members || inside / KVG_SELECT_ARRIVED < members);
		shared->tally[0] = above;
		shared->tally[1] = inside;
	}
	__syncthreads();
	*ret_above = (uint32_t)shared->tally[0];
	*ret_inside = (uint32_t)shared->tally[1];
}

static __device__ __forceinline__ uint4 load_counts(const uint32_t *at)
{
	uint4 counts;

	asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
		     : "=r"(counts.x), "=r"(counts.y), "=r"(counts.z), "=r"(counts.w)
		     : "l"(at)
		     : "memory");
	return counts;
}

/* This thread's bins of a coarse round: one, from all copies. */
static __device__ __forceinline__ uint4 load_coarse(const uint32_t *at)
{
	uint32_t sum = 0;

#pragma unroll
	for (uint32_t copy = 0; copy < COPIES; copy++) {
		uint32_t count;

		asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
			     : "=r"(count)
			     : "l"(at + copy * COARSE_BINS)
			     : "memory");
		sum += count;
	}
	return make_uint4(0, 0, 0, sum);
}

/* Finds the bin of the rank in shared->found[0], once the bins hold `inside` keys. Returns above + inside. */
static __device__ uint32_t round_find(const struct kvg_select_round *round, bool coarse, uint32_t above,
	uint32_t inside, uint32_t rank, struct grid_shared *shared)
{
	const uint32_t bin = COARSE_BINS - 1 - threadIdx.x, own = GRID_BINS - 4 - 4 * threadIdx.x;
	uint32_t total = 0;

#pragma unroll 1
	for (uint32_t polls = 0; polls == 0 || total - above != inside; polls++) {
		uint4 counts = coarse ? load_coarse(round->count + bin) : load_counts(round->count + own);

		total = find_bins<GRID_THREADS, 1>(
			counts, coarse ? bin - 3 : own, above, &rank, shared->sums, shared->found);
		if (polls == POLL_LIMIT)
			__trap();
	}
	return total;
}

/* Zeroes this block's share of the rounds that the group's next search uses. */
static __device__ void rounds_clear(struct kvg_select_round *rounds, uint32_t member, uint32_t members)
{
	const uint32_t quads = KVG_SELECT_ROUNDS * sizeof(*rounds) / sizeof(uint4);

#pragma unroll 1
	for (uint32_t i = member * GRID_THREADS + threadIdx.x; i < quads; i += members * GRID_THREADS)
		__stcg((uint4 *)rounds + i, make_uint4(0, 0, 0, 0));
}

/* How far keys in a range of that span are shifted to get one of 2^bits bins. */
static __device__ __forceinline__ uint32_t shift_of(uint32_t span, uint32_t bits)
{
	uint32_t width = 32 - __clz(span);

	return width > bits ? width - bits : 0;
}

/* The first round, while scores arrive: counts the block's keys in the range by coarse bins, and those above it. */
static __device__ void first_count(const struct kvg_select_grid_args &args, const struct part &part, float4 *staged,
	const struct search &search, uint32_t phases, uint32_t *to, struct grid_shared *shared)
{
	const uint32_t low = search.low, span = search.high - low, shift = shift_of(span, 10);
	const uint32_t bins = shared_address(shared->bins);
	uint32_t greater = 0;

	auto count = [&](uint4 k) {
		const uint32_t keys[4] = {k.x, k.y, k.z, k.w};

#pragma unroll
		for (uint32_t j = 0; j < 4; j++) {
			count_if(keys[j] - low, span, shift, bins);
			greater += keys[j] > search.high;
		}
	};
#pragma unroll 1
	for (uint32_t stage = 0; stage * GRID_THREADS < part.staged; stage++) {
		uint32_t i = stage * GRID_THREADS + threadIdx.x;

		stage_wait(shared, stage, phases >> stage & 1);
		if (i < part.staged)
			count(stage_convert(args, part, staged, i));
	}
#pragma unroll 1
	for (uint32_t i = part.staged + threadIdx.x; i < part.quads; i += GRID_THREADS)
		count(load_keys(args, part, i));
	add_to_block(greater, &shared->greater);
	__syncthreads();
	uint32_t value = shared->bins[threadIdx.x];

	if (value)
		atomicAdd(to + threadIdx.x, value);
	shared->bins[threadIdx.x] = 0;
	add_to_block(value, &shared->inside);
}

/* A later round: the range is known to hold the key. Few candidates are counted in device memory directly. */
static __device__ void next_count(const struct kvg_select_grid_args &args, const struct part &part,
	const float4 *staged, const struct search &search, uint32_t *to, struct grid_shared *shared)
{
	const uint32_t low = search.low, span = search.high - low, shift = shift_of(span, 12);

	if (search.inside <= DIRECT) {
		part_each(args, part, staged, [&](uint32_t, uint4 keys) {
			uint32_t distances[4];

			if (!quad_distances(keys, low, span, distances))
				return;
#pragma unroll
			for (uint32_t j = 0; j < 4; j++)
				if (distances[j] <= span)
					atomicAdd(to + (distances[j] >> shift), 1u);
		});
		return;
	}
	part_each(args, part, staged, [&](uint32_t, uint4 keys) {
		uint32_t distances[4];

		if (!quad_distances(keys, low, span, distances))
			return;
#pragma unroll
		for (uint32_t j = 0; j < 4; j++)
			count_if(distances[j], span, shift, shared_address(shared->bins));
	});
	__syncthreads();
#pragma unroll
	for (uint32_t bin = threadIdx.x; bin < GRID_BINS; bin += GRID_THREADS) {
		uint32_t value = shared->bins[bin];

		if (value)
			atomicAdd(to + bin, value);
		shared->bins[bin] = 0;
	}
}

/* -- the sample: every block takes the same one of the whole segment, and so needs no other block -- */

static __device__ __forceinline__ uint32_t sample_at(uint32_t begin, uint32_t n)
{
	const uint32_t stride = n / SAMPLES;

	return begin + threadIdx.x * stride + __umulhi(threadIdx.x * 2654435769u, stride);
}

/* The least and the greatest key of the sample, in every thread. */
static __device__ void sample_range(uint32_t key, struct grid_shared *shared, uint32_t *ret_least, uint32_t *ret_most)
{
	uint32_t least = __reduce_min_sync(WARP, key), most = __reduce_max_sync(WARP, key);

	if (threadIdx.x % 32 == 0) {
		shared->least[threadIdx.x / 32] = least;
		shared->most[threadIdx.x / 32] = most;
	}
	__syncthreads();
	*ret_least = __reduce_min_sync(WARP, shared->least[threadIdx.x % 32]);
	*ret_most = __reduce_max_sync(WARP, shared->most[threadIdx.x % 32]);
}

/* Bounds the search by three and a half standard deviations around where the rank should be in the sample. */
static __device__ void search_bound(uint32_t key, uint32_t n, struct grid_shared *shared, struct search *search)
{
	const uint32_t own = GRID_BINS / 4 - 1 - threadIdx.x;
	const float expected = ((float)search->rank + 0.5f) * ((float)SAMPLES / (float)n);
	const float margin = 2.0f + 3.5f * sqrtf(fmaxf(expected * (1.0f - expected / (float)SAMPLES), 0.0f));
	const uint32_t ranks[2] = {
		(uint32_t)fmaxf(expected - margin, 0.0f), min((uint32_t)(expected + margin), SAMPLES - 1u)};
	uint32_t least, most;

	sample_range(key, shared, &least, &most);
	const uint32_t shift = shift_of(most - least, 12);

	atomicAdd(shared->bins + ((key - least) >> shift), 1u);
	__syncthreads();
	uint4 counts = ((uint4 *)shared->bins)[own];

	((uint4 *)shared->bins)[own] = make_uint4(0, 0, 0, 0);
	(void)find_bins<GRID_THREADS, 2>(counts, own * 4, 0, ranks, shared->sums, shared->found);
	if (expected + margin < (float)SAMPLES)
		search->low = least + (shared->found[1].bin << shift);
	if (expected > margin)
		search->high = least + (shared->found[0].bin << shift) + ((1u << shift) - 1);
	if (search->high < search->low)
		search->high = KEY_MAX;
}

/* -- segments -- */

/* Narrows the search by a round. A sample can have misled the first; then what is left is above or below its range. */
static __device__ void search_narrow(
	struct search *search, uint32_t shift, uint32_t above, uint32_t total, uint32_t all, const struct found &found)
{
	if (search->rank < above) {
		*search = {search->rank, search->high + 1, KEY_MAX, 0, above};
	} else if (search->rank >= total) {
		*search = {search->rank, 0, search->low - 1, total, all - total};
	} else {
		search->low += found.bin << shift;
		search->high = min(search->high, search->low + ((1u << shift) - 1));
		search->above = found.above;
		search->inside = found.count;
	}
}

/* Finds the key with search->rank; it is search->low then. A first round and three more are enough for 32 bits. */
static __device__ void segment_search(const struct kvg_select_grid_args &args, const struct part &part, uint32_t member,
	float4 *staged, uint32_t phases, struct kvg_select_round *rounds, struct grid_shared *shared,
	struct search *search)
{
	const uint32_t all = ((part.end - 1) / 4 + 1 - part.begin / 4) * 4; /* with -infinity in the margins */

#pragma unroll 1
	for (uint32_t i = 0; i < KVG_SELECT_ROUNDS && (i == 0 || search->low != search->high); i++) {
		struct kvg_select_round *round = rounds + i;
		const uint32_t shift = shift_of(search->high - search->low, i ? 12 : 10);
		uint32_t above, inside;

		if (i == 0)
			first_count(args, part, staged, *search, phases, round->count + member % COPIES * COARSE_BINS,
				shared);
		else
			next_count(args, part, staged, *search, round->count, shared);
		round_meet(round, args.members, shared, &above, &inside);
		if (i) {
			above = search->above;
			inside = search->inside;
		}
		uint32_t total = round_find(round, i == 0, above, inside, search->rank, shared);

		search_narrow(search, shift, above, total, all, shared->found[0]);
	}
}

static __device__ void segment_mask(
	const struct kvg_select_grid_args &args, const struct part &part, const float4 *staged, uint32_t from)
{
	part_each(args, part, staged, [&](uint32_t i, uint4 k) {
		uint32_t flags = (uint32_t)(k.x >= from) | (uint32_t)(k.y >= from) << 8 |
				 (uint32_t)(k.z >= from) << 16 | (uint32_t)(k.w >= from) << 24;

		if (args.safe)
			flags |= load_flags(args.keep, part.first + i, part.begin, part.end);
		store_flags(args.keep, part.first + i, part.begin, part.end, flags);
	});
}

/* Budgets that take all or nothing need no search. */
static __device__ void segment_fill(const struct kvg_select_grid_args &args, const struct part &part, uint32_t flag)
{
	for (uint32_t i = threadIdx.x; args.keep && i < part.quads; i += GRID_THREADS)
		store_flags(args.keep, part.first + i, part.begin, part.end, flag * 0x01010101u);
}

static __device__ struct part segment_part(
	const struct kvg_select_grid_args &args, uint32_t begin, uint32_t end, uint32_t member)
{
	uint32_t first = begin / 4, quads = (end - 1) / 4 + 1 - first;
	uint32_t each = (quads + args.members - 1) / args.members;
	uint32_t own = min(member * each, quads), next = min(own + each, quads);

	return {begin, end, first + own, next - own, min(next - own, args.staged)};
}

extern "C" __global__ void __launch_bounds__(GRID_THREADS, 1)
	select_grid(const __grid_constant__ struct kvg_select_grid_args args)
{
	extern __shared__ float4 staged[];
	__shared__ struct grid_shared shared;
	const uint32_t group = blockIdx.x / args.members, member = blockIdx.x % args.members;
	uint32_t turn = __ldcg(&args.groups[group].turn) & 1, phases = 0;

	((uint4 *)shared.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
	if (threadIdx.x == 0)
		shared.greater = shared.inside = 0;
	stage_init(&shared);
	for (uint32_t segment = group; segment < args.segments; segment += gridDim.x / args.members) {
		uint32_t begin = row_offset(args.offset, args.length, segment * args.rows);
		uint32_t end = row_offset(args.offset, args.length, (segment + 1) * args.rows), n = end - begin;

		if (!n)
			continue;
		struct part part = segment_part(args, begin, end, member);

		if (args.by_budget && (n <= args.budget || !args.budget)) {
			segment_fill(args, part, n <= args.budget);
			continue;
		}
		__syncthreads();
		const uint32_t at = n >= SAMPLE_LEAST ? sample_at(begin, n) : begin;
		float sample = __ldcg(args.scores + at);

		if (threadIdx.x < STAGING_THREADS)
			stage_begin(args, part, staged, &shared);
		rounds_clear(args.groups[group].round[turn ^ 1], member, args.members);
		uint32_t share = args.by_budget ? (uint32_t)args.budget : share_of(n, args.ratio);
		struct search search = {share ? share - 1 : 0, 0, KEY_MAX, 0, n};

		if (args.safe && args.keep[at])
			sample = POSITIVE_INFINITY;
		if (n >= SAMPLE_LEAST)
			search_bound(key_of(sample), n, &shared, &search);
		segment_search(args, part, member, staged, phases, args.groups[group].round[turn], &shared, &search);
		phases ^= (1u << (part.staged + GRID_THREADS - 1) / GRID_THREADS) - 1;
		turn ^= 1;
		if (args.threshold && member == 0 && threadIdx.x == 0)
			args.threshold[segment] = score_of(search.low);
		if (args.keep)
			segment_mask(args, part, staged, args.by_budget ? search.low : key_above(search.low));
	}
	if (member == 0 && threadIdx.x == 0)
		__stcg(&args.groups[group].turn, turn);
}

#endif
