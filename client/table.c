#include "client/table.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int map_shared(int fd, uint64_t size, int protection, void **ret)
{
	void *map = mmap(NULL, size, protection, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED)
		return -errno;
	(void)madvise(map, size, MADV_DONTFORK);
	(void)madvise(map, size, MADV_DONTDUMP);
	*ret = map;
	return 0;
}

static bool inside(uint64_t offset, uint64_t count, uint64_t element, uint64_t size)
{
	uint64_t bytes;

	if (__builtin_mul_overflow(count, element, &bytes))
		return false;
	return offset >= sizeof(struct kvg_table) && offset % 8 == 0 && offset <= size && bytes <= size - offset;
}

/* NULL when the header makes sense. */
static const char *check_header(const struct kvg_table *header, const struct table_shape *shape, uint64_t size)
{
	uint64_t rows, ids;

	if (header->magic != KVG_TABLE_MAGIC)
		return "magic";
	if (header->version != KVG_ABI_VERSION)
		return "version";
	if (header->layers != shape->layers || header->heads != shape->heads ||
		header->max_sequences != shape->max_sequences || header->row_cap != shape->row_cap || !shape->row_cap)
		return "shape";
	if (header->size > size)
		return "size";
	if (__builtin_mul_overflow((uint64_t)shape->layers * shape->heads, shape->max_sequences, &rows) ||
		__builtin_mul_overflow(rows, shape->row_cap, &ids))
		return "shape";
	if (!inside(header->slot_offset, shape->max_sequences, sizeof(struct kvg_slot), header->size) ||
		!inside(header->base_len_offset, rows, sizeof(uint32_t), header->size) ||
		!inside(header->ids_offset, ids, sizeof(uint32_t), header->size))
		return "offsets";
	return NULL;
}

int table_map(int fd, const struct table_shape *shape, struct table *ret, const char **ret_what)
{
	struct kvg_table header;
	struct stat st;
	const char *what;
	uint8_t *base;
	void *map = NULL;
	int r;

	*ret_what = "memfd";
	if (fstat(fd, &st) < 0)
		return -errno;
	if (st.st_size < (off_t)sizeof(header) || pread(fd, &header, sizeof(header), 0) != (ssize_t)sizeof(header)) {
		*ret_what = "size";
		return -EPROTO;
	}
	what = check_header(&header, shape, (uint64_t)st.st_size);
	if (what) {
		*ret_what = what;
		return -EPROTO;
	}
	r = map_shared(fd, header.size, PROT_READ, &map);
	if (r < 0)
		return r;
	base = map;
	*ret = (struct table){
		.header = map,
		.size = header.size,
		.shape = *shape,
		.slots = (const struct kvg_slot *)(void *)(base + header.slot_offset),
		.base_len = (const uint32_t *)(void *)(base + header.base_len_offset),
		.ids = (const uint32_t *)(void *)(base + header.ids_offset),
	};
	return 0;
}

void table_deinit(struct table *table)
{
	if (table->header)
		(void)munmap((void *)(uintptr_t)table->header, table->size);
	*table = (struct table){0};
}

uint64_t table_row(const struct table *table, uint32_t layer, uint32_t slot, uint32_t head)
{
	return ((uint64_t)layer * table->shape.max_sequences + slot) * table->shape.heads + head;
}

int staging_map(int fd, uint64_t size, uint64_t rows_offset, uint32_t max_sequences, struct staging_map *ret,
	const char **ret_what)
{
	struct stat st;
	void *map = NULL;
	int r;

	*ret_what = "memfd";
	if (fstat(fd, &st) < 0)
		return -errno;
	*ret_what = "size";
	if (st.st_size < 0 || size > (uint64_t)st.st_size)
		return -EPROTO;
	*ret_what = "rows offset";
	if (rows_offset >= size || rows_offset % sizeof(uint64_t) ||
		rows_offset < (uint64_t)max_sequences * sizeof(uint32_t))
		return -EPROTO;
	*ret_what = "memfd";
	r = map_shared(fd, size, PROT_READ | PROT_WRITE, &map);
	if (r < 0)
		return r;
	*ret = (struct staging_map){.base = map, .size = size, .rows_offset = rows_offset};
	return 0;
}

void staging_unmap(struct staging_map *staging)
{
	if (staging->base)
		(void)munmap(staging->base, staging->size);
	*staging = (struct staging_map){0};
}
