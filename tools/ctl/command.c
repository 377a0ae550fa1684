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
	{"overhead", "overhead", COLUMN_SIZE},
	{"extent_size", "extent size", COLUMN_SIZE},
	{"extents", "extents", COLUMN_COUNT},
	{"workers", "workers", COLUMN_COUNT},
	{"sequences", "sequences", COLUMN_COUNT},
};

static const struct column tenant_columns[] = {
	{"name", "TENANT", COLUMN_TEXT},
	{"device_max", "DEVICE.MAX", COLUMN_SIZE},
	{"charged", "CHARGED", COLUMN_SIZE},
	{"promised", "PROMISED", COLUMN_SIZE},
	{"unreturned", "UNRETURNED", COLUMN_SIZE},
	{"high_water", "HIGH-WATER", COLUMN_SIZE},
	{"workers", "WORKERS", COLUMN_COUNT},
	{"sequences", "SEQUENCES", COLUMN_COUNT},
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
};

/* Exact counts: the audit is about single bytes. */
static const struct column audit_columns[] = {
	{"tenant", "TENANT", COLUMN_TEXT},
	{"extents", "EXTENTS", COLUMN_COUNT},
	{"blocks", "BLOCKS", COLUMN_COUNT},
	{"extent_bytes", "COUNTED", COLUMN_COUNT},
	{"physical", "PHYSICAL", COLUMN_COUNT},
	{"charged", "CHARGED", COLUMN_COUNT},
};

static const struct column budget_columns[] = {
	{"tenant", "tenant", COLUMN_TEXT},
	{"device_max", "device.max", COLUMN_SIZE},
	{"charged", "charged", COLUMN_SIZE},
	{"promised", "promised", COLUMN_SIZE},
};

static const struct command commands[] = {
	{"status", "", "the daemon, its pool and what is in use", 0, KVG__ADMIN_REQUEST__BODY_STATUS,
		KVG__ADMIN_REPLY__BODY_STATUS, NULL, NULL, status_columns, COUNT(status_columns)},
	{"tenants", "", "each tenant with its budget and use", 0, KVG__ADMIN_REQUEST__BODY_TENANTS,
		KVG__ADMIN_REPLY__BODY_TENANTS, "tenants", "no tenants", tenant_columns, COUNT(tenant_columns)},
	{"workers", "", "each connected worker process", 0, KVG__ADMIN_REQUEST__BODY_WORKERS,
		KVG__ADMIN_REPLY__BODY_WORKERS, "workers", "no workers", worker_columns, COUNT(worker_columns)},
	{"sequences", "", "each sequence with what it holds", 0, KVG__ADMIN_REQUEST__BODY_SEQUENCES,
		KVG__ADMIN_REPLY__BODY_SEQUENCES, "sequences", "no sequences", sequence_columns,
		COUNT(sequence_columns)},
	{"audit", "", "recount every byte from the extents up; fails on any difference", 0,
		KVG__ADMIN_REQUEST__BODY_AUDIT, KVG__ADMIN_REPLY__BODY_AUDIT, "rows", "no tenants", audit_columns,
		COUNT(audit_columns)},
	{"budget get", "TENANT", "a tenant's budget", 1, KVG__ADMIN_REQUEST__BODY_BUDGET_GET,
		KVG__ADMIN_REPLY__BODY_BUDGET, NULL, NULL, budget_columns, COUNT(budget_columns)},
	{"budget set", "TENANT device.max=SIZE", "change a tenant's budget until the daemon ends", 2,
		KVG__ADMIN_REQUEST__BODY_BUDGET_SET, KVG__ADMIN_REPLY__BODY_BUDGET, NULL, NULL, budget_columns,
		COUNT(budget_columns)},
};

const struct command *command_table(size_t *ret_count)
{
	*ret_count = COUNT(commands);
	return commands;
}

void command_request(
	const struct command *command, const struct command_arguments *arguments, struct command_request *ret)
{
	kvg__admin_request__init(&ret->message);
	ret->message.id = 1;
	ret->message.body_case = command->request;
	/* protobuf-c wants char *, and only reads it */
	char *tenant = (char *)(uintptr_t)arguments->tenant;

	switch (command->request) {
	case KVG__ADMIN_REQUEST__BODY_BUDGET_GET:
		kvg__budget_key__init(&ret->body.budget_key);
		ret->body.budget_key.tenant = tenant;
		ret->message.budget_get = &ret->body.budget_key;
		break;
	case KVG__ADMIN_REQUEST__BODY_BUDGET_SET:
		kvg__budget_set__init(&ret->body.budget_set);
		ret->body.budget_set.tenant = tenant;
		ret->body.budget_set.has_device_max = 1;
		ret->body.budget_set.device_max = arguments->device_max;
		ret->message.budget_set = &ret->body.budget_set;
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
