#include "client/ring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ENTRIES_MAX (1u << 16)

static bool power_of_two(uint32_t n)
{
	return n >= 2 && n <= ENTRIES_MAX && (n & (n - 1)) == 0;
}

static bool inside(uint64_t offset, uint64_t bytes, uint64_t size)
{
	return offset >= sizeof(struct kvg_ring) && offset % 8 == 0 && offset <= size && bytes <= size - offset;
}

/* NULL when the header makes sense. */
static const char *check_header(const struct kvg_ring *header, uint64_t size)
{
	uint64_t sq_bytes = (uint64_t)header->sq_entries * sizeof(struct kvg_sqe);
	uint64_t cq_bytes = (uint64_t)header->cq_entries * sizeof(struct kvg_cqe);
	uint64_t text_bytes = (uint64_t)header->cq_entries * KVG_TEXT_SIZE;

	if (header->magic != KVG_RING_MAGIC)
		return "magic";
	if (header->version != KVG_ABI_VERSION)
		return "version";
	if (!power_of_two(header->sq_entries) || !power_of_two(header->cq_entries))
		return "entries";
	if (header->size > size)
		return "size";
	if (!inside(header->sq_offset, sq_bytes, header->size) || !inside(header->cq_offset, cq_bytes, header->size) ||
		!inside(header->text_offset, text_bytes, header->size))
		return "offsets";
	return NULL;
}

int ring_map(int memfd, int doorbell, struct ring *ret, const char **ret_what)
{
	struct kvg_ring header;
	struct stat st;
	const char *what;
	uint8_t *map;

	*ret_what = "memfd";
	if (fstat(memfd, &st) < 0)
		return -errno;
	if (st.st_size < (off_t)sizeof(header) || pread(memfd, &header, sizeof(header), 0) != (ssize_t)sizeof(header)) {
		*ret_what = "size";
		return -EPROTO;
	}
	what = check_header(&header, (uint64_t)st.st_size);
	if (what) {
		*ret_what = what;
		return -EPROTO;
	}
	map = mmap(NULL, header.size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (map == MAP_FAILED)
		return -errno;
	(void)madvise(map, header.size, MADV_DONTFORK);
	(void)madvise(map, header.size, MADV_DONTDUMP);
	*ret = (struct ring){
		.shared = (struct kvg_ring *)(void *)map,
		.size = header.size,
		.doorbell = doorbell,
		.capacity = header.sq_entries < header.cq_entries ? header.sq_entries : header.cq_entries,
		.sq_mask = header.sq_entries - 1,
		.cq_mask = header.cq_entries - 1,
		.sq = (struct kvg_sqe *)(void *)(map + header.sq_offset),
		.cq = (const struct kvg_cqe *)(void *)(map + header.cq_offset),
		.texts = (const char *)map + header.text_offset,
		.sq_tail = header.sq_tail,
		.cq_head = header.cq_head,
	};
	return 0;
}

void ring_deinit(struct ring *ring)
{
	if (ring->shared)
		(void)munmap(ring->shared, ring->size);
	if (ring->doorbell >= 0)
		(void)close(ring->doorbell);
	*ring = (struct ring){.doorbell = -1};
}

void ring_submit(struct ring *ring, const struct kvg_sqe *entry)
{
	const uint64_t one = 1;

	ring->sq[ring->sq_tail & ring->sq_mask] = *entry;
	ring->outstanding++;
	/* Sequentially consistent, both: the daemon either sees the tail or has set need_wakeup before we look. */
	(void)__atomic_exchange_n(&ring->shared->sq_tail, ++ring->sq_tail, __ATOMIC_SEQ_CST);
	/* A full counter means that the daemon has been told already. */
	if (__atomic_load_n(&ring->shared->need_wakeup, __ATOMIC_SEQ_CST) &&
		write(ring->doorbell, &one, sizeof(one)) < 0)
		return;
}

int ring_peek(const struct ring *ring, const struct kvg_cqe **ret)
{
	uint32_t ready = __atomic_load_n(&ring->shared->cq_tail, __ATOMIC_SEQ_CST) - ring->cq_head;

	if (!ready)
		return 0;
	if (ready > ring->outstanding)
		return -EPROTO;
	*ret = &ring->cq[ring->cq_head & ring->cq_mask];
	return 1;
}

void ring_text(const struct ring *ring, const struct kvg_cqe *entry, char text[KVG_TEXT_SIZE])
{
	text[0] = '\0';
	if (!entry->text)
		return;
	memcpy(text, ring->texts + (size_t)(entry - ring->cq) * KVG_TEXT_SIZE, KVG_TEXT_SIZE);
	text[KVG_TEXT_SIZE - 1] = '\0';
}

void ring_advance(struct ring *ring)
{
	ring->outstanding--;
	__atomic_store_n(&ring->shared->cq_head, ++ring->cq_head, __ATOMIC_RELEASE);
}

uint32_t ring_events(const struct ring *ring)
{
	return __atomic_load_n(&ring->shared->events, __ATOMIC_ACQUIRE);
}

uint32_t ring_pressure(const struct ring *ring)
{
	return __atomic_load_n(&ring->shared->pressure, __ATOMIC_SEQ_CST);
}

void ring_set_sleeping(struct ring *ring, bool sleeping)
{
	(void)__atomic_exchange_n(&ring->shared->sleeping, sleeping, __ATOMIC_SEQ_CST);
}
