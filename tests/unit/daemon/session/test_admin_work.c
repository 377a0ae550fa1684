/* What the operator has done to sequences that their workers have released. */
#include "tests/support/session_fixture.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OFFLOAD KVG__SEQUENCE_WORK__WHAT__OFFLOAD
#define RESTORE KVG__SEQUENCE_WORK__WHAT__RESTORE
#define EVICT   KVG__SEQUENCE_WORK__WHAT__EVICT

struct scene {
	struct session *session;
	struct session_peer *client, *worker;
	Kvg__AdminReply *reply;
	uint64_t id, handle;
};

static struct kvg_cqe submit(struct scene *scene, struct kvg_sqe sqe)
{
	session_submit(scene->worker, &sqe);
	return session_reap(scene->worker);
}

static struct kvg_cqe submit_op(struct scene *scene, uint8_t op)
{
	return submit(scene, (struct kvg_sqe){.op = op, .seq = scene->handle});
}

static int setup(void **state)
{
	struct scene *scene = calloc(1, sizeof(*scene));

	if (!scene)
		return -1;
	scene->session = session_new();
	scene->client = session_connect_admin(scene->session);
	scene->worker = session_connect(scene->session, 0);
	session_hello(scene->worker);
	session_register(scene->worker);
	scene->id = session_worker(scene->session, 0)->id;
	scene->handle =
		submit(scene, (struct kvg_sqe){.op = KVG_OP_CREATE, .create = {.ratio = 1, .prefix_tokens = 100}}).seq;
	(void)submit(scene, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = scene->handle, .reserve.tokens = 100});
	(void)submit(scene, (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = scene->handle, .commit.pos = 100});
	*state = scene;
	return 0;
}

static int teardown(void **state)
{
	struct scene *scene = *state;

	if (scene->reply)
		kvg__admin_reply__free_unpacked(scene->reply, NULL);
	session_peer_free(scene->worker);
	session_peer_free(scene->client);
	session_free(scene->session);
	free(scene);
	return 0;
}

static void send_request(struct scene *scene, Kvg__AdminRequest *request)
{
	uint8_t data[256];
	size_t size;

	request->id = ++scene->client->next_id;
	size = kvg__admin_request__get_packed_size(request);
	assert_true(size <= sizeof(data));
	(void)kvg__admin_request__pack(request, data);
	assert_int_equal(kvg_frame_send(scene->client->fd, data, size, NULL, 0), 0);
}

static Kvg__AdminReply *receive(struct scene *scene)
{
	assert_true(session_receive(scene->client));
	if (scene->reply)
		kvg__admin_reply__free_unpacked(scene->reply, NULL);
	scene->reply = kvg__admin_reply__unpack(NULL, scene->client->frame.size, scene->client->frame.data);
	assert_non_null(scene->reply);
	assert_int_equal(scene->reply->id, scene->client->next_id);
	return scene->reply;
}

static void send_work(struct scene *scene, Kvg__SequenceWork__What what, double ratio)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__SequenceWork work = KVG__SEQUENCE_WORK__INIT;

	work.worker = scene->id;
	work.seq = scene->handle;
	work.what = what;
	work.has_ratio = ratio > 0;
	work.ratio = ratio;
	request.body_case = KVG__ADMIN_REQUEST__BODY_SEQUENCE_WORK;
	request.sequence_work = &work;
	send_request(scene, &request);
}

static const Kvg__SequenceDone *work(struct scene *scene, Kvg__SequenceWork__What what)
{
	send_work(scene, what, 0);
	if (receive(scene)->body_case != KVG__ADMIN_REPLY__BODY_SEQUENCE_DONE)
		fail_msg("%s", scene->reply->error->text);
	return scene->reply->sequence_done;
}

static void refused(struct scene *scene, Kvg__SequenceWork__What what, int status, const char *text)
{
	send_work(scene, what, 0);
	assert_int_equal(receive(scene)->body_case, KVG__ADMIN_REPLY__BODY_ERROR);
	assert_int_equal(scene->reply->error->status, status);
	if (!strstr(scene->reply->error->text, text))
		fail_msg("%s", scene->reply->error->text);
}

static void expect_state(struct scene *scene, const char *state, bool image)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Empty empty = KVG__EMPTY__INIT;

	request.body_case = KVG__ADMIN_REQUEST__BODY_SEQUENCES;
	request.sequences = &empty;
	send_request(scene, &request);
	assert_int_equal(receive(scene)->sequences->n_sequences, 1);
	assert_string_equal(scene->reply->sequences->sequences[0]->state, state);
	assert_int_equal(scene->reply->sequences->sequences[0]->image != 0, image);
}

static void test_there_and_back(void **state)
{
	struct scene *scene = *state;
	const Kvg__SequenceDone *done;
	uint64_t moved;

	expect_state(scene, "active", false);
	refused(scene, OFFLOAD, -EBUSY, "has not released it");
	assert_int_equal(submit_op(scene, KVG_OP_IDLE).status, 0);
	expect_state(scene, "idle", false);
	done = work(scene, OFFLOAD);
	assert_int_equal(done->pairs, 400);
	assert_int_equal(done->bytes, 0);
	assert_true(done->moved > 0);
	moved = done->moved;
	expect_state(scene, "offloaded", true);
	refused(scene, EVICT, -EBUSY, "offloaded");
	done = work(scene, RESTORE);
	assert_int_equal(done->pairs, 400);
	assert_int_equal(done->moved, moved);
	assert_int_equal(done->bytes, moved);
	expect_state(scene, "idle", false);
	assert_int_equal(submit_op(scene, KVG_OP_RESTORE).status, 0);
	expect_state(scene, "active", false);
}

static void test_evict(void **state)
{
	struct scene *scene = *state;

	assert_int_equal(submit_op(scene, KVG_OP_IDLE).status, 0);
	refused(scene, EVICT, -EINVAL, "decode budget 0");
	send_work(scene, EVICT, 1.5);
	assert_int_equal(receive(scene)->error->status, -EINVAL);
	send_work(scene, EVICT, 1);
	assert_int_equal(receive(scene)->sequence_done->moved, 0);
	assert_int_equal(scene->reply->sequence_done->pairs, 400);
}

static void test_who_there_is_not(void **state)
{
	struct scene *scene = *state;

	scene->handle++;
	refused(scene, OFFLOAD, -ENOENT, "no such sequence");
	scene->handle--;
	scene->id++;
	refused(scene, OFFLOAD, -ENOENT, "no such worker");
	scene->id--;
}

/* The reason is the sequence's own. */
static void test_no_room(void **state)
{
	struct scene *scene = *state;

	scene->session->server.tenants[0]->host.account->max = 0;
	assert_int_equal(submit_op(scene, KVG_OP_IDLE).status, 0);
	refused(scene, OFFLOAD, -ENOSPC, "tenant a: host budget 0 B");
}

static bool works_are_over(struct session *session)
{
	return list_empty(&session->admin.works) && list_empty(&session->admin.peers);
}

static bool operator_has_gone(struct session *session)
{
	return list_empty(&session->admin.peers);
}

static bool work_is_taken(struct session *session)
{
	return !list_empty(&session->admin.works);
}

/* Keeps the executor busy until the test says so: nothing that is begun meanwhile ends. */
struct gate {
	struct job job;
	int fds[2];
	bool passed;
};

static void gate_run(struct job *job)
{
	char byte;

	while (read(list_entry(job, struct gate, job)->fds[0], &byte, 1) < 0)
		;
}

static void gate_done(struct job *job)
{
	list_entry(job, struct gate, job)->passed = true;
}

static void gate_close(struct scene *scene, struct gate *gate)
{
	*gate = (struct gate){.job = {.run = gate_run, .done = gate_done}};
	assert_int_equal(pipe(gate->fds), 0);
	executor_submit(scene->session->server.executor, &gate->job);
}

static bool is_passed(struct session *session)
{
	return ((const struct gate *)session->user)->passed;
}

static void gate_open(struct scene *scene, struct gate *gate)
{
	assert_int_equal(write(gate->fds[1], "", 1), 1);
	session_run(scene->session, is_passed, gate);
	assert_int_equal(close(gate->fds[0]), 0);
	assert_int_equal(close(gate->fds[1]), 0);
}

/* The operator has gone before the work is done: it is done all the same. */
static void test_operator_goes(void **state)
{
	struct scene *scene = *state;
	struct gate gate;

	assert_int_equal(submit_op(scene, KVG_OP_IDLE).status, 0);
	gate_close(scene, &gate);
	send_work(scene, OFFLOAD, 0);
	session_run(scene->session, work_is_taken, NULL);
	session_peer_free(scene->client);
	scene->client = NULL;
	session_run(scene->session, operator_has_gone, NULL);
	gate_open(scene, &gate);
	session_run(scene->session, works_are_over, NULL);
	scene->client = session_connect_admin(scene->session);
	expect_state(scene, "offloaded", true);
}

static bool is_closing(struct session *session)
{
	return session->server.worker_count == 0 || session_worker(session, 0)->closing;
}

/* The worker is taken down, and then what is under way ends. */
static void refused_late(struct scene *scene, struct gate *gate)
{
	session_run(scene->session, is_closing, NULL);
	assert_false(list_empty(&scene->session->admin.works));
	gate_open(scene, gate);
	assert_int_equal(receive(scene)->body_case, KVG__ADMIN_REPLY__BODY_ERROR);
}

/* The worker has: the operator is told. */
static void test_worker_goes(void **state)
{
	struct scene *scene = *state;
	struct gate gate;

	assert_int_equal(submit_op(scene, KVG_OP_IDLE).status, 0);
	gate_close(scene, &gate);
	send_work(scene, OFFLOAD, 0);
	session_run(scene->session, work_is_taken, NULL);
	worker_kill(session_worker(scene->session, 0), NULL);
	refused_late(scene, &gate);
	assert_int_equal(scene->reply->error->status, -ECANCELED);
	assert_non_null(strstr(scene->reply->error->text, "its worker has gone"));
	session_wait_empty(scene->session);
	refused(scene, OFFLOAD, -ENOENT, "no such worker");
}

#define WORK_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WORK_TEST(test_there_and_back),
		WORK_TEST(test_evict),
		WORK_TEST(test_who_there_is_not),
		WORK_TEST(test_no_room),
		WORK_TEST(test_operator_goes),
		WORK_TEST(test_worker_goes),
	};

	return runner_run("daemon/session/admin_work", tests, sizeof(tests) / sizeof(tests[0]));
}
