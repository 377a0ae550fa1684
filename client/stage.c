#include "client/client.h"

#include <errno.h>
#include <string.h>

/* Rows of one layer that go to the daemon in one or more entries. */
struct rows {
	uint64_t seq;
	enum kvg_stage_kind kind;
	uint32_t layer, pos;
	uint64_t row_bytes;
};

static uint8_t *rows_base(const struct kvg_client *client)
{
	return client->staging_map.base + client->staging_map.rows_offset;
}

int client_stage_place(struct kvg_client *client, const struct staging *staging, uint64_t bytes, uint64_t *ret_offset)
{
	int r = client_advance(client);

	while (r == 0) {
		r = staging_place(staging, bytes, ret_offset);
		if (r == 0)
			return 0;
		if (r == -EMSGSIZE)
			return client_fail(client, r, "staging area of %llu bytes cannot take %llu",
				(unsigned long long)staging->size, (unsigned long long)bytes);
		r = client_wait(client);
	}
	return r;
}

int client_stage(struct kvg_client *client, const struct kvg_sqe *sqe, enum stage_area area, uint32_t piece)
{
	int r;

	client->stage_count++;
	do {
		r = client_submit_stage(client, sqe, area, piece);
		if (r == 0)
			return 0;
		if (r == -EAGAIN)
			r = client_wait(client);
	} while (r == 0);
	/* What was not submitted occupies nothing. */
	client->stage_count--;
	if (area != AREA_NONE)
		staging_done(area == AREA_HOST ? &client->staging : &client->gpu->staging, piece);
	return r;
}

static int stage_piece(struct kvg_client *client, const struct rows *rows, const struct sequence *sequence,
	uint32_t first, uint32_t count, const uint8_t *data)
{
	struct kvg_sqe sqe = {.op = KVG_OP_STAGE, .seq = rows->seq, .generation = sequence->generation};
	uint64_t bytes = count * rows->row_bytes, offset = 0;
	int r = client_stage_place(client, &client->staging, bytes, &offset);

	if (r < 0)
		return r;
	if (data != rows_base(client) + offset)
		memcpy(rows_base(client) + offset, data, bytes);
	sqe.stage.kind = rows->kind;
	sqe.stage.layer_begin = rows->layer;
	sqe.stage.layer_count = 1;
	sqe.stage.pos = rows->pos + first;
	sqe.stage.rows = count;
	sqe.stage.offset = offset;
	return client_stage(client, &sqe, AREA_HOST, staging_take(&client->staging, bytes, offset));
}

/* Rows larger than the area go in pieces. */
static int stage_rows(struct kvg_client *client, const struct rows *rows, uint32_t count, const uint8_t *data)
{
	int r = 0;
	const struct sequence *sequence = client_sequence(client, rows->seq, &r);
	uint64_t most;

	if (!sequence)
		return r;
	if (rows->layer >= client->model.layers)
		return client_fail(client, -EINVAL, "sequence %u: layer %u of %u cannot be staged", (uint32_t)rows->seq,
			rows->layer, client->model.layers);
	most = rows->row_bytes ? client->staging.size / rows->row_bytes : 0;
	if (!most)
		return client_fail(client, -EMSGSIZE, "staging area of %llu bytes cannot take a row of %llu",
			(unsigned long long)client->staging.size, (unsigned long long)rows->row_bytes);
	for (uint32_t done = 0; r == 0 && done < count;) {
		uint32_t n = count - done < most ? count - done : (uint32_t)most;

		r = stage_piece(client, rows, sequence, done, n, data + done * rows->row_bytes);
		done += n;
	}
	return r;
}

int kvg_stage_hidden(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden)
{
	CLIENT_TURN(client);
	const struct rows all = {.seq = seq,
		.kind = KVG_STAGE_HIDDEN,
		.layer = layer,
		.pos = pos,
		.row_bytes = client->model.hidden_dim * sizeof(uint16_t)};

	return stage_rows(client, &all, rows, (const uint8_t *)hidden);
}

int kvg_stage_scores(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const float *scores)
{
	CLIENT_TURN(client);
	const struct rows all = {.seq = seq,
		.kind = KVG_STAGE_SCORE,
		.layer = layer,
		.pos = pos,
		.row_bytes = client->model.heads * sizeof(float)};

	return stage_rows(client, &all, rows, (const uint8_t *)scores);
}

void *kvg_stage_buffer(struct kvg_client *client, uint64_t bytes)
{
	CLIENT_TURN(client);
	uint64_t offset = 0;

	if (client_check_registered(client) < 0)
		return NULL;
	if (client_stage_place(client, &client->staging, bytes, &offset) < 0)
		return NULL;
	return rows_base(client) + offset;
}

int kvg_stage_wait(struct kvg_client *client)
{
	CLIENT_TURN(client);
	int r = client_advance(client);

	while (r == 0 && client->stage_count)
		r = client_wait(client);
	if (r < 0 || !client->stage_status)
		return r;
	r = client_fail(client, client->stage_status, "%s",
		client->stage_text[0] ? client->stage_text : strerror(-client->stage_status));
	client->stage_status = 0;
	return r;
}
