#include "tools/ctl/command.h"

#include <errno.h>
#include <stdlib.h>

#include "tools/ctl/fields.h"
#include "tools/ctl/json.h"

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

static const struct column status_columns[] = {
	{"version", "version", COLUMN_TEXT},
	{"pid", "pid", COLUMN_COUNT},
	{"uptime_ms", "uptime", COLUMN_DURATION},
	{"state_dir", "state directory", COLUMN_TEXT},
	{"kind", "memory kind", COLUMN_TEXT},
	{"device", "device", COLUMN_TEXT},
	{"driver", "driver", COLUMN_TEXT},
	{"device_total", "device memory", COLUMN_SIZE},
	{"device_used", "device in use", COLUMN_SIZE},
	{"mps", "MPS client", COLUMN_FLAG},
	{"isolation", "isolation", COLUMN_TEXT},
	{"pool_size", "pool", COLUMN_SIZE},
	{"charged", "charged", COLUMN_SIZE},
	{"promised", "promised", COLUMN_SIZE},
	{"unreturned", "unreturned", COLUMN_SIZE},
	{"reserved", "reserved", COLUMN_SIZE},
	{"overhead", "overhead", COLUMN_SIZE},
	{"host_size", "host tier", COLUMN_SIZE},
	{"host_charged", "on the host", COLUMN_SIZE},
	{"extent_size", "extent size", COLUMN_SIZE},
	{"extents", "extents", COLUMN_COUNT},
	{"workers", "workers", COLUMN_COUNT},
	{"sequences", "sequences", COLUMN_COUNT},
	{"contexts", "contexts", COLUMN_COUNT},
};

/* What holds; the marks at which reclaim begins are in `budget get` and in JSON. */
static const struct column tenant_columns[] = {
	{"name", "TENANT", COLUMN_TEXT},
	{"device_min", "DEVICE.MIN", COLUMN_SIZE},
	{"device_max", "DEVICE.MAX", COLUMN_SIZE},
	{"charged", "CHARGED", COLUMN_SIZE},
	{"promised", "PROMISED", COLUMN_SIZE},
	{"reserved", "RESERVED", COLUMN_SIZE},
	{"unreturned", "UNRETURNED", COLUMN_SIZE},
	{"high_water", "HIGH-WATER", COLUMN_SIZE},
	{"host_max", "HOST.MAX", COLUMN_SIZE},
	{"host_charged", "ON-HOST", COLUMN_SIZE},
	{"workers", "WORKERS", COLUMN_COUNT},
	{"sequences", "SEQUENCES", COLUMN_COUNT},
	{"contexts", "CONTEXTS", COLUMN_COUNT},
	{"refusals", "REFUSALS", COLUMN_COUNT},
	{"socket", "SOCKET", COLUMN_TEXT},
};

static const struct column worker_columns[] = {
	{"id", "WORKER", COLUMN_COUNT},
	{"tenant", "TENANT", COLUMN_TEXT},
	{"name", "NAME", COLUMN_TEXT},
	{"pid", "PID", COLUMN_COUNT},
	{"uid", "UID", COLUMN_COUNT},
	{"model", "MODEL", COLUMN_TEXT},
	{"extents", "EXTENTS", COLUMN_COUNT},
	{"charged", "CHARGED", COLUMN_SIZE},
	{"unreturned", "UNRETURNED", COLUMN_SIZE},
	{"overhead", "OVERHEAD", COLUMN_SIZE},
	{"sequences", "SEQUENCES", COLUMN_COUNT},
	{"blocks", "BLOCKS", COLUMN_COUNT},
	{"submitted", "SUBMITTED", COLUMN_COUNT},
	{"errors", "ERRORS", COLUMN_COUNT},
};

static const struct column sequence_columns[] = {
	{"worker", "WORKER", COLUMN_COUNT},
	{"seq", "EPOCH:SLOT", COLUMN_HANDLE},
	{"tenant", "TENANT", COLUMN_TEXT},
	{"generation", "GENERATION", COLUMN_COUNT},
	{"committed_pos", "COMMITTED", COLUMN_COUNT},
	{"reserved_pos", "RESERVED", COLUMN_COUNT},
	{"pairs", "PAIRS", COLUMN_COUNT},
	{"blocks", "BLOCKS", COLUMN_COUNT},
	{"bytes", "SIZE", COLUMN_SIZE},
	{"promised", "PROMISED", COLUMN_SIZE},
	{"ratio", "RATIO", COLUMN_RATIO},
	{"level", "LEVEL", COLUMN_LEVEL},
	{"evictions", "EVICTIONS", COLUMN_COUNT},
	{"state", "STATE", COLUMN_TEXT},
};

static const struct column context_columns[] = {
	{"id", "CONTEXT", COLUMN_COUNT},
	{"tenant", "TENANT", COLUMN_TEXT},
	{"key", "KEY", COLUMN_KEY},
	{"model", "MODEL", COLUMN_TEXT},
	{"tokens", "TOKENS", COLUMN_COUNT},
	{"pairs", "PAIRS", COLUMN_COUNT},
	{"bytes", "SIZE", COLUMN_SIZE},
	{"attached", "ATTACHED", COLUMN_COUNT},
	{"workers", "WORKERS", COLUMN_COUNT},
	{"state", "STATE", COLUMN_TEXT},
	{"image", "ON-HOST", COLUMN_SIZE},
};

/* Exact counts: the audit is about single bytes. */
static const struct column audit_columns[] = {
	{"tenant", "TENANT", COLUMN_TEXT},
	{"extents", "EXTENTS", COLUMN_COUNT},
	{"blocks", "BLOCKS", COLUMN_COUNT},
	{"extent_bytes", "COUNTED", COLUMN_COUNT},
	{"charged", "CHARGED", COLUMN_COUNT},
	{"reserved", "RESERVED", COLUMN_COUNT},
	{"physical", "PHYSICAL", COLUMN_COUNT},
	{"host_counted", "HOST-COUNTED", COLUMN_COUNT},
	{"host_charged", "HOST-CHARGED", COLUMN_COUNT},
};

static const struct column budget_columns[] = {
	{"tenant", "tenant", COLUMN_TEXT},
	{"device_min", "device.min", COLUMN_SIZE},
	{"device_high", "device.high", COLUMN_SIZE},
	{"device_max", "device.max", COLUMN_SIZE},
	{"charged", "charged", COLUMN_SIZE},
	{"promised", "promised", COLUMN_SIZE},
	{"unreturned", "unreturned", COLUMN_SIZE},
	{"host_min", "host.min", COLUMN_SIZE},
	{"host_high", "host.high", COLUMN_SIZE},
	{"host_max", "host.max", COLUMN_SIZE},
	{"host_charged", "on the host", COLUMN_SIZE},
	{"live", "set live", COLUMN_FLAG},
	{"standing", "in the way", COLUMN_TEXT},
};

static const struct column reclaim_columns[] = {
	{"device_bytes", "given back", COLUMN_SIZE},
	{"host_bytes", "on the host", COLUMN_SIZE},
	{"contexts", "contexts", COLUMN_COUNT},
	{"sequences", "sequences", COLUMN_COUNT},
};

static const struct column drop_columns[] = {
	{"device_bytes", "of the device", COLUMN_SIZE},
	{"host_bytes", "of the host", COLUMN_SIZE},
};

static const struct column evict_columns[] = {
	{"moved", "pairs dropped", COLUMN_COUNT},
	{"pairs", "pairs held", COLUMN_COUNT},
	{"bytes", "blocks", COLUMN_SIZE},
};

static const struct column recall_columns[] = {
	{"moved", "pairs recalled", COLUMN_COUNT},
	{"pairs", "pairs held", COLUMN_COUNT},
	{"bytes", "blocks", COLUMN_SIZE},
};

static const struct column move_columns[] = {
	{"moved", "moved", COLUMN_SIZE},
	{"pairs", "pairs held", COLUMN_COUNT},
	{"bytes", "blocks", COLUMN_SIZE},
};

#define LIST(list, empty, columns) list, empty, columns, COUNT(columns)
#define RECORD(columns)            NULL, NULL, columns, COUNT(columns)
#define BODY(request, reply)       KVG__ADMIN_REQUEST__BODY_##request, KVG__ADMIN_REPLY__BODY_##reply
#define SEQUENCE(form, what, columns)                                                                                  \
	form, BODY(SEQUENCE_WORK, SEQUENCE_DONE), RECORD(columns), KVG__SEQUENCE_WORK__WHAT__##what, true

static const struct command commands[] = {
	{"status", "", "the daemon, its pool and what is in use", FORM_NONE, BODY(STATUS, STATUS),
		RECORD(status_columns), 0, false},
	{"tenants", "", "each tenant with its budget and use", FORM_NONE, BODY(TENANTS, TENANTS),
		LIST("tenants", "no tenants", tenant_columns), 0, false},
	{"workers", "", "each connected worker process", FORM_NONE, BODY(WORKERS, WORKERS),
		LIST("workers", "no workers", worker_columns), 0, false},
	{"sequences", "", "each sequence with what it holds", FORM_NONE, BODY(SEQUENCES, SEQUENCES),
		LIST("sequences", "no sequences", sequence_columns), 0, false},
	{"contexts", "", "each published context with what it holds", FORM_NONE, BODY(CONTEXTS, CONTEXTS),
		LIST("contexts", "no contexts", context_columns), 0, false},
	{"contexts drop", "TENANT CONTEXT", "forget one that no sequence uses", FORM_CONTEXT,
		BODY(CONTEXT_DROP, CONTEXT_DROPPED), RECORD(drop_columns), 0, false},
	{"audit", "", "recount every byte from the extents up; fails on any difference", FORM_NONE, BODY(AUDIT, AUDIT),
		LIST("rows", "no tenants", audit_columns), 0, false},
	{"budget get", "TENANT", "a tenant's budget", FORM_TENANT, BODY(BUDGET_GET, BUDGET), RECORD(budget_columns), 0,
		false},
	{"budget set", "TENANT KEY=SIZE...", "change it, also after a restart, until it is reset", FORM_BUDGET,
		BODY(BUDGET_SET, BUDGET), RECORD(budget_columns), 0, true},
	{"budget reset", "TENANT", "back to the configuration's values", FORM_TENANT, BODY(BUDGET_RESET, BUDGET),
		RECORD(budget_columns), 0, true},
	{"reclaim", "TENANT [SIZE]", "send what nobody uses to the host, oldest first", FORM_RECLAIM,
		BODY(RECLAIM, RECLAIMED), RECORD(reclaim_columns), 0, true},
	{"evict", "WORKER SEQ [--ratio R]", "evict an idle sequence", SEQUENCE(FORM_EVICT, EVICT, evict_columns)},
	{"recall", "WORKER SEQ --ratio R|--budget N", "bring evicted pairs back",
		SEQUENCE(FORM_RECALL, RECALL, recall_columns)},
	{"offload", "WORKER SEQ", "send an idle sequence to the host", SEQUENCE(FORM_SEQUENCE, OFFLOAD, move_columns)},
	{"restore", "WORKER SEQ", "bring it back", SEQUENCE(FORM_SEQUENCE, RESTORE, move_columns)},
};

const char *command_budget_key(size_t index)
{
	static const char *const keys[COMMAND_BUDGETS] = {
		"device.min", "device.high", "device.max", "host.min", "host.high", "host.max"};

	return keys[index];
}

const struct command *command_table(size_t *ret_count)
{
	*ret_count = COUNT(commands);
	return commands;
}

static void fill_budget(const struct command_arguments *arguments, Kvg__BudgetSet *ret)
{
	kvg__budget_set__init(ret);
	ret->tenant = (char *)(uintptr_t)arguments->tenant;
	ret->has_device_min = arguments->budget_set[0];
	ret->has_device_high = arguments->budget_set[1];
	ret->has_device_max = arguments->budget_set[2];
	ret->has_host_min = arguments->budget_set[3];
	ret->has_host_high = arguments->budget_set[4];
	ret->has_host_max = arguments->budget_set[5];
	ret->device_min = arguments->budget[0];
	ret->device_high = arguments->budget[1];
	ret->device_max = arguments->budget[2];
	ret->host_min = arguments->budget[3];
	ret->host_high = arguments->budget[4];
	ret->host_max = arguments->budget[5];
}

static void fill_work(const struct command *command, const struct command_arguments *arguments, Kvg__SequenceWork *ret)
{
	kvg__sequence_work__init(ret);
	ret->worker = arguments->worker;
	ret->seq = arguments->seq;
	ret->what = command->what;
	ret->has_ratio = arguments->has_ratio;
	ret->ratio = arguments->ratio;
	ret->has_budget = arguments->has_tokens;
	ret->budget = arguments->tokens;
}

void command_request(
	const struct command *command, const struct command_arguments *arguments, struct command_request *ret)
{
	kvg__admin_request__init(&ret->message);
	ret->message.id = 1;
	ret->message.body_case = command->request;

	switch (command->request) {
	case KVG__ADMIN_REQUEST__BODY_BUDGET_GET:
	case KVG__ADMIN_REQUEST__BODY_BUDGET_RESET:
		kvg__budget_key__init(&ret->body.budget_key);
		ret->body.budget_key.tenant = (char *)(uintptr_t)arguments->tenant;
		ret->message.budget_get = &ret->body.budget_key; /* one union: it is budget_reset, too */
		break;
	case KVG__ADMIN_REQUEST__BODY_BUDGET_SET:
		fill_budget(arguments, &ret->body.budget_set);
		ret->message.budget_set = &ret->body.budget_set;
		break;
	case KVG__ADMIN_REQUEST__BODY_RECLAIM:
		kvg__reclaim__init(&ret->body.reclaim);
		ret->body.reclaim.tenant = (char *)(uintptr_t)arguments->tenant;
		ret->body.reclaim.has_bytes = arguments->has_bytes;
		ret->body.reclaim.bytes = arguments->bytes;
		ret->message.reclaim = &ret->body.reclaim;
		break;
	case KVG__ADMIN_REQUEST__BODY_CONTEXT_DROP:
		kvg__context_drop__init(&ret->body.context_drop);
		ret->body.context_drop.tenant = (char *)(uintptr_t)arguments->tenant;
		ret->body.context_drop.context = arguments->context;
		ret->message.context_drop = &ret->body.context_drop;
		break;
	case KVG__ADMIN_REQUEST__BODY_SEQUENCE_WORK:
		fill_work(command, arguments, &ret->body.sequence_work);
		ret->message.sequence_work = &ret->body.sequence_work;
		break;
	default:
		/* every other body is Empty and shares the union's pointer */
		kvg__empty__init(&ret->body.empty);
		ret->message.status = &ret->body.empty;
		break;
	}
}

const ProtobufCMessage *command_answer(const struct command *command, const Kvg__AdminReply *reply)
{
	return reply->body_case == command->reply ? &reply->status->base : NULL;
}

/* The audit's verdict, below its table. */
static int print_audit(FILE *out, const ProtobufCMessage *answer)
{
	const Kvg__Audit *audit = (const Kvg__Audit *)(const void *)answer;
	int n;

	for (size_t i = 0; i < audit->n_differences; i++)
		if (fprintf(out, "difference: %s\n", audit->differences[i]) < 0)
			return -EIO;
	if (audit->clean)
		n = fprintf(out, "clean\n");
	else
		n = fprintf(out, "not clean: %zu differences\n", audit->n_differences);
	return n < 0 ? -EIO : 0;
}

static int print_list(FILE *out, const struct command *command, const ProtobufCMessage *answer)
{
	const ProtobufCMessage **rows;
	struct field list;
	int r = field_named(answer, command->list, &list);

	if (r < 0)
		return r;
	if (list.count == 0)
		return fprintf(out, "%s\n", command->empty) < 0 ? -EIO : 0;
	rows = calloc(list.count, sizeof(const ProtobufCMessage *));
	if (!rows)
		return -ENOMEM;
	for (size_t i = 0; i < list.count; i++)
		rows[i] = field_message(&list, i);
	r = table_print_rows(out, rows, list.count, command->columns, command->column_count);
	free(rows);
	return r;
}

int command_print(FILE *out, const struct command *command, const ProtobufCMessage *answer)
{
	int r;

	if (!command->list)
		return table_print_record(out, answer, command->columns, command->column_count);
	r = print_list(out, command, answer);
	if (r == 0 && command->reply == KVG__ADMIN_REPLY__BODY_AUDIT)
		r = print_audit(out, answer);
	return r;
}

int command_print_json(FILE *out, const ProtobufCMessage *answer)
{
	json_t *object = NULL;
	int r = json_from_message(answer, &object);

	if (r < 0)
		return r;
	if (json_dumpf(object, out, JSON_INDENT(2) | JSON_REAL_PRECISION(15)) < 0 || fputc('\n', out) == EOF)
		r = -EIO;
	json_decref(object);
	return r;
}
