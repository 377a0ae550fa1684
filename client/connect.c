#include "client/client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SPIN_DEFAULT_US 50u
#define GATE_MAX        (1ull << 32)  /* bytes of a gate file */
#define HOST_ROWS_MAX   (32ull << 20) /* bytes of staging rows in host memory, on the cuda kind */

uint32_t kvg_abi_version(void)
{
	return KVG_ABI_VERSION;
}

const char *kvg_tenant(const struct kvg_client *client)
{
	return client->tenant;
}

int kvg_fd(const struct kvg_client *client)
{
	return client->socket;
}

void kvg_set_spin(struct kvg_client *client, uint32_t microseconds)
{
	CLIENT_TURN(client);
	client->spin_us = microseconds;
}

uint64_t kvg_arena_bytes(const struct kvg_client *client)
{
	return client->arena.slots * client->arena.extent_size;
}

uint64_t kvg_mapped_bytes(const struct kvg_client *client)
{
	return client->arena.mapped_count * client->arena.extent_size;
}

static int open_socket(struct kvg_client *client, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	size_t length = strlen(path);

	if (length >= sizeof(address.sun_path))
		return client_fail(client, -ENAMETOOLONG, "socket %s: its path has %zu bytes, more than %zu", path,
			length, sizeof(address.sun_path) - 1);
	memcpy(address.sun_path, path, length + 1);
	client->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (client->socket < 0)
		return client_fail(client, -errno, "socket %s: %s", path, strerror(errno));
	while (connect(client->socket, (const struct sockaddr *)&address, sizeof(address)) < 0)
		if (errno != EINTR)
			return client_fail(client, -errno, "socket %s: %s", path, strerror(errno));
	return 0;
}

/* The reply's type and number of descriptors must be as asked for. */
static int check_reply(struct kvg_client *client, Kvg__WorkerReply__BodyCase body, unsigned fd_count)
{
	if (client->reply->body_case == body && client->reply_frame.fd_count == fd_count)
		return 0;
	return client_break(client, -EPROTO, "daemon: reply of type %d with %u descriptors, not %d with %u",
		(int)client->reply->body_case, client->reply_frame.fd_count, (int)body, fd_count);
}

/* What the daemon's kind of memory asks of this process. */
static int open_kind(struct kvg_client *client, const Kvg__Welcome *welcome)
{
	if (strcmp(welcome->kind, "host") == 0)
		return 0;
	if (strcmp(welcome->kind, "cuda") == 0)
		return gpu_open(client, welcome->device_uuid.data, welcome->device_uuid.len);
	return client_break(client, -EPROTO,
		"daemon: its memory is of the kind %.32s, which this library does not know", welcome->kind);
}

static int take_welcome(struct kvg_client *client)
{
	struct kvg_frame *frame = &client->reply_frame;
	const char *what;
	int r = check_reply(client, KVG__WORKER_REPLY__BODY_WELCOME, 2);

	if (r < 0)
		return r;
	if (client->reply->welcome->abi != KVG_ABI_VERSION)
		return client_break(client, -EPROTO, "daemon: speaks version %u, this library %u",
			client->reply->welcome->abi, KVG_ABI_VERSION);
	r = ring_map(frame->fds[0], frame->fds[1], &client->ring, &what);
	if (r < 0)
		return client_break(client, r, "daemon: the ring's %s cannot be used: %s", what, strerror(-r));
	frame->fds[1] = -1;
	client->tenant = strdup(client->reply->welcome->tenant);
	if (!client->tenant)
		return client_fail(client, -ENOMEM, "no memory");
	r = open_kind(client, client->reply->welcome);
	return r < 0 ? r : client_entries_new(client);
}

static int say_hello(struct kvg_client *client, const char *name)
{
	Kvg__Hello hello = KVG__HELLO__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	int r;

	hello.abi_min = KVG_ABI_VERSION;
	hello.abi_max = KVG_ABI_VERSION;
	hello.name = (char *)(uintptr_t)name;
	request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
	request.hello = &hello;
	r = client_request(client, &request, NULL, 0);
	if (r < 0)
		return r;
	r = take_welcome(client);
	client_reply_free(client);
	return r;
}

int kvg_connect(const char *socket_path, const char *name, struct kvg_client **ret, char *text, size_t text_size)
{
	struct kvg_client *client = calloc(1, sizeof(*client));
	int r;

	if (!client) {
		if (text)
			(void)snprintf(text, text_size, "socket %s: no memory", socket_path);
		return -ENOMEM;
	}
	client->socket = -1;
	client->ring.doorbell = -1;
	client->spin_us = SPIN_DEFAULT_US;
	r = open_socket(client, socket_path);
	if (r == 0)
		r = say_hello(client, name);
	if (r < 0) {
		if (text)
			(void)snprintf(text, text_size, "%s", client->error);
		(void)kvg_close(client);
		return r;
	}
	*ret = client;
	return 0;
}

/* Evictions under way come to their end first: the stream may be waiting for them. */
static void close_gpu(struct kvg_client *client)
{
	int r = 0;

	if (!client->gpu)
		return;
	gpu_stop(client);
	for (const struct pending *pending = client->pending; r == 0 && pending; pending = pending->next)
		while (r == 0 && !pending->done)
			r = client_wait(client);
	gpu_close(client);
}

static void free_pending(struct kvg_client *client)
{
	while (client->pending) {
		struct pending *pending = client->pending;

		client->pending = pending->next;
		free(pending);
	}
}

static void free_client(struct kvg_client *client)
{
	free_pending(client);
	free(client->entries);
	free(client->ready);
	free(client->sequences);
	free(client->tenant);
	free(client);
}

struct kvg_client *kvg_close(struct kvg_client *client)
{
	if (!client)
		return NULL;
	close_gpu(client);
	client_reply_free(client);
	/* Unmapped before the hang-up, so that the daemon finds the memory unused. */
	arena_deinit(&client->arena);
	staging_unmap(&client->staging_map);
	staging_deinit(&client->staging);
	table_deinit(&client->table);
	ring_deinit(&client->ring);
	if (client->socket >= 0)
		(void)close(client->socket);
	free_client(client);
	return NULL;
}

/* Mappings are left alone: none was taken over by fork() (MADV_DONTFORK), and the addresses may be another's by now. */
struct kvg_client *kvg_abandon(struct kvg_client *client)
{
	if (!client)
		return NULL;
	gpu_abandon(client);
	client_reply_free(client);
	if (client->ring.doorbell >= 0)
		(void)close(client->ring.doorbell);
	if (client->socket >= 0)
		(void)close(client->socket);
	free(client->arena.mapped);
	staging_deinit(&client->staging);
	free_client(client);
	return NULL;
}

static struct model model_of(const struct kvg_layout *layout)
{
	const struct kvg_group *group = &layout->groups[0];

	return (struct model){
		.heads = group->head_count,
		.query_heads = group->query_heads,
		.hidden_dim = layout->hidden_dim,
		.k_dim = group->k_dim,
		.v_dim = group->v_dim,
		.k_dtype = group->k_dtype,
		.v_dtype = group->v_dtype,
		.max_sequences = layout->max_sequences,
		.max_tokens = layout->max_tokens,
	};
}

/* One table holds groups that are equal but for their number of layers; all of these are the model's. */
static int count_layers(struct kvg_client *client, const struct kvg_layout *layout, struct model *model)
{
	for (uint32_t i = 0; i < layout->group_count; i++) {
		const struct kvg_group *group = &layout->groups[i];

		if (group->head_count != model->heads || group->query_heads != model->query_heads ||
			group->k_dim != model->k_dim || group->v_dim != model->v_dim ||
			group->k_dtype != model->k_dtype || group->v_dtype != model->v_dtype)
			return client_fail(client, -EOPNOTSUPP,
				"layout: group %u differs from group 0 in heads, size or dtype", i);
		if (__builtin_add_overflow(model->layers, group->layers, &model->layers))
			return client_fail(client, -EINVAL, "layout: group %u has %u layers", i, group->layers);
	}
	return 0;
}

/* What must hold before the layout can be put into words; its values are for the daemon to judge. */
static int check_layout(struct kvg_client *client, const struct kvg_layout *layout)
{
	if (!layout->group_count || layout->group_count > KVG_MAX_GROUPS)
		return client_fail(
			client, -EINVAL, "layout has %u groups, outside 1 to %u", layout->group_count, KVG_MAX_GROUPS);
	if (!layout->max_sequences)
		return client_fail(client, -EINVAL, "layout has 0 sequences");
	if (strnlen(layout->model, sizeof(layout->model)) == sizeof(layout->model))
		return client_fail(client, -EINVAL, "layout: its model's name does not end within %zu bytes",
			sizeof(layout->model));
	return 0;
}

static void fill_group(const struct kvg_group *from, Kvg__Group *to)
{
	kvg__group__init(to);
	to->kind = from->kind;
	to->layers = from->layers;
	to->head_begin = from->head_begin;
	to->head_count = from->head_count;
	to->head_total = from->head_total;
	to->has_rank = to->has_world = to->has_group_id = 1;
	to->rank = from->rank;
	to->world = from->world;
	to->group_id = from->group_id;
	to->k_dim = from->k_dim;
	to->v_dim = from->v_dim;
	to->k_dtype = from->k_dtype;
	to->v_dtype = from->v_dtype;
	to->has_scale_kind = to->has_scale_offset = 1;
	to->scale_kind = from->scale_kind;
	to->scale_offset = from->scale_offset;
	to->block_tokens = from->block_tokens;
	to->has_window = to->has_max_rollback = 1;
	to->window = from->window;
	to->max_rollback = from->max_rollback;
	to->query_heads = from->query_heads;
}

/* On cuda rows come from device memory, and only some from the host. */
static void fill_staging(const struct kvg_client *client, uint64_t staging_bytes, Kvg__Register *registration)
{
	registration->staging_bytes = staging_bytes;
	if (!client->gpu)
		return;
	registration->has_device_staging_bytes = 1;
	registration->device_staging_bytes = staging_bytes;
	if (staging_bytes > HOST_ROWS_MAX)
		registration->staging_bytes = HOST_ROWS_MAX;
}

static int request_registration(struct kvg_client *client, const struct kvg_layout *layout, uint64_t staging_bytes)
{
	Kvg__Group groups[KVG_MAX_GROUPS], *group_pointers[KVG_MAX_GROUPS];
	Kvg__Layout message = KVG__LAYOUT__INIT;
	Kvg__Register registration = KVG__REGISTER__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;

	for (uint32_t i = 0; i < layout->group_count; i++) {
		fill_group(&layout->groups[i], &groups[i]);
		group_pointers[i] = &groups[i];
	}
	message.model = (char *)(uintptr_t)layout->model;
	message.hidden_dim = layout->hidden_dim;
	message.max_sequences = layout->max_sequences;
	message.max_tokens = layout->max_tokens;
	message.n_groups = layout->group_count;
	message.groups = group_pointers;
	registration.layout = &message;
	fill_staging(client, staging_bytes, &registration);
	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &registration;
	return client_request(client, &request, NULL, 0);
}

/* ids and blocks of an extent: K and V halves of whole strides, so that ids keep their gap. */
static int set_addressing(struct kvg_client *client, struct model *model, uint64_t stride, uint64_t extent_size)
{
	if (!stride || extent_size % (2 * stride) || extent_size / stride > UINT32_MAX)
		return client_break(client, -EPROTO, "daemon: extents of %llu bytes do not hold blocks of 2 x %llu",
			(unsigned long long)extent_size, (unsigned long long)stride);
	model->stride = stride;
	model->extent_ids = (uint32_t)(extent_size / stride);
	model->extent_blocks = model->extent_ids / 2;
	return 0;
}

static unsigned registered_fds(const struct kvg_client *client)
{
	bool device = client->gpu && client->reply->body_case == KVG__WORKER_REPLY__BODY_REGISTERED;

	return device ? gpu_fd_count(client->reply->registered) : 2;
}

static int reserve_arena(struct kvg_client *client, uint32_t slots, uint64_t extent_size)
{
	struct arena *arena = &client->arena;
	int r = client->gpu ? gpu_reserve_arena(client, slots, extent_size)
			    : arena_init(arena, &arena_host, NULL, slots, extent_size);

	if (r == 0)
		return 0;
	return client_break(client, r, "arena of %u extents of %llu bytes cannot be reserved: %s", slots,
		(unsigned long long)extent_size, arena_error(arena, r));
}

static int take_registered(struct kvg_client *client, const struct kvg_layout *layout, struct model *model)
{
	const struct kvg_frame *frame = &client->reply_frame;
	const Kvg__Registered *reply;
	const char *what;
	int r = check_reply(client, KVG__WORKER_REPLY__BODY_REGISTERED, registered_fds(client));

	if (r < 0)
		return r;
	reply = client->reply->registered;
	r = set_addressing(client, model, reply->stride, reply->extent_size);
	if (r < 0)
		return r;
	const struct table_shape shape = {model->layers, model->heads, model->max_sequences, reply->row_cap};

	r = table_map(frame->fds[0], &shape, &client->table, &what);
	if (r < 0)
		return client_break(client, r, "daemon: the table's %s cannot be used: %s", what, strerror(-r));
	r = staging_map(frame->fds[1], reply->staging_size, reply->staging_rows_offset, model->max_sequences,
		&client->staging_map, &what);
	if (r < 0)
		return client_break(client, r, "daemon: the staging area's %s cannot be used: %s", what, strerror(-r));
	if (client->gpu)
		r = gpu_register(client, model, reply, frame->fds);
	if (r == 0)
		r = reserve_arena(client, reply->arena_slots, reply->extent_size);
	if (r < 0)
		return r;
	client->sequences = calloc(model->max_sequences, sizeof(*client->sequences));
	if (!client->sequences || staging_init(&client->staging, reply->staging_size - reply->staging_rows_offset,
					  client->ring.capacity) < 0)
		return client_break(client, -ENOMEM, "no memory for %u sequences", model->max_sequences);
	client->model = *model;
	client->layout = *layout;
	client->registered = true;
	return 0;
}

int kvg_register(struct kvg_client *client, const struct kvg_layout *layout, uint64_t staging_bytes)
{
	CLIENT_TURN(client);
	struct model model = model_of(layout);
	int r = client_check(client);

	if (r < 0)
		return r;
	if (client->registered)
		return client_fail(client, -EALREADY, "layout %.*s: this connection has one already",
			(int)sizeof(layout->model), layout->model);
	r = check_layout(client, layout);
	if (r == 0)
		r = count_layers(client, layout, &model);
	if (r == 0)
		r = request_registration(client, layout, staging_bytes);
	if (r < 0)
		return r;
	r = take_registered(client, layout, &model);
	client_reply_free(client);
	return r;
}

/* A sealed memfd with a file's bytes. */
static int seal_file(struct kvg_client *client, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY), sealed;
	struct stat st;
	void *map;

	if (fd < 0)
		return client_fail(client, -errno, "gate %s: %s", path, strerror(errno));
	if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size <= 0 || (uint64_t)st.st_size > GATE_MAX) {
		(void)close(fd);
		return client_fail(client, -EINVAL, "gate %s: not a regular file of 1 to %llu bytes", path, GATE_MAX);
	}
	map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (map == MAP_FAILED) {
		(void)close(fd);
		return client_fail(client, -errno, "gate %s: %s", path, strerror(errno));
	}
	/* Written from the mapping by the kernel: a file cut meanwhile is an error here, not a fault. */
	sealed = kvg_memfd_from("kvgate-gate", map, (size_t)st.st_size);
	(void)munmap(map, (size_t)st.st_size);
	(void)close(fd);
	if (sealed < 0)
		return client_fail(client, sealed, "gate %s: %s", path, strerror(-sealed));
	return sealed;
}

int kvg_load_gate(struct kvg_client *client, const char *path)
{
	CLIENT_TURN(client);
	Kvg__LoadGate load = KVG__LOAD_GATE__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	int r = client_check_registered(client), fd;

	if (r < 0)
		return r;
	fd = seal_file(client, path);
	if (fd < 0)
		return fd;
	request.body_case = KVG__WORKER_REQUEST__BODY_LOAD_GATE;
	request.load_gate = &load;
	r = client_request(client, &request, &fd, 1);
	if (r == 0) {
		r = check_reply(client, KVG__WORKER_REPLY__BODY_GATE_LOADED, 0);
		client_reply_free(client);
	}
	if (r == 0)
		r = client_keep_gate(client, fd);
	(void)close(fd);
	return r;
}
