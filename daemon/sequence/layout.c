#include "daemon/sequence/layout.h"

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define TABLE_MAX        ((uint64_t)1 << 34) /* bytes of block ids, sparse */
#define DEVICE_TABLE_MAX ((uint64_t)8 << 30) /* bytes of the table in device memory */
#define DEVICE_ROWS_MAX  65535u              /* a grid's y */
#define DEVICE_PIECE     16u                 /* bytes of a pair that kernels move at once */

uint32_t layout_row_cap(const struct kvg_layout *layout)
{
	uint32_t stripes = (layout->max_tokens + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS;

	/* The last held block and the last stripe may both be partial. */
	return (stripes + 2) * KVG_RUN_BLOCKS;
}

static int check_built(const struct kvg_layout *layout, char *text, size_t size)
{
	static const char *const kinds[] = {"?", "GLOBAL", "WINDOW", "MLA", "STATE"};
	const struct kvg_group *group = &layout->groups[0];

	if (layout->group_count != 1)
		(void)snprintf(
			text, size, "layout %s: %u groups, this daemon takes 1", layout->model, layout->group_count);
	else if (group->kind != KVG_GROUP_GLOBAL)
		(void)snprintf(text, size, "layout %s: group kind %s (%u), this daemon takes GLOBAL", layout->model,
			group->kind <= KVG_GROUP_STATE ? kinds[group->kind] : "unknown", group->kind);
	else if (group->k_dtype < KVG_BF16 || group->k_dtype > KVG_F32 || group->v_dtype < KVG_BF16 ||
		 group->v_dtype > KVG_F32)
		(void)snprintf(text, size, "layout %s: dtypes %u and %u, this daemon takes bf16 (1), f16 (2), f32 (3)",
			layout->model, group->k_dtype, group->v_dtype);
	else if (group->scale_kind || group->scale_offset)
		(void)snprintf(text, size, "layout %s: scale kind %u, this daemon takes none", layout->model,
			group->scale_kind);
	else if (group->block_tokens != KVG_BLOCK_TOKENS)
		(void)snprintf(text, size, "layout %s: blocks of %u tokens, this daemon takes %u", layout->model,
			group->block_tokens, KVG_BLOCK_TOKENS);
	else
		return 0;
	return -EOPNOTSUPP;
}

static bool in_range(const char *field, uint64_t value, uint64_t least, uint64_t most, const struct kvg_layout *layout,
	char *text, size_t size)
{
	if (value >= least && value <= most)
		return true;
	(void)snprintf(text, size, "layout %s: %s is %" PRIu64 ", must be %" PRIu64 " to %" PRIu64, layout->model,
		field, value, least, most);
	return false;
}

int layout_check(const struct kvg_layout *layout, char *text, size_t size)
{
	const struct kvg_group *group = &layout->groups[0];
	uint64_t rows = (uint64_t)group->layers * group->head_count;
	int r;

	if (!memchr(layout->model, '\0', sizeof(layout->model)) || !layout->model[0]) {
		(void)snprintf(
			text, size, "layout: the model's name must have 1 to %zu bytes", sizeof(layout->model) - 1);
		return -EINVAL;
	}
	r = check_built(layout, text, size);
	if (r < 0)
		return r;
	if (!in_range("layers", group->layers, 1, 1024, layout, text, size) ||
		!in_range("head_count", group->head_count, 1, 1024, layout, text, size) ||
		!in_range("head_total", group->head_total, (uint64_t)group->head_begin + group->head_count, 4096,
			layout, text, size) ||
		!in_range("rank", group->rank, 0, group->world ? group->world - 1 : 0, layout, text, size) ||
		!in_range("k_dim", group->k_dim, 4, 1024, layout, text, size) ||
		!in_range("v_dim", group->v_dim, 4, 1024, layout, text, size) ||
		!in_range("query_heads", group->query_heads, 1, 128, layout, text, size) ||
		!in_range("hidden_dim", layout->hidden_dim, 1, 1u << 17, layout, text, size) ||
		!in_range("max_sequences", layout->max_sequences, 1, 1u << 20, layout, text, size) ||
		!in_range("max_tokens", layout->max_tokens, 1, 1u << 24, layout, text, size) ||
		!in_range("bytes of tables", rows * layout->max_sequences * layout_row_cap(layout) * 4, 1, TABLE_MAX,
			layout, text, size))
		return -EINVAL;
	return 0;
}

static uint32_t dtype_bytes(uint32_t dtype)
{
	return dtype == KVG_F32 ? 4 : 2;
}

uint64_t layout_device_table(const struct kvg_layout *layout)
{
	const struct kvg_group *group = &layout->groups[0];
	uint64_t rows = (uint64_t)group->layers * group->head_count * layout->max_sequences;
	uint64_t lengths = (rows * sizeof(uint32_t) + 255) / 256 * 256;

	return lengths + rows * layout_row_cap(layout) * sizeof(uint32_t);
}

/* Whether a pair's K or V is whole pieces. */
static bool in_pieces(
	const char *field, uint32_t dim, uint32_t dtype, const struct kvg_layout *layout, char *text, size_t size)
{
	if (dim * dtype_bytes(dtype) % DEVICE_PIECE == 0)
		return true;
	(void)snprintf(text, size, "layout %s: %s is %u, %u bytes; the kind cuda takes multiples of %u bytes",
		layout->model, field, dim, dim * dtype_bytes(dtype), DEVICE_PIECE);
	return false;
}

int layout_check_device(const struct kvg_layout *layout, char *text, size_t size)
{
	const struct kvg_group *group = &layout->groups[0];
	uint32_t rows = group->layers * group->head_count;

	if (!in_pieces("k_dim", group->k_dim, group->k_dtype, layout, text, size) ||
		!in_pieces("v_dim", group->v_dim, group->v_dtype, layout, text, size))
		return -EOPNOTSUPP;
	if (rows > DEVICE_ROWS_MAX)
		(void)snprintf(text, size, "layout %s: %u layers of %u heads are %u rows; the kind cuda takes %u",
			layout->model, group->layers, group->head_count, rows, DEVICE_ROWS_MAX);
	else if (layout_device_table(layout) > DEVICE_TABLE_MAX)
		(void)snprintf(text, size,
			"layout %s: %u sequences of %u tokens need a table of %" PRIu64
			" bytes on the device, at most %" PRIu64,
			layout->model, layout->max_sequences, layout->max_tokens, layout_device_table(layout),
			DEVICE_TABLE_MAX);
	else
		return 0;
	return -EOPNOTSUPP;
}
