/*
 * Device memory as descriptors: what create() makes survives its mapping, is shared with other processes, comes back
 * zeroed, and goes; a pool on it; and a device that is lost. With the argument "about" the program only prints what
 * is known of the device; any other names the tests to run.
 */
#include "daemon/memory/cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/memory/reserve.h"
#include "proto/frame.h"
#include "tests/support/runner.h"

#define SIZE   ((size_t)64 << 20)
#define EXTENT ((size_t)8 << 20)
#define SKIP   77

static struct kind *kind;
static const struct kind_ops *ops;
static const struct kvg_cuda_driver *driver;

static CUdeviceptr address(const void *at)
{
	return (CUdeviceptr)(uintptr_t)at;
}

static void cu(CUresult result)
{
	if (result != CUDA_SUCCESS)
		fail_msg("%s", kvg_cuda_error(driver, result));
}

/* Words that depend on their place. */
static void put_pattern(void *at, size_t size, uint32_t seed)
{
	uint32_t *words = malloc(size);

	assert_non_null(words);
	for (size_t i = 0; i < size / 4; i++)
		words[i] = (uint32_t)i * 2654435761u + seed;
	cu(driver->cuMemcpyHtoD(address(at), words, size));
	cu(driver->cuCtxSynchronize());
	free(words);
}

/* The first word that differs, or size / 4. zero: zeros are expected instead of the pattern. */
static size_t first_difference(const void *at, size_t size, uint32_t seed, bool zero)
{
	uint32_t *words = malloc(size);
	size_t i;

	assert_non_null(words);
	memset(words, 0x5a, size);
	cu(driver->cuMemcpyDtoH(words, address(at), size));
	for (i = 0; i < size / 4; i++)
		if (words[i] != (zero ? 0 : (uint32_t)i * 2654435761u + seed))
			break;
	free(words);
	return i;
}

static void assert_pattern(const void *at, size_t size, uint32_t seed)
{
	assert_int_equal(first_difference(at, size, seed, false), size / 4);
}

static void assert_zero(const void *at, size_t size)
{
	assert_int_equal(first_difference(at, size, 0, true), size / 4);
}

/* ---- one piece of memory ---- */

static void test_content_stays_in_the_descriptor(void **state)
{
	uint8_t *base = ops->reserve(kind, 4 * SIZE);
	int fd = ops->create(kind, SIZE);

	(void)state;
	assert_non_null(base);
	assert_true(fd >= 0);
	assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	assert_int_equal(ops->physical(kind, fd, SIZE), SIZE);
	assert_int_equal(ops->map(kind, fd, base + SIZE, SIZE), 0);
	put_pattern(base + SIZE, SIZE, 1);
	assert_int_equal(ops->unmap(kind, base + SIZE, SIZE), 0);
	assert_int_equal(ops->map(kind, fd, base + 3 * SIZE, SIZE), 0);
	assert_pattern(base + 3 * SIZE, SIZE, 1);
	assert_int_equal(ops->map(kind, fd, base, SIZE), 0); /* twice at once: the same bytes */
	assert_pattern(base, SIZE, 1);
	assert_int_equal(ops->unmap(kind, base, SIZE), 0);
	assert_int_equal(ops->unmap(kind, base + 3 * SIZE, SIZE), 0);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	assert_int_equal(fcntl(fd, F_GETFD), -1);
	ops->unreserve(kind, base, 4 * SIZE);
	ops->unreserve(kind, NULL, SIZE);
}

/* Memory that held a pattern, destroyed and had anew, is zeros for its next owner. */
static void test_born_zero(void **state)
{
	uint8_t *base = ops->reserve(kind, SIZE);
	unsigned dirty = 0;

	(void)state;
	for (uint32_t round = 0; round < 8; round++) {
		int fd = ops->create(kind, SIZE);

		assert_true(fd >= 0);
		assert_int_equal(ops->map(kind, fd, base, SIZE), 0);
		dirty += first_difference(base, SIZE, 0, true) < SIZE / 4;
		assert_int_equal(ops->scrub(kind, base, SIZE), 0);
		assert_zero(base, SIZE);
		put_pattern(base, SIZE, round);
		assert_int_equal(ops->unmap(kind, base, SIZE), 0);
		assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	}
	print_message("not zero before scrub(): %u of 8\n", dirty);
	ops->unreserve(kind, base, SIZE);
}

static void test_memory_goes_back(void **state)
{
	uint64_t before, held, after;
	uint8_t *base = ops->reserve(kind, 16 * SIZE);
	int fd = ops->create(kind, 16 * SIZE);

	(void)state;
	assert_true(fd >= 0);
	assert_int_equal(ops->destroy(kind, fd, 16 * SIZE), 0);
	assert_int_equal(ops->usage(kind, &before), 0);
	fd = ops->create(kind, 16 * SIZE);
	assert_int_equal(ops->map(kind, fd, base, 16 * SIZE), 0);
	assert_int_equal(ops->usage(kind, &held), 0);
	assert_int_equal(ops->unmap(kind, base, 16 * SIZE), 0);
	assert_int_equal(ops->destroy(kind, fd, 16 * SIZE), 0);
	assert_int_equal(ops->usage(kind, &after), 0);
	print_message("in use: %zu MiB, with 1 GiB more %zu, afterwards %zu\n", (size_t)(before >> 20),
		(size_t)(held >> 20), (size_t)(after >> 20));
	assert_true(held >= before + 15 * SIZE);
	assert_true(after < before + SIZE);
	ops->unreserve(kind, base, 16 * SIZE);
}

static void test_errors(void **state)
{
	uint8_t *base = ops->reserve(kind, SIZE);
	int fds[2];

	(void)state;
	assert_int_equal(ops->create(kind, (size_t)ops->about(kind)->total * 2 / SIZE * SIZE), -ENOMEM);
	assert_true(ops->create(kind, 4096) < 0);
	assert_int_equal(ops->map(kind, -1, base, SIZE), -EBADF);
	assert_int_equal(pipe(fds), 0);
	assert_true(ops->map(kind, fds[0], base, SIZE) < 0); /* no memory at all */
	assert_int_equal(close(fds[0]) | close(fds[1]), 0);
	assert_int_equal(kind_cuda_failed(kind), CUDA_SUCCESS); /* none of that loses the device */
	ops->unreserve(kind, base, SIZE);
}

/* ---- another process ---- */

/* This program again, with an argument; its end of a socket pair is descriptor 3. */
static pid_t start_other(const char *what, int *ret_socket)
{
	int fds[2];
	pid_t pid;

	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
	pid = fork();
	if (pid == 0) {
		if (fds[1] == 3 ? fcntl(3, F_SETFD, 0) < 0 : dup2(fds[1], 3) < 0)
			_exit(9);
		(void)execl("/proc/self/exe", "gpu_kind", what, (char *)NULL);
		_exit(9);
	}
	assert_true(pid > 0);
	assert_int_equal(close(fds[1]), 0);
	*ret_socket = fds[0];
	return pid;
}

static int end_of_other(pid_t pid)
{
	int status;

	assert_int_equal(waitpid(pid, &status, 0), pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Maps what comes over the socket, checks it, and leaves a pattern of its own. */
static void other_maps(void)
{
	struct kvg_frame frame;
	uint8_t *base = ops->reserve(kind, SIZE);

	assert_int_equal(kvg_frame_receive(3, 64, 1, 1, &frame), 1);
	assert_int_equal(frame.fd_count, 1);
	assert_int_equal(ops->map(kind, frame.fds[0], base, SIZE), 0);
	assert_pattern(base, SIZE, 77);
	put_pattern(base, SIZE, 78);
	assert_int_equal(kvg_frame_send(3, "done", 4, NULL, 0), 0);
	assert_int_equal(ops->unmap(kind, base, SIZE), 0);
	kvg_frame_deinit(&frame);
	ops->unreserve(kind, base, SIZE);
}

static void test_another_process_maps_it(void **state)
{
	uint8_t *base = ops->reserve(kind, SIZE);
	int fd = ops->create(kind, SIZE), far;
	pid_t pid = start_other("map", &far);
	char reply[8];

	(void)state;
	assert_int_equal(ops->map(kind, fd, base, SIZE), 0);
	put_pattern(base, SIZE, 77);
	assert_int_equal(kvg_frame_send(far, "map", 3, &fd, 1), 0);
	assert_int_equal(recv(far, reply, sizeof(reply), 0), 4);
	assert_int_equal(end_of_other(pid), 0);
	assert_pattern(base, SIZE, 78);
	assert_int_equal(ops->unmap(kind, base, SIZE), 0);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	assert_int_equal(close(far), 0);
	ops->unreserve(kind, base, SIZE);
}

/* ---- a pool ---- */

struct fixture {
	struct loop *loop;
	struct executor *executor;
	struct pool *pool;
	struct arena *arena;
	struct quota_account account;
	struct quota quota;
	struct list extents;
	int status;
};

static void fixture_init(struct fixture *f)
{
	struct kvg_layout layout = {.model = "m", .group_count = 1};

	*f = (struct fixture){.account = {.max = 16 * EXTENT}};
	layout.groups[0] = (struct kvg_group){.k_dim = 128, .v_dim = 128, .k_dtype = KVG_BF16, .v_dtype = KVG_BF16};
	list_init(&f->extents);
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(pool_new(f->loop, f->executor, kind, 16 * EXTENT, EXTENT, &f->pool), 0);
	assert_int_equal(arena_new(f->pool, &layout, &f->arena), 0);
	f->quota = (struct quota){.name = "t", .tier = "device", .parent = &f->pool->quota, .account = &f->account};
}

static void fixture_deinit(struct fixture *f)
{
	(void)arena_unref(f->arena);
	(void)executor_free(f->executor);
	(void)pool_free(f->pool);
	(void)loop_free(f->loop);
}

static void on_done(struct extent_batch *batch)
{
	struct fixture *f = batch->user;
	struct list *node;

	while ((node = list_pop(&batch->extents)))
		list_add_tail(&f->extents, node);
	f->status = batch->status;
	(void)extent_batch_free(batch);
	loop_stop(f->loop);
}

static void create(struct fixture *f, uint32_t count)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);
	char text[QUOTA_TEXT];

	assert_int_equal(quota_charge(&f->quota, count * EXTENT, 0, "x", text), 0);
	assert_int_equal(extent_batch_add_new(batch, f->arena, &f->quota, 0, 0, count), 0);
	extent_batch_create(batch);
	assert_int_equal(loop_run(f->loop), 0);
}

static void destroy(struct fixture *f)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);
	struct list *node;

	while ((node = list_pop(&f->extents)))
		list_add_tail(&batch->extents, node);
	extent_batch_destroy(batch);
	assert_int_equal(loop_run(f->loop), 0);
	while (!list_empty(&f->extents))
		extent_release(f->pool, list_entry(f->extents.next, struct extent, node), 0);
}

static void test_pool(void **state)
{
	struct fixture f;

	(void)state;
	fixture_init(&f);
	for (uint32_t round = 0; round < 4; round++) {
		create(&f, 16);
		assert_int_equal(f.status, 0);
		for (const struct list *node = f.extents.next; node != &f.extents; node = node->next) {
			const struct extent *extent = list_entry(node, struct extent, node);
			uint8_t *at = f.arena->base + extent->meta->slot * EXTENT;
			size_t pairs = f.arena->blocks_per_extent * KVG_BLOCK_TOKENS;

			assert_zero(at, EXTENT);
			put_pattern(at, EXTENT, extent->meta->slot + round);
			if (round == 0)
				assert_zero(
					f.arena->pairs + extent->meta->slot * pairs, pairs * sizeof(struct meta_place));
			put_pattern(f.arena->pairs + extent->meta->slot * pairs, pairs * sizeof(struct meta_place),
				extent->meta->slot);
		}
		assert_int_equal(f.arena->pairs_bytes, 2 << 20); /* 16 slots of 1024 blocks of 128 bytes */
		destroy(&f);
		assert_int_equal(f.account.charged, 0);
		assert_int_equal(f.pool->live, 0);
	}
	fixture_deinit(&f);
}

static void stop_loop(void *user)
{
	loop_stop(user);
}

static void wait_reserve(const struct fixture *f, const struct reserve *reserve)
{
	while (!reserve_is_settled(reserve))
		assert_int_equal(loop_run(f->loop), 0);
}

/* Memory of a min that waited unmapped is zeroed when an extent is made of it, and is there anew when that goes. */
static void test_memory_of_min(void **state)
{
	struct reserve reserve;
	char text[QUOTA_TEXT];
	struct fixture f;

	(void)state;
	fixture_init(&f);
	f.pool->reserve_ended = stop_loop;
	f.pool->reserve_user = f.loop;
	reserve_init(&reserve, f.pool, &f.quota, 0);
	assert_int_equal(quota_set(&f.quota, 12 * EXTENT, 0, 16 * EXTENT, text), 0);
	reserve_update(&reserve);
	wait_reserve(&f, &reserve);
	assert_int_equal(reserve.count, 12);
	f.pool->reserve_ended = NULL;
	for (uint32_t round = 0; round < 2; round++) {
		create(&f, 16);
		assert_int_equal(f.status, 0);
		assert_int_equal(reserve.count, 0);
		for (const struct list *node = f.extents.next; node != &f.extents; node = node->next) {
			uint8_t *at = f.arena->base + list_entry(node, struct extent, node)->meta->slot * EXTENT;

			assert_zero(at, EXTENT);
			put_pattern(at, EXTENT, round);
		}
		destroy(&f);
		f.pool->reserve_ended = stop_loop;
		wait_reserve(&f, &reserve);
		f.pool->reserve_ended = NULL;
		assert_int_equal(reserve.count, 12);
	}
	reserve_stop_all(f.pool);
	fixture_deinit(&f);
	reserve_deinit(&reserve);
}

/* ---- a lost device ---- */

static const char fault_ptx[] = ".version 7.0\n"
				".target sm_80\n"
				".address_size 64\n"
				".visible .entry fault()\n"
				"{\n"
				"	.reg .u64 %a;\n"
				"	.reg .u32 %v;\n"
				"	mov.u64 %a, 4096;\n"
				"	mov.u32 %v, 1;\n"
				"	st.global.u32 [%a], %v;\n"
				"	ret;\n"
				"}\n";

/* Ends with everything taken down on a device that is gone. */
static void other_loses_the_device(void)
{
	static const char *const names[] = {"fault"};
	struct pollfd event = {.fd = ops->failure_fd(kind), .events = POLLIN};
	struct kvg_cuda *cuda = ops->device(kind);
	char text[KIND_TEXT];
	uint64_t used = 0;
	struct fixture f;
	CUmodule module;
	CUfunction fault;
	uint8_t *base;
	int fd;

	fixture_init(&f);
	create(&f, 4);
	assert_int_equal(f.status, 0);
	assert_null(ops->failure(kind, text));
	assert_int_equal(poll(&event, 1, 0), 0);
	cu(kvg_cuda_module_load(cuda, fault_ptx, names, 1, &module, &fault));
	cu(kvg_cuda_launch(cuda, fault, 1, 1, 0, NULL, NULL));
	kind_cuda_check(kind, driver->cuCtxSynchronize(), "a test");
	assert_int_equal(poll(&event, 1, 0), 1);
	assert_int_equal(kind_cuda_failed(kind), CUDA_ERROR_ILLEGAL_ADDRESS);
	assert_string_equal(ops->failure(kind, text), "CUDA_ERROR_ILLEGAL_ADDRESS (a test)");
	print_message("cuStreamQuery: %s, cuMemGetInfo: %d\n", kvg_cuda_error(driver, driver->cuStreamQuery(NULL)),
		ops->usage(kind, &used));
	base = ops->reserve(kind, SIZE);
	fd = ops->create(kind, SIZE);
	print_message("afterwards: reserve %p, create %d, scrub %d, unmap %d\n", (void *)base, fd,
		ops->scrub(kind, f.arena->base, EXTENT), ops->unmap(kind, f.arena->base, EXTENT));
	assert_int_equal(ops->scrub(kind, f.arena->base, EXTENT), -EIO);
	create(&f, 1); /* fails, and is reported */
	print_message("create on it: %d\n", f.status);
	destroy(&f);
	assert_int_equal(f.account.charged, 0);
	fixture_deinit(&f);
	if (fd >= 0)
		(void)ops->destroy(kind, fd, SIZE);
	ops->unreserve(kind, base, SIZE);
}

static void test_lost_device(void **state)
{
	uint64_t began = loop_now();
	int far;
	pid_t pid = start_other("lose", &far);

	(void)state;
	assert_int_equal(end_of_other(pid), 0);
	print_message("the end of a lost device took %u ms\n", (unsigned)((loop_now() - began) / 1000000));
	assert_true(loop_now() - began < UINT64_C(20000000000));
	assert_int_equal(close(far), 0);
	assert_int_equal(kind_cuda_failed(kind), CUDA_SUCCESS); /* this process goes on */
	test_content_stays_in_the_descriptor(state);
}

/* ---- times ---- */

static void time_size(size_t size)
{
	enum { ROUNDS = 20 };
	uint64_t spent[6] = {0};
	uint8_t *base = ops->reserve(kind, size);

	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t at[7];
		int fd;

		at[0] = loop_now();
		fd = ops->create(kind, size);
		at[1] = loop_now();
		assert_int_equal(ops->map(kind, fd, base, size), 0);
		at[2] = loop_now();
		assert_int_equal(ops->scrub(kind, base, size), 0);
		at[3] = loop_now();
		assert_int_equal(ops->unmap(kind, base, size), 0);
		at[4] = loop_now();
		assert_int_equal(ops->destroy(kind, fd, size), 0);
		at[5] = loop_now();
		for (unsigned j = 0; j < 5; j++)
			spent[j] += at[j + 1] - at[j];
	}
	print_message("%6zu MiB: create %7.1f, map %7.1f, scrub %7.1f, unmap %7.1f, destroy %7.1f us\n", size >> 20,
		(double)spent[0] / ROUNDS / 1e3, (double)spent[1] / ROUNDS / 1e3, (double)spent[2] / ROUNDS / 1e3,
		(double)spent[3] / ROUNDS / 1e3, (double)spent[4] / ROUNDS / 1e3);
	ops->unreserve(kind, base, size);
}

/* What create() and destroy() consist of. */
static void time_calls(size_t size)
{
	enum { ROUNDS = 20 };
	const CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
		.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
		.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ops->device(kind)->device}};
	const CUmemAllocationProp local = {.type = prop.type, .location = prop.location};
	uint64_t spent[6] = {0};

	for (unsigned i = 0; i < ROUNDS; i++) {
		CUmemGenericAllocationHandle handle;
		uint64_t at[7] = {loop_now()};
		int fd;

		cu(driver->cuMemCreate(&handle, size, &prop, 0));
		at[1] = loop_now();
		cu(driver->cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
		at[2] = loop_now();
		cu(driver->cuMemRelease(handle));
		at[3] = loop_now();
		(void)close(fd);
		at[4] = loop_now();
		cu(driver->cuMemCreate(&handle, size, &local, 0));
		at[5] = loop_now();
		cu(driver->cuMemRelease(handle));
		at[6] = loop_now();
		for (unsigned j = 0; j < 6; j++)
			spent[j] += at[j + 1] - at[j];
	}
	print_message("%6zu MiB: cuMemCreate %7.1f, export %7.1f, release %7.1f, close %7.1f us; not for export: "
		      "cuMemCreate %7.1f, release %7.1f us\n",
		size >> 20, (double)spent[0] / ROUNDS / 1e3, (double)spent[1] / ROUNDS / 1e3,
		(double)spent[2] / ROUNDS / 1e3, (double)spent[3] / ROUNDS / 1e3, (double)spent[4] / ROUNDS / 1e3,
		(double)spent[5] / ROUNDS / 1e3);
}

static void test_times(void **state)
{
	(void)state;
	for (size_t size = (size_t)2 << 20; size <= (size_t)1 << 30; size *= 8)
		time_calls(size);
	for (size_t size = (size_t)2 << 20; size <= (size_t)1 << 30; size *= 8)
		time_size(size);
	for (size_t size = (size_t)64 << 30; size <= (size_t)4 << 40; size *= 8) {
		uint64_t at[3] = {loop_now()};
		void *base = ops->reserve(kind, size);

		at[1] = loop_now();
		ops->unreserve(kind, base, size);
		at[2] = loop_now();
		print_message("%6zu GiB of addresses: reserve %.1f us%s, unreserve %.1f us\n", size >> 30,
			(double)(at[1] - at[0]) / 1e3, base ? "" : " (refused)", (double)(at[2] - at[1]) / 1e3);
	}
}

/* Descriptors that the driver opens with the first use of something are not a test's. */
static void warm_up(void)
{
	uint8_t *base = ops->reserve(kind, SIZE);
	int fd = ops->create(kind, SIZE);

	assert_int_equal(ops->map(kind, fd, base, SIZE), 0);
	assert_int_equal(ops->scrub(kind, base, SIZE), 0);
	put_pattern(base, SIZE, 0);
	assert_pattern(base, SIZE, 0);
	assert_int_equal(ops->unmap(kind, base, SIZE), 0);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	ops->unreserve(kind, base, SIZE);
}

static void print_about(void)
{
	const struct kind_device *about = ops->about(kind);
	uint64_t used = 0, began = loop_now();
	int r = ops->usage(kind, &used);

	print_message("%s, driver %s, MPS %s, granularity %zu, %zu MiB, in use %zu MiB (%d, asked in %.1f us)\n",
		about->name, about->driver, about->mps ? "yes" : "no", kind->granularity, (size_t)(about->total >> 20),
		(size_t)(used >> 20), r, (double)(loop_now() - began) / 1e3);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_content_stays_in_the_descriptor),
		cmocka_unit_test(test_born_zero),
		cmocka_unit_test(test_memory_goes_back),
		cmocka_unit_test(test_errors),
		cmocka_unit_test(test_another_process_maps_it),
		cmocka_unit_test(test_pool),
		cmocka_unit_test(test_memory_of_min),
		cmocka_unit_test(test_lost_device),
		cmocka_unit_test(test_times),
	};
	const char *what = argc > 1 ? argv[1] : "";
	uint64_t began = loop_now();
	char text[512];
	int r = kind_cuda_new(0, &kind, text, sizeof(text));

	if (r < 0) {
		print_message("%s\n", text);
		return r == -ENODEV || r == -EOPNOTSUPP ? SKIP : EXIT_FAILURE;
	}
	ops = kind->ops;
	driver = ops->device(kind)->driver;
	r = 0;
	if (strcmp(what, "map") == 0) {
		other_maps();
	} else if (strcmp(what, "lose") == 0) {
		other_loses_the_device();
	} else {
		print_message("opened in %u ms\n", (unsigned)((loop_now() - began) / 1000000));
		print_about();
		if (strcmp(what, "about") != 0) {
			warm_up();
			cmocka_set_test_filter(*what ? what : NULL);
			r = runner_run("kind", tests, sizeof(tests) / sizeof(tests[0]));
		}
	}
	kind = kind_free(kind);
	return r;
}
