#include "daemon/session/ring.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proto/frame.h"

static uint32_t load(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* A store and a later load that must not pass each other, with the worker doing the reverse: both sequentially
 * consistent. */
static void store_ordered(uint32_t *word, uint32_t value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static uint32_t load_ordered(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static void store(uint32_t *word, uint32_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

int ring_init(struct ring *ring, uint32_t entries)
{
	struct kvg_ring header = {
		.magic = KVG_RING_MAGIC, .version = KVG_ABI_VERSION, .sq_entries = entries, .cq_entries = entries};
	uint8_t *base;

	*ring = (struct ring){.fd = -1, .doorbell = -1, .entries = entries};
	header.sq_offset = 4096;
	header.cq_offset = header.sq_offset + entries * (uint32_t)sizeof(struct kvg_sqe);
	header.text_offset = header.cq_offset + entries * (uint32_t)sizeof(struct kvg_cqe);
	header.size = (header.text_offset + entries * KVG_TEXT_SIZE + 4095u) & ~4095u;
	header.need_wakeup = 1;
	ring->size = header.size;
	ring->fd = kvg_memfd_new("kvgate-ring", header.size);
	if (ring->fd < 0)
		return ring->fd;
	ring->doorbell = eventfd(0, EFD_CLOEXEC);
	base = ring->doorbell < 0 ? MAP_FAILED
				  : mmap(NULL, ring->size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, 0);
	if (base == MAP_FAILED) {
		int error = errno;

		ring_deinit(ring);
		return -error;
	}
	ring->shared = (void *)base;
	*ring->shared = header;
	ring->sq = (void *)(base + header.sq_offset);
	ring->cq = (void *)(base + header.cq_offset);
	ring->text = (char *)base + header.text_offset;
	return 0;
}

void ring_deinit(struct ring *ring)
{
	if (ring->shared)
		(void)munmap(ring->shared, ring->size);
	if (ring->fd >= 0)
		(void)close(ring->fd);
	if (ring->doorbell >= 0)
		(void)close(ring->doorbell);
	*ring = (struct ring){.fd = -1, .doorbell = -1};
}

/* Follows the worker's cq_head. */
static int update_cq_head(struct ring *ring)
{
	uint32_t head = load(&ring->shared->cq_head);

	if (head - ring->cq_head > ring->cq_tail - ring->cq_head)
		return -EPROTO;
	ring->cq_head = head;
	return 0;
}

/* 1 when there is room for one more completion, 0 when not, -EPROTO. */
static int has_room(struct ring *ring)
{
	if (ring->cq_tail - ring->cq_head + ring->outstanding < ring->entries)
		return 1;
	if (update_cq_head(ring) < 0)
		return -EPROTO;
	return ring->cq_tail - ring->cq_head + ring->outstanding < ring->entries;
}

int ring_take(struct ring *ring, struct kvg_sqe *ret)
{
	uint32_t tail = load(&ring->shared->sq_tail);
	int r;

	if (tail - ring->sq_head > ring->entries)
		return -EPROTO;
	if (tail == ring->sq_head)
		return 0;
	r = has_room(ring);
	if (r <= 0)
		return r;
	memcpy(ret, &ring->sq[ring->sq_head & (ring->entries - 1)], sizeof(*ret));
	ring->sq_head++;
	ring->outstanding++;
	store(&ring->shared->sq_head, ring->sq_head);
	return 1;
}

static bool take_sleeping(struct ring *ring)
{
	return load_ordered(&ring->shared->sleeping) &&
	       __atomic_exchange_n(&ring->shared->sleeping, 0, __ATOMIC_ACQ_REL);
}

bool ring_complete(struct ring *ring, struct kvg_cqe *cqe, const char *text)
{
	uint32_t index = ring->cq_tail & (ring->entries - 1);

	cqe->text = cqe->status < 0;
	if (cqe->text)
		(void)snprintf(ring->text + (size_t)index * KVG_TEXT_SIZE, KVG_TEXT_SIZE, "%s", text);
	cqe->events = ring->events;
	ring->cq[index] = *cqe;
	ring->outstanding--;
	store_ordered(&ring->shared->cq_tail, ++ring->cq_tail);
	return take_sleeping(ring);
}

bool ring_set_wakeup(struct ring *ring, bool on)
{
	store_ordered(&ring->shared->need_wakeup, on);
	return load_ordered(&ring->shared->sq_tail) != ring->sq_head && has_room(ring) != 0;
}

uint32_t ring_count_event(struct ring *ring)
{
	store(&ring->shared->events, ++ring->events);
	return ring->events;
}
