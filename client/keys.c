/* Names of contexts: digests of what decides which pairs a sequence holds, in a chain by chunk. */
#include "client/client.h"

#include <endian.h>
#include <errno.h>
#include <nettle/sha2.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define DOMAIN       "kvgate context 1" /* 16 bytes: what the digests are of, and the version of their form */
#define TOKENS_ROUND 1024u              /* tokens that are hashed at once */

_Static_assert(sizeof(DOMAIN) == 17, "the domain has 16 bytes");
_Static_assert(SHA256_DIGEST_SIZE == KVG_KEY_SIZE, "a key is a digest");

int client_keep_gate(struct kvg_client *client, int fd)
{
	struct sha256_ctx hash;
	struct stat st;
	void *map;

	if (fstat(fd, &st) < 0)
		return client_fail(client, -errno, "gate: %s", strerror(errno));
	map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (map == MAP_FAILED)
		return client_fail(client, -errno, "gate: %s", strerror(errno));
	sha256_init(&hash);
	sha256_update(&hash, (size_t)st.st_size, map);
	sha256_digest(&hash, KVG_KEY_SIZE, client->gate_digest);
	(void)munmap(map, (size_t)st.st_size);
	return 0;
}

static void add_u32(struct sha256_ctx *hash, uint32_t value)
{
	uint32_t little = htole32(value);

	sha256_update(hash, sizeof(little), (const uint8_t *)&little);
}

static void add_double(struct sha256_ctx *hash, double value)
{
	uint64_t little;

	memcpy(&little, &value, sizeof(little));
	little = htole64(little);
	sha256_update(hash, sizeof(little), (const uint8_t *)&little);
}

static void add_layout(struct sha256_ctx *hash, const struct kvg_layout *layout)
{
	char model[sizeof(layout->model)] = "";

	memcpy(model, layout->model, strlen(layout->model));
	sha256_update(hash, sizeof(model), (const uint8_t *)model);
	add_u32(hash, layout->hidden_dim);
	add_u32(hash, layout->group_count);
	for (uint32_t i = 0; i < layout->group_count; i++) {
		const struct kvg_group *g = &layout->groups[i];
		const uint32_t fields[] = {g->kind, g->layers, g->head_begin, g->head_count, g->head_total, g->rank,
			g->world, g->group_id, g->k_dim, g->v_dim, g->k_dtype, g->v_dtype, g->scale_kind,
			g->scale_offset, g->block_tokens, g->window, g->max_rollback, g->query_heads};

		for (size_t n = 0; n < sizeof(fields) / sizeof(*fields); n++)
			add_u32(hash, fields[n]);
	}
}

/* What decides which pairs stay of the same tokens. Not so: how long the prompt is in all, how many tokens follow it,
 * and where dropped pairs go. */
static void add_policy(struct sha256_ctx *hash, const struct kvg_policy *policy)
{
	uint32_t threshold;

	memcpy(&threshold, &policy->threshold, sizeof(threshold));
	add_double(hash, policy->ratio);
	add_u32(hash, policy->mode);
	add_u32(hash, policy->level);
	add_u32(hash, policy->flags & (uint32_t)~KVG_POLICY_RETAIN_HOST);
	add_u32(hash, policy->prefix_tokens);
	add_u32(hash, policy->chunk_tokens);
	add_u32(hash, policy->window);
	add_u32(hash, policy->floor);
	add_u32(hash, threshold);
}

static void add_tokens(struct sha256_ctx *hash, const uint32_t *tokens, uint32_t count)
{
	uint32_t little[TOKENS_ROUND];

	for (uint32_t done = 0; done < count;) {
		uint32_t n = count - done < TOKENS_ROUND ? count - done : TOKENS_ROUND;

		for (uint32_t i = 0; i < n; i++)
			little[i] = htole32(tokens[done + i]);
		sha256_update(hash, n * sizeof(*little), (const uint8_t *)little);
		done += n;
	}
}

int kvg_context_keys(struct kvg_client *client, const struct kvg_policy *policy, const uint32_t *tokens, uint32_t count,
	uint32_t chunk, uint8_t *ret_keys)
{
	CLIENT_TURN(client);
	uint8_t link[KVG_KEY_SIZE];
	struct sha256_ctx hash;
	int r = client_check_registered(client);

	if (r < 0)
		return r;
	if (!chunk)
		chunk = count;
	sha256_init(&hash);
	sha256_update(&hash, sizeof(DOMAIN) - 1, (const uint8_t *)DOMAIN);
	add_layout(&hash, &client->layout);
	sha256_update(&hash, KVG_KEY_SIZE, client->gate_digest);
	add_policy(&hash, policy);
	sha256_digest(&hash, KVG_KEY_SIZE, link);
	for (uint32_t done = 0; done < count;) {
		uint32_t n = count - done < chunk ? count - done : chunk;

		sha256_update(&hash, KVG_KEY_SIZE, link);
		add_tokens(&hash, tokens + done, n);
		sha256_digest(&hash, KVG_KEY_SIZE, link);
		memcpy(ret_keys, link, KVG_KEY_SIZE);
		ret_keys += KVG_KEY_SIZE;
		done += n;
	}
	return 0;
}
