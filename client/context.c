/* Contexts that several sequences share: published, found, attached, and copies of a sequence. */
#include "client/client.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEY_TEXT (2 * KVG_KEY_SIZE + 1)

static const char *print_key(const uint8_t *key, char ret[KEY_TEXT])
{
	for (unsigned i = 0; i < KVG_KEY_SIZE; i++)
		(void)snprintf(ret + (size_t)2 * i, 3, "%02x", key[i]);
	return ret;
}

/* The context of a key: 1 with *ret, 0 when there is none, or a negative errno. */
static int find(struct kvg_client *client, const uint8_t *key, struct kvg_context_info *ret)
{
	const struct kvg_cqe *cqe = &client->call.cqe;
	struct kvg_sqe sqe = {.op = KVG_OP_FIND};
	int r = client_check_registered(client);

	memcpy(sqe.find.key, key, KVG_KEY_SIZE);
	if (r == 0)
		r = client_call(client, &sqe);
	if (r < 0 || !cqe->value[0])
		return r;
	*ret = (struct kvg_context_info){.id = cqe->value[0],
		.bytes = cqe->value[1],
		.tokens = (uint32_t)cqe->value[2],
		.attached = (uint32_t)cqe->value[3],
		.existed = 1};
	return 1;
}

int kvg_find(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret)
{
	CLIENT_TURN(client);
	char text[KEY_TEXT];
	int r = find(client, key, ret);

	if (r == 0)
		return client_fail(
			client, -ENOENT, "context %s: tenant %s has none", print_key(key, text), client->tenant);
	return r < 0 ? r : 0;
}

int kvg_find_longest(struct kvg_client *client, const uint8_t *keys, uint32_t count, uint32_t *ret_index,
	struct kvg_context_info *ret)
{
	CLIENT_TURN(client);

	for (uint32_t i = count; i-- > 0;) {
		int r = find(client, keys + (size_t)i * KVG_KEY_SIZE, ret);

		if (r < 0)
			return r;
		if (r > 0) {
			*ret_index = i;
			return 0;
		}
	}
	return client_fail(client, -ENOENT, "contexts: tenant %s has none of %u", client->tenant, count);
}

int kvg_publish(struct kvg_client *client, uint64_t seq, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	const struct kvg_cqe *cqe = &client->call.cqe;
	struct kvg_context_info info;
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_PUBLISH, seq, sequence);
	memcpy(sqe.publish.key, key, KVG_KEY_SIZE);
	r = client_call_for_room(client, &sqe);
	if (r < 0)
		return r;
	info = (struct kvg_context_info){.id = cqe->value[0],
		.bytes = cqe->value[1],
		.tokens = (uint32_t)cqe->value[2],
		.attached = 1,
		.existed = cqe->value[3] != 0};
	r = client_return_memory(client);
	/* Who else is attached to one that was there only FIND knows. */
	if (r == 0 && ret && info.existed)
		r = find(client, key, &info);
	if (r < 0)
		return r;
	if (ret)
		*ret = info;
	return 0;
}

int kvg_attach(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], const struct kvg_policy *policy,
	uint64_t *ret_seq, struct kvg_context_info *ret)
{
	CLIENT_TURN(client);
	struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .attach = *policy};
	struct kvg_context_info info = {0};
	uint64_t seq;
	int r = kvg_find(client, key, &info);

	if (r < 0)
		return r;
	sqe.seq = info.id;
	r = client_call_for_room(client, &sqe);
	if (r < 0)
		return r;
	seq = client->call.cqe.seq;
	info.attached++;
	r = client_check_new(client, seq, "attached");
	if (r < 0)
		return r;
	*ret_seq = seq;
	if (ret)
		*ret = info;
	return 0;
}

/* ---- fork ---- */

static int fork_one(struct kvg_client *client, uint64_t seq, uint64_t *ret)
{
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;
	uint64_t made;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_FORK, seq, sequence);
	r = client_call_for_room(client, &sqe);
	if (r < 0)
		return r;
	made = client->call.cqe.value[1];
	r = client_check_new(client, made, "forked");
	if (r == 0)
		*ret = made;
	return r;
}

/* Frees what was made before a failure, whose text stays. */
static void undo(struct kvg_client *client, const uint64_t *seqs, uint32_t count)
{
	char error[CLIENT_TEXT];

	memcpy(error, client->error, sizeof(error));
	for (uint32_t i = 0; i < count; i++)
		(void)kvg_free(client, seqs[i]);
	if (!client->broken)
		memcpy(client->error, error, sizeof(error));
}

int kvg_fork(struct kvg_client *client, uint64_t seq, uint32_t count, uint64_t *ret_seqs)
{
	CLIENT_TURN(client);
	uint64_t *seqs;
	uint32_t made = 0;
	int r = 0;

	if (!client_sequence(client, seq, &r))
		return r;
	if (!count || count > client->model.max_sequences)
		return client_fail(client, -EINVAL, "sequence %u: fork into %u more, outside 1 to %u", (uint32_t)seq,
			count, client->model.max_sequences);
	seqs = calloc(count, sizeof(*seqs));
	if (!seqs)
		return client_fail(client, -ENOMEM, "no memory for %u sequences", count);
	while (r == 0 && made < count) {
		r = fork_one(client, seq, &seqs[made]);
		made += r == 0;
	}
	if (r < 0)
		undo(client, seqs, made);
	else
		memcpy(ret_seqs, seqs, count * sizeof(*seqs));
	free(seqs);
	return r;
}
