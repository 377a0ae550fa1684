#include "tools/ctl/admin.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/runner.h"
#include "tests/unit/tools/ctl/fake_daemon.h"

#define LONG_MS  60000 /* never reached */
#define SHORT_MS 50

/* Asks a fake daemon for its status. */
static int ask(struct fake_daemon *fake, int timeout_ms, Kvg__AdminReply **ret, char text[ADMIN_TEXT])
{
	Kvg__Empty empty = KVG__EMPTY__INIT;
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	int r;

	request.id = 4;
	request.body_case = KVG__ADMIN_REQUEST__BODY_STATUS;
	request.status = &empty;
	r = admin_call(fake->path, &request, timeout_ms, ret, text);
	fake_daemon_stop(fake);
	return r;
}

/* The call fails with status, and the text says so. */
static void assert_fails(
	enum fake_answer answer, const Kvg__AdminReply *reply, int timeout_ms, int status, const char *reason)
{
	struct fake_daemon fake;
	Kvg__AdminReply *got = NULL;
	char text[ADMIN_TEXT] = "";

	fake_daemon_start(&fake, answer, reply);
	assert_int_equal(ask(&fake, timeout_ms, &got, text), status);
	assert_null(got);
	if (!strstr(text, reason))
		fail_msg("'%s' is not in '%s'", reason, text);
	fake_daemon_deinit(&fake);
}

static void test_answer(void **state)
{
	char tenant[] = "search";
	Kvg__Budget budget = KVG__BUDGET__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT, *got = NULL;
	struct fake_daemon fake;
	char text[ADMIN_TEXT];

	(void)state;
	budget.tenant = tenant;
	budget.charged = 42;
	reply.body_case = KVG__ADMIN_REPLY__BODY_BUDGET;
	reply.budget = &budget;
	fake_daemon_start(&fake, FAKE_REPLY, &reply);
	assert_int_equal(ask(&fake, LONG_MS, &got, text), 0);
	assert_int_equal(fake.request->body_case, KVG__ADMIN_REQUEST__BODY_STATUS);
	assert_int_equal(got->budget->charged, 42);
	kvg__admin_reply__free_unpacked(got, NULL);
	fake_daemon_deinit(&fake);
}

static void test_answer_in_a_memfd(void **state)
{
	char *name = malloc(KVG_FRAME_MAX + 1);
	Kvg__Budget budget = KVG__BUDGET__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT, *got = NULL;
	struct fake_daemon fake;
	char text[ADMIN_TEXT];

	(void)state;
	assert_non_null(name);
	memset(name, 'n', KVG_FRAME_MAX);
	name[KVG_FRAME_MAX] = '\0';
	budget.tenant = name;
	reply.body_case = KVG__ADMIN_REPLY__BODY_BUDGET;
	reply.budget = &budget;
	fake_daemon_start(&fake, FAKE_REPLY, &reply);
	assert_int_equal(ask(&fake, LONG_MS, &got, text), 0);
	assert_int_equal(strlen(got->budget->tenant), KVG_FRAME_MAX);
	kvg__admin_reply__free_unpacked(got, NULL);
	fake_daemon_deinit(&fake);
	free(name);
}

static void test_error_reply(void **state)
{
	char reason[] = "tenant search: no such tenant";
	Kvg__Error error = KVG__ERROR__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	(void)state;
	error.status = -ENOENT;
	error.text = reason;
	reply.body_case = KVG__ADMIN_REPLY__BODY_ERROR;
	reply.error = &error;
	assert_fails(FAKE_REPLY, &reply, LONG_MS, -ENOENT, reason);
	error.status = 0;
	assert_fails(FAKE_REPLY, &reply, LONG_MS, -EPROTO, reason);
}

static void test_answer_to_another_request(void **state)
{
	Kvg__TenantList tenants = KVG__TENANT_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	(void)state;
	reply.id = 9;
	reply.body_case = KVG__ADMIN_REPLY__BODY_TENANTS;
	reply.tenants = &tenants;
	assert_fails(FAKE_VERBATIM, &reply, LONG_MS, -EPROTO, "an answer to request 9, asked was 4");
}

static void test_no_answer(void **state)
{
	(void)state;
	assert_fails(FAKE_GARBAGE, NULL, LONG_MS, -EBADMSG, "an answer of 3 bytes is not an AdminReply");
	assert_fails(FAKE_HANG_UP, NULL, LONG_MS, -EPIPE, "hung up without an answer");
	assert_fails(FAKE_SILENCE, NULL, SHORT_MS, -ETIMEDOUT, "no answer within 50 ms");
	assert_fails(FAKE_FULL, NULL, SHORT_MS, -ETIMEDOUT, "not accepted within 50 ms");
}

static void test_no_daemon(void **state)
{
	char dir[] = "/tmp/kvgatectl-XXXXXX", path[64], text[ADMIN_TEXT] = "";
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__AdminReply *got = NULL;

	(void)state;
	assert_non_null(mkdtemp(dir));
	(void)snprintf(path, sizeof(path), "%s/admin.sock", dir);
	assert_int_equal(admin_call(path, &request, LONG_MS, &got, text), -ENOENT);
	assert_non_null(strstr(text, path));
	assert_null(got);
	assert_int_equal(rmdir(dir), 0);
}

static void test_path_too_long(void **state)
{
	char path[109], text[ADMIN_TEXT] = "";
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__AdminReply *got = NULL;

	(void)state;
	memset(path, 'p', sizeof(path));
	path[108] = '\0';
	assert_int_equal(admin_call(path, &request, LONG_MS, &got, text), -ENAMETOOLONG);
	assert_non_null(strstr(text, "the path has 108 bytes, allowed are 1 to 107"));
	path[107] = '\0';
	assert_int_equal(admin_call(path, &request, LONG_MS, &got, text), -ENOENT);
	assert_int_equal(admin_call("", &request, LONG_MS, &got, text), -ENAMETOOLONG);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_answer),
		cmocka_unit_test(test_answer_in_a_memfd),
		cmocka_unit_test(test_error_reply),
		cmocka_unit_test(test_answer_to_another_request),
		cmocka_unit_test(test_no_answer),
		cmocka_unit_test(test_no_daemon),
		cmocka_unit_test(test_path_too_long),
	};

	return runner_run("tools/ctl/admin", tests, sizeof(tests) / sizeof(*tests));
}
