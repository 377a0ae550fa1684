#include "tools/ctl/command.h"

#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"

static const struct command *find(const char *name)
{
	size_t count;
	const struct command *table = command_table(&count);

	for (size_t i = 0; i < count; i++)
		if (!strcmp(table[i].name, name))
			return &table[i];
	fail_msg("no command %s", name);
	return NULL;
}

/* What the daemon would read of the request that a command makes. Owned. */
static Kvg__AdminRequest *request_sent(const char *name, const struct command_arguments *arguments)
{
	struct command_request request;
	Kvg__AdminRequest *read;
	uint8_t data[256];
	size_t size;

	command_request(find(name), arguments, &request);
	assert_true(kvg__admin_request__get_packed_size(&request.message) <= sizeof(data));
	size = kvg__admin_request__pack(&request.message, data);
	read = kvg__admin_request__unpack(NULL, size, data);
	assert_non_null(read);
	return read;
}

static void test_requests(void **state)
{
	const struct command_arguments arguments = {.tenant = "search",
		.budget_set = {true, false, true, false, true, false},
		.budget = {1, 2, UINT64_C(5) << 30, 4, 5, 6},
		.worker = 8,
		.seq = UINT64_C(9) << 32,
		.has_ratio = true,
		.ratio = 0.5,
		.has_bytes = true,
		.bytes = 10,
		.context = 11};
	size_t count;
	const struct command *table = command_table(&count);
	Kvg__AdminRequest *request;

	(void)state;
	for (size_t i = 0; i < count; i++) {
		request = request_sent(table[i].name, &arguments);
		assert_int_equal(request->body_case, table[i].request);
		kvg__admin_request__free_unpacked(request, NULL);
	}
	request = request_sent("budget get", &arguments);
	assert_string_equal(request->budget_get->tenant, "search");
	kvg__admin_request__free_unpacked(request, NULL);
	request = request_sent("budget set", &arguments);
	assert_string_equal(request->budget_set->tenant, "search");
	assert_true(request->budget_set->has_device_min && request->budget_set->has_device_max);
	assert_true(request->budget_set->has_host_high && !request->budget_set->has_host_max);
	assert_false(request->budget_set->has_device_high || request->budget_set->has_host_min);
	assert_int_equal(request->budget_set->device_min, 1);
	assert_int_equal(request->budget_set->device_max, UINT64_C(5) << 30);
	assert_int_equal(request->budget_set->host_high, 5);
	kvg__admin_request__free_unpacked(request, NULL);
	request = request_sent("budget reset", &arguments);
	assert_string_equal(request->budget_reset->tenant, "search");
	kvg__admin_request__free_unpacked(request, NULL);
	request = request_sent("reclaim", &arguments);
	assert_string_equal(request->reclaim->tenant, "search");
	assert_true(request->reclaim->has_bytes);
	assert_int_equal(request->reclaim->bytes, 10);
	kvg__admin_request__free_unpacked(request, NULL);
	request = request_sent("contexts drop", &arguments);
	assert_string_equal(request->context_drop->tenant, "search");
	assert_int_equal(request->context_drop->context, 11);
	kvg__admin_request__free_unpacked(request, NULL);
	request = request_sent("recall", &arguments);
	assert_int_equal(request->sequence_work->what, KVG__SEQUENCE_WORK__WHAT__RECALL);
	assert_int_equal(request->sequence_work->worker, 8);
	assert_int_equal(request->sequence_work->seq, UINT64_C(9) << 32);
	assert_true(request->sequence_work->has_ratio && request->sequence_work->ratio == 0.5);
	assert_false(request->sequence_work->has_budget);
	kvg__admin_request__free_unpacked(request, NULL);
	request = request_sent("restore", &arguments);
	assert_int_equal(request->sequence_work->what, KVG__SEQUENCE_WORK__WHAT__RESTORE);
	kvg__admin_request__free_unpacked(request, NULL);
}

static void test_answer_of_another_kind(void **state)
{
	Kvg__Budget budget = KVG__BUDGET__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	(void)state;
	assert_null(command_answer(find("status"), &reply));
	reply.body_case = KVG__ADMIN_REPLY__BODY_BUDGET;
	reply.budget = &budget;
	assert_null(command_answer(find("status"), &reply));
	assert_ptr_equal(command_answer(find("budget get"), &reply), &budget.base);
	assert_ptr_equal(command_answer(find("budget set"), &reply), &budget.base);
}

/* Owned text of an answer. */
static char *printed(const char *name, const ProtobufCMessage *answer)
{
	char *text = NULL;
	size_t size;
	FILE *out = open_memstream(&text, &size);

	assert_non_null(out);
	assert_int_equal(command_print(out, find(name), answer), 0);
	assert_int_equal(fclose(out), 0);
	return text;
}

static void assert_printed(const char *name, const ProtobufCMessage *answer, const char *const *expected)
{
	char *text = printed(name, answer);

	for (; *expected; expected++)
		if (!strstr(text, *expected))
			fail_msg("%s: '%s' is missing in:\n%s", name, *expected, text);
	free(text);
}

static void assert_not_printed(const char *name, const ProtobufCMessage *answer, const char *what)
{
	char *text = printed(name, answer);

	assert_null(strstr(text, what));
	free(text);
}

/* Every column of every table names a field that is there and fits: printing fails else. */
static void test_every_table(void **state)
{
	char name[] = "search", socket[] = "/run/kvgate/search.sock", model[] = "pilot", version[] = "9.8.7";
	Kvg__Status status = KVG__STATUS__INIT;
	Kvg__Tenant tenant = KVG__TENANT__INIT, *tenants[] = {&tenant};
	Kvg__Worker worker = KVG__WORKER__INIT, *workers[] = {&worker};
	Kvg__Sequence sequence = KVG__SEQUENCE__INIT, *sequences[] = {&sequence};
	Kvg__TenantList tenant_list = KVG__TENANT_LIST__INIT;
	Kvg__WorkerList worker_list = KVG__WORKER_LIST__INIT;
	Kvg__SequenceList sequence_list = KVG__SEQUENCE_LIST__INIT;
	Kvg__Budget budget = KVG__BUDGET__INIT;
	Kvg__Context context = KVG__CONTEXT__INIT, *contexts[] = {&context};
	Kvg__ContextList context_list = KVG__CONTEXT_LIST__INIT;
	Kvg__SequenceDone done = KVG__SEQUENCE_DONE__INIT;
	Kvg__Reclaimed reclaimed = KVG__RECLAIMED__INIT;
	Kvg__ContextDropped dropped = KVG__CONTEXT_DROPPED__INIT;
	uint8_t key[32] = {0xde, 0xad, 0, 1, 2, 3, 4, 0xff, 0x77};

	(void)state;
	status.version = version;
	status.kind = model;
	status.state_dir = socket;
	status.charged = 5 << 20;
	assert_printed("status", &status.base,
		(const char *const[]){
			"version         9.8.7\n", "state directory /run/kvgate/search.sock\n", "5.0 MiB\n", NULL});
	status.device = model;
	status.isolation = name;
	status.has_mps = status.has_device_total = status.mps = 1;
	status.device_total = UINT64_C(80) << 30;
	assert_printed("status", &status.base,
		(const char *const[]){"device          pilot\n", "device memory   80.0 GiB\n", "MPS client      yes\n",
			"isolation       search\n", NULL});
	assert_not_printed("status", &status.base, "device in use");
	assert_not_printed("status", &status.base, "driver");
	tenant.name = name;
	tenant.socket = socket;
	tenant.refusals = 4711;
	tenant_list.tenants = tenants;
	tenant_list.n_tenants = 1;
	assert_printed("tenants", &tenant_list.base, (const char *const[]){"DEVICE.MAX", "search", "4711", NULL});
	worker.tenant = name;
	worker.name = name;
	worker.model = model;
	worker.pid = 4242;
	worker_list.workers = workers;
	worker_list.n_workers = 1;
	assert_printed("workers", &worker_list.base, (const char *const[]){"SUBMITTED", "4242", "pilot", NULL});
	sequence.tenant = name;
	sequence.seq = (UINT64_C(3) << 32) | 1;
	sequence_list.sequences = sequences;
	sequence_list.n_sequences = 1;
	assert_printed("sequences", &sequence_list.base, (const char *const[]){"EPOCH:SLOT", "3:1", "pair", NULL});
	budget.tenant = name;
	assert_printed("budget get", &budget.base, (const char *const[]){"device.max 0 B\n", NULL});
	assert_not_printed("budget get", &budget.base, "device.high");
	budget.has_device_high = budget.has_live = budget.live = 1;
	budget.device_high = 1024;
	budget.standing = name;
	assert_printed("budget set", &budget.base,
		(const char *const[]){"device.high 1.0 KiB\n", "set live    yes\n", "in the way  search\n", NULL});
	context.tenant = context.state = name;
	context.model = model;
	context.key = (ProtobufCBinaryData){.data = key, .len = sizeof(key)};
	context_list.contexts = contexts;
	context_list.n_contexts = 1;
	assert_printed(
		"contexts", &context_list.base, (const char *const[]){"ATTACHED", " dead0001020304ff ", "pilot", NULL});
	done.moved = 2048;
	assert_printed("evict", &done.base, (const char *const[]){"pairs dropped 2048\n", NULL});
	assert_printed("recall", &done.base, (const char *const[]){"pairs recalled 2048\n", NULL});
	assert_printed("offload", &done.base, (const char *const[]){"moved      2.0 KiB\n", NULL});
	assert_printed("restore", &done.base, (const char *const[]){"moved      2.0 KiB\n", NULL});
	reclaimed.device_bytes = 3 << 20;
	assert_printed("reclaim", &reclaimed.base, (const char *const[]){"given back  3.0 MiB\n", NULL});
	dropped.host_bytes = 3 << 20;
	assert_printed("contexts drop", &dropped.base, (const char *const[]){"of the host   3.0 MiB\n", NULL});
}

static void test_empty_lists(void **state)
{
	Kvg__WorkerList workers = KVG__WORKER_LIST__INIT;
	char *text = printed("workers", &workers.base);

	(void)state;
	assert_string_equal(text, "no workers\n");
	free(text);
}

static void test_audit_verdict(void **state)
{
	char tenant[] = "a", first[] = "tenant a: charged 1, counted 2", second[] = "extent 7: not on disk";
	char *differences[] = {first, second};
	Kvg__AuditRow row = KVG__AUDIT_ROW__INIT, *rows[] = {&row};
	Kvg__Audit audit = KVG__AUDIT__INIT;

	(void)state;
	row.tenant = tenant;
	row.physical = 262144;
	audit.rows = rows;
	audit.n_rows = 1;
	audit.clean = 1;
	assert_printed("audit", &audit.base, (const char *const[]){"PHYSICAL", "262144", "\nclean\n", NULL});
	audit.clean = 0;
	audit.differences = differences;
	audit.n_differences = 2;
	assert_printed("audit", &audit.base,
		(const char *const[]){"difference: tenant a: charged 1, counted 2\n",
			"difference: extent 7: not on disk\n", "not clean: 2 differences\n", NULL});
}

static void test_json(void **state)
{
	char tenant[] = "a";
	Kvg__Budget budget = KVG__BUDGET__INIT;
	char *text = NULL;
	size_t size;
	FILE *out = open_memstream(&text, &size);

	(void)state;
	budget.tenant = tenant;
	budget.device_max = 7;
	assert_int_equal(command_print_json(out, &budget.base), 0);
	assert_int_equal(fclose(out), 0);
	assert_string_equal(
		text, "{\n  \"tenant\": \"a\",\n  \"device_max\": 7,\n  \"charged\": 0,\n  \"promised\": 0\n}\n");
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_requests),
		cmocka_unit_test(test_answer_of_another_kind),
		cmocka_unit_test(test_every_table),
		cmocka_unit_test(test_empty_lists),
		cmocka_unit_test(test_audit_verdict),
		cmocka_unit_test(test_json),
	};

	return runner_run("tools/ctl/command", tests, sizeof(tests) / sizeof(*tests));
}
