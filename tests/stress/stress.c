#include "tests/stress/stress.h"

#include <time.h>

const char *stress_op_name(enum stress_op op)
{
	static const char *const names[OP_COUNT] = {"connect", "register", "create", "reserve", "stage", "commit",
		"evict", "decode_evict", "truncate", "protect", "free", "offload", "restore", "idle", "recall",
		"publish", "find", "attach", "fork", "close"};

	return names[op];
}

uint64_t stress_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

uint32_t stress_between(uint64_t *state, uint32_t low, uint32_t high)
{
	return low + (uint32_t)(stress_random(state) % ((uint64_t)high - low + 1));
}

uint64_t stress_now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void stress_sleep_until(uint64_t ns)
{
	const struct timespec time = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

	(void)clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

void stress_layout(struct kvg_layout *layout, unsigned tenant)
{
	static const struct {
		uint32_t layers, heads, dim, dtype;
	} models[STRESS_TENANTS] = {{4, 4, 32, KVG_BF16}, {2, 2, 128, KVG_F16}, {3, 5, 32, KVG_F32}};

	*layout = (struct kvg_layout){
		.model = "stress", .hidden_dim = 64, .group_count = 1, .max_sequences = 8, .max_tokens = STRESS_TOKENS};
	layout->groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = models[tenant].layers,
		.head_count = models[tenant].heads,
		.head_total = models[tenant].heads,
		.world = 1,
		.k_dim = models[tenant].dim,
		.v_dim = models[tenant].dim,
		.k_dtype = models[tenant].dtype,
		.v_dtype = models[tenant].dtype,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
}
