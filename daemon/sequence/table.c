#include "daemon/sequence/table.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/frame.h"

#define PAGE 4096u

static uint64_t page_up(uint64_t size)
{
	return (size + PAGE - 1) & ~(uint64_t)(PAGE - 1);
}

static void plan(struct kvg_table *header, const struct kvg_layout *layout, uint32_t row_cap)
{
	const struct kvg_group *group = &layout->groups[0];
	uint64_t rows = (uint64_t)group->layers * group->head_count * layout->max_sequences;

	*header = (struct kvg_table){.magic = KVG_TABLE_MAGIC,
		.version = KVG_ABI_VERSION,
		.layers = group->layers,
		.heads = group->head_count,
		.max_sequences = layout->max_sequences,
		.row_cap = row_cap};
	header->slot_offset = page_up(sizeof(*header));
	header->base_len_offset = header->slot_offset + page_up(layout->max_sequences * sizeof(struct kvg_slot));
	header->ids_offset = header->base_len_offset + page_up(rows * sizeof(uint32_t));
	header->size = header->ids_offset + page_up(rows * row_cap * sizeof(uint32_t));
}

/* Mode 0600 and a reopened read-only descriptor: a worker of another uid cannot get a writable one. */
static int open_reader(int fd)
{
	char path[64];
	int reader;

	if (fchmod(fd, 0600) < 0)
		return -errno;
	(void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	reader = open(path, O_RDONLY | O_CLOEXEC);
	return reader < 0 ? -errno : reader;
}

int table_init(struct table *table, const struct kvg_layout *layout, uint32_t row_cap)
{
	struct kvg_table header;
	uint8_t *base;
	int r;

	*table = (struct table){.fd = -1, .reader_fd = -1};
	plan(&header, layout, row_cap);
	table->fd = kvg_memfd_new("kvgate-table", header.size);
	if (table->fd < 0)
		return table->fd;
	base = mmap(NULL, header.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, table->fd, 0);
	if (base == MAP_FAILED) {
		r = -errno;
		table_deinit(table);
		return r;
	}
	table->size = header.size;
	table->header = (void *)base;
	*table->header = header;
	table->slots = (void *)(base + header.slot_offset);
	table->base_len = (void *)(base + header.base_len_offset);
	table->ids = (void *)(base + header.ids_offset);
	table->reader_fd = open_reader(table->fd);
	r = table->reader_fd;
	if (r < 0)
		table_deinit(table);
	return r < 0 ? r : 0;
}

void table_deinit(struct table *table)
{
	if (table->header)
		(void)munmap(table->header, table->size);
	if (table->fd >= 0)
		(void)close(table->fd);
	if (table->reader_fd >= 0)
		(void)close(table->reader_fd);
	*table = (struct table){.fd = -1, .reader_fd = -1};
}

/* Index of a row in [layers][max_sequences][heads]. */
static size_t row_index(const struct table *table, uint32_t slot, uint32_t row)
{
	const struct kvg_table *header = table->header;

	return ((size_t)(row / header->heads) * header->max_sequences + slot) * header->heads + row % header->heads;
}

uint32_t *table_base_len(const struct table *table, uint32_t slot, uint32_t row)
{
	return table->base_len + row_index(table, slot, row);
}

uint32_t *table_row(const struct table *table, uint32_t slot, uint32_t row)
{
	return table->ids + row_index(table, slot, row) * table->header->row_cap;
}

void table_clear(const struct table *table, uint32_t slot)
{
	const struct kvg_table *header = table->header;

	for (uint32_t layer = 0; layer < header->layers; layer++)
		memset(table_base_len(table, slot, layer * header->heads), 0, header->heads * sizeof(uint32_t));
	table->slots[slot] = (struct kvg_slot){0};
}

void table_forget(const struct table *table, uint32_t slot)
{
	const struct kvg_table *header = table->header;
	uint64_t bytes = (uint64_t)header->heads * header->row_cap * sizeof(uint32_t);

	for (uint32_t layer = 0; layer < header->layers; layer++) {
		uint64_t begin = header->ids_offset + (layer * (uint64_t)header->max_sequences + slot) * bytes;
		uint64_t end = (begin + bytes) & ~(uint64_t)(PAGE - 1);

		begin = page_up(begin);
		if (begin < end)
			(void)fallocate(table->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)begin,
				(off_t)(end - begin));
	}
	table_clear(table, slot);
}

uint64_t table_physical(const struct table *table)
{
	struct stat st;

	return fstat(table->fd, &st) < 0 ? 0 : (uint64_t)st.st_blocks * 512u;
}
