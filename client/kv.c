#include "client/client.h"

#include <errno.h>
#include <stdlib.h>

#include "kernels/host/attention.h"

int kvg_kind(const struct kvg_client *client)
{
	return client->gpu ? KVG_KIND_CUDA : KVG_KIND_HOST;
}

/* The kernels' words lie on the device. */
static void view_device(const struct gpu *gpu, struct kvg_view *view)
{
	view->base_len = (const uint32_t *)(uintptr_t)gpu->table.address;
	view->ids = (const uint32_t *)(uintptr_t)(gpu->table.address + gpu->ids_offset);
	view->appended = (uint32_t *)(uintptr_t)gpu->appended;
}

int kvg_view(const struct kvg_client *client, struct kvg_view *ret)
{
	const struct arena *arena = &client->arena;

	if (!client->registered)
		return -EINVAL;
	*ret = (struct kvg_view){
		.k_base = arena->base,
		.v_base = arena->base + arena->extent_size / 2,
		.stride = client->model.stride,
		.extent_size = arena->extent_size,
		.slots = client->table.slots,
		.base_len = client->table.base_len,
		.ids = client->table.ids,
		.appended = (uint32_t *)(void *)client->staging_map.base,
		.layers = client->model.layers,
		.heads = client->model.heads,
		.max_sequences = client->model.max_sequences,
		.row_cap = client->table.shape.row_cap,
	};
	if (client->gpu)
		view_device(client->gpu, ret);
	return 0;
}

/* A row and the indices of the tokens at hand in it. */
struct span {
	struct kvg_row_view row;
	uint32_t first, end;
};

/* Whether blocks [begin, end) of the row lie in mapped extents. */
static bool blocks_mapped(const struct kvg_client *client, const uint32_t *ids, uint32_t begin, uint32_t end)
{
	const struct model *model = &client->model;
	const struct arena *arena = &client->arena;

	for (uint32_t i = begin; i < end; i++) {
		uint32_t slot = ids[i] / model->extent_ids;

		if (slot >= arena->slots || !arena->mapped[slot] || ids[i] % model->extent_ids >= model->extent_blocks)
			return false;
	}
	return true;
}

/* Finds a row and checks that [pos, pos + count) is reserved and not folded. */
static int find_span(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, struct span *ret)
{
	const struct model *model = &client->model;
	uint32_t slot = (uint32_t)seq, row_cap = client->table.shape.row_cap;
	const struct sequence *sequence;
	uint64_t row, first;

	if (client->broken)
		return client->broken;
	if (client->gpu)
		return -EOPNOTSUPP;
	if (!client->registered || layer >= model->layers || head >= model->heads)
		return -EINVAL;
	if (slot >= model->max_sequences || !(seq >> 32) || client->sequences[slot].epoch != seq >> 32)
		return -ENOENT;
	sequence = &client->sequences[slot];
	if (sequence->flags)
		return -EBUSY;
	if (pos < sequence->fold_pos || pos > sequence->reserved_pos || count > sequence->reserved_pos - pos)
		return -ERANGE;
	row = table_row(&client->table, layer, slot, head);
	first = (uint64_t)client->table.base_len[row] + (pos - sequence->fold_pos);
	if (first + count > (uint64_t)row_cap * KVG_BLOCK_TOKENS)
		return -EPROTO;
	*ret = (struct span){
		.row = {.k_base = client->arena.base,
			.v_base = client->arena.base + client->arena.extent_size / 2,
			.stride = model->stride,
			.ids = client->table.ids + row * row_cap,
			.block_tokens = KVG_BLOCK_TOKENS,
			.k_dim = model->k_dim,
			.v_dim = model->v_dim,
			.k_dtype = model->k_dtype,
			.v_dtype = model->v_dtype},
		.first = (uint32_t)first,
		.end = (uint32_t)first + count,
	};
	return 0;
}

static uint32_t block_end(uint32_t index)
{
	return (index + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;
}

int kvg_append(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, const float *k, size_t k_stride, const float *v, size_t v_stride)
{
	struct span span;
	int r = find_span(client, seq, layer, head, pos, count, &span);

	if (r || !count)
		return r;
	if (pos < client->sequences[(uint32_t)seq].shared_pos)
		return -ERANGE;
	if (!blocks_mapped(client, span.row.ids, span.first / KVG_BLOCK_TOKENS, block_end(span.end)))
		return -EPROTO;
	kvg_row_append(&span.row, span.first, count, k, k_stride, v, v_stride);
	return 0;
}

int kvg_attend(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, float scale, const float *q, size_t q_stride, float *out, size_t o_stride)
{
	const struct model *model = &client->model;
	struct span span;
	void *scratch;
	size_t size;
	int r = find_span(client, seq, layer, head, pos, count, &span);

	if (r || !count)
		return r;
	if (!blocks_mapped(client, span.row.ids, 0, block_end(span.end)))
		return -EPROTO;
	size = kvg_row_attend_scratch(count, model->query_heads, span.end, model->k_dim, model->v_dim);
	scratch = aligned_alloc(64, (size + 63) & ~(size_t)63);
	if (!scratch)
		return -ENOMEM;
	kvg_row_attend(&span.row, span.end, count, model->query_heads, scale, q, q_stride, out, o_stride, scratch);
	free(scratch);
	return 0;
}
