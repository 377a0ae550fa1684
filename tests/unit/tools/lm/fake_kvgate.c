#include "tests/unit/tools/lm/fake_kvgate.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define SEQ 0x100000000u

static struct fake_kvgate fake;

struct fake_kvgate *fake_kvgate_reset(void)
{
	assert_int_equal(fake.connected, 0);
	fake = (struct fake_kvgate){0};
	return &fake;
}

static struct kvg_client *handle(void)
{
	return (struct kvg_client *)(void *)&fake;
}

int kvg_connect(const char *socket_path, const char *name, struct kvg_client **ret, char *text, size_t text_size)
{
	assert_non_null(name);
	if (strcmp(socket_path, "fake") != 0) {
		(void)snprintf(text, text_size, "%s: no daemon there", socket_path);
		return -ENOENT;
	}
	fake.connected++;
	*ret = handle();
	return 0;
}

struct kvg_client *kvg_close(struct kvg_client *client)
{
	if (!client)
		return NULL;
	memory_kv_deinit(&fake.kv);
	fake.kv = (struct memory_kv){0};
	fake.connected--;
	fake.sequences = 0;
	return NULL;
}

const char *kvg_error(const struct kvg_client *client)
{
	assert_ptr_equal(client, handle());
	return "the fake was told to fail";
}

int kvg_register(struct kvg_client *client, const struct kvg_layout *layout, uint64_t staging_bytes)
{
	const struct kvg_group *g = &layout->groups[0];
	struct lm_config config = {.hidden = layout->hidden_dim,
		.layers = g->layers,
		.kv_heads = g->head_count,
		.heads = g->head_count * g->query_heads,
		.head_dim = g->k_dim};

	assert_ptr_equal(client, handle());
	assert_true(staging_bytes >= (uint64_t)LM_SLAB_TOKENS * layout->hidden_dim * 2);
	fake.layout = *layout;
	memory_kv_init(&fake.kv, &config, layout->max_tokens);
	return 0;
}

int kvg_load_gate(struct kvg_client *client, const char *path)
{
	(void)client;
	assert_non_null(path);
	if (fake.fail_gate)
		return fake.fail_gate;
	fake.gates++;
	return 0;
}

int kvg_create(struct kvg_client *client, const struct kvg_policy *policy, uint64_t *ret_seq)
{
	(void)client;
	fake.creates++;
	if (fake.fail_create)
		return fake.fail_create;
	assert_int_equal(fake.sequences, 0);
	assert_true(policy->prefix_tokens + policy->context_tokens + policy->max_new_tokens <= fake.layout.max_tokens);
	fake.sequences = 1;
	fake.policy = *policy;
	fake.reserved_pos = fake.committed_pos = fake.evicted_pos = 0;
	fake.staged_rows = 0;
	*ret_seq = SEQ;
	return 0;
}

int kvg_reserve(struct kvg_client *client, uint64_t seq, uint32_t tokens)
{
	const struct kvg_policy *p = &fake.policy;

	(void)client;
	assert_int_equal(seq, SEQ);
	assert_true(fake.committed_pos + tokens <= p->prefix_tokens + p->context_tokens + p->max_new_tokens);
	if (fake.committed_pos + tokens > fake.reserved_pos)
		fake.reserved_pos = fake.committed_pos + tokens;
	return 0;
}

int kvg_commit(struct kvg_client *client, uint64_t seq, uint32_t tokens)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	fake.committed_pos += tokens;
	assert_true(fake.committed_pos <= fake.reserved_pos);
	return 0;
}

int kvg_stage_hidden(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden)
{
	struct lm_kv calls = memory_kv_calls(&fake.kv);

	(void)client;
	assert_int_equal(seq, SEQ);
	if (fake.fail_stage)
		return fake.fail_stage;
	fake.stages++;
	fake.staged_rows += rows;
	return calls.stage(calls.user, layer, pos, rows, hidden);
}

int kvg_stage_wait(struct kvg_client *client)
{
	assert_ptr_equal(client, handle());
	return 0;
}

/* After the prompt, all rows scored, and with no more room ahead than up to the next event. */
static void check_decode_eviction(void)
{
	const struct kvg_policy *p = &fake.policy;

	assert_true(p->budget > 0);
	assert_true(fake.committed_pos >= p->prefix_tokens + p->context_tokens);
	assert_int_equal(fake.staged_rows, (uint64_t)fake.committed_pos * fake.kv.config.layers);
	assert_true(fake.reserved_pos <= fake.committed_pos + 128);
	fake.decode_evictions++;
}

int kvg_evict(struct kvg_client *client, uint64_t seq, uint32_t mode, struct kvg_evict_result *ret)
{
	uint64_t pairs = (uint64_t)fake.committed_pos * fake.kv.config.layers * fake.kv.config.kv_heads;

	(void)client;
	assert_int_equal(seq, SEQ);
	if (mode == KVG_EVICT_PREFILL)
		assert_int_equal(fake.policy.mode, KVG_MODE_CHUNKED);
	else
		check_decode_eviction();
	if (fake.fail_evict)
		return fake.fail_evict;
	assert_in_range(fake.evictions, 0, 15);
	fake.evicted_at[fake.evictions++] = fake.committed_pos;
	if (mode == KVG_EVICT_PREFILL || fake.drops)
		fake.evicted_pos = fake.committed_pos;
	*ret = (struct kvg_evict_result){.pairs_held = pairs, .pairs_dropped = fake.drops};
	return 0;
}

int kvg_truncate(struct kvg_client *client, uint64_t seq, uint32_t pos)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	assert_in_range(pos, fake.evicted_pos, fake.committed_pos);
	fake.committed_pos = pos;
	if (fake.staged_rows > (uint64_t)pos * fake.kv.config.layers)
		fake.staged_rows = (uint64_t)pos * fake.kv.config.layers;
	fake.truncates++;
	return 0;
}

int kvg_free(struct kvg_client *client, uint64_t seq)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	assert_int_equal(fake.sequences, 1);
	fake.sequences = 0;
	return 0;
}

int kvg_query(struct kvg_client *client, uint64_t seq, struct kvg_sequence_info *ret)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	*ret = (struct kvg_sequence_info){.committed_pos = fake.committed_pos,
		.pairs = (uint64_t)fake.committed_pos * fake.kv.config.layers * fake.kv.config.kv_heads};
	return 0;
}

uint64_t kvg_mapped_bytes(const struct kvg_client *client)
{
	assert_ptr_equal(client, handle());
	return 12345;
}

int kvg_append(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, const float *k, size_t k_stride, const float *v, size_t v_stride)
{
	struct lm_kv calls = memory_kv_calls(&fake.kv);

	(void)client;
	assert_int_equal(seq, SEQ);
	assert_int_equal(k_stride, v_stride);
	assert_false(fake.offloaded);
	if (pos < fake.evicted_pos || pos + count > fake.reserved_pos)
		return -EINVAL;
	return calls.append(calls.user, layer, head, pos, count, k, v, k_stride);
}

int kvg_attend(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, float scale, const float *q, size_t q_stride, float *out, size_t o_stride)
{
	struct lm_kv calls = memory_kv_calls(&fake.kv);

	(void)client;
	assert_int_equal(seq, SEQ);
	return calls.attend(calls.user, layer, head, pos, count, scale, q, q_stride, out, o_stride);
}

int kvg_recall(struct kvg_client *client, uint64_t seq, double ratio, struct kvg_recall_result *ret)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	assert_true(fake.policy.flags & KVG_POLICY_RETAIN_HOST);
	assert_false(fake.offloaded);
	fake.recalls++;
	fake.recalled = ratio;
	*ret = (struct kvg_recall_result){.pairs_recalled = 10};
	return 0;
}

int kvg_offload(struct kvg_client *client, uint64_t seq, uint64_t *ret_bytes)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	assert_false(fake.offloaded);
	fake.offloaded = true;
	fake.offloads++;
	*ret_bytes = 777;
	return 0;
}

int kvg_restore(struct kvg_client *client, uint64_t seq)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	assert_true(fake.offloaded);
	fake.offloaded = false;
	fake.restores++;
	return 0;
}

/* Sums, not digests: different enough for a test. */
int kvg_context_keys(struct kvg_client *client, const struct kvg_policy *policy, const uint32_t *tokens, uint32_t count,
	uint32_t chunk, uint8_t *ret_keys)
{
	uint64_t sum = (uint64_t)(policy->ratio * 1000.0);

	assert_ptr_equal(client, handle());
	assert_int_equal(chunk, policy->chunk_tokens);
	for (uint32_t i = 0; i < count; i++) {
		sum = sum * 31 + tokens[i];
		if ((i + 1) % chunk && i + 1 < count)
			continue;
		memset(ret_keys, 0, KVG_KEY_SIZE);
		memcpy(ret_keys, &sum, sizeof(sum));
		ret_keys += KVG_KEY_SIZE;
	}
	return 0;
}

int kvg_publish(struct kvg_client *client, uint64_t seq, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret)
{
	(void)client;
	assert_int_equal(seq, SEQ);
	memcpy(fake.key, key, KVG_KEY_SIZE);
	fake.published = fake.evicted_pos = fake.committed_pos;
	fake.publishes++;
	*ret = (struct kvg_context_info){.id = 1, .bytes = 4096, .tokens = fake.published, .attached = 1};
	return 0;
}

int kvg_attach(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], const struct kvg_policy *policy,
	uint64_t *ret_seq, struct kvg_context_info *ret)
{
	(void)client;
	assert_int_equal(fake.sequences, 0);
	assert_int_equal(policy->mode, KVG_MODE_OFF);
	assert_int_equal(policy->prefix_tokens + policy->context_tokens, 0);
	if (!fake.published || memcmp(fake.key, key, KVG_KEY_SIZE) != 0)
		return -ENOENT;
	fake.sequences = 1;
	fake.policy = *policy;
	fake.policy.prefix_tokens = fake.published;
	fake.reserved_pos = fake.committed_pos = fake.evicted_pos = fake.published;
	fake.attaches++;
	*ret_seq = SEQ;
	*ret = (struct kvg_context_info){.id = 1, .bytes = 4096, .tokens = fake.published, .attached = 2};
	return 0;
}
