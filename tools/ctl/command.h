/*
 * command.h - what kvgatectl can ask: for each command the request, the reply that
 * answers it, and how the reply looks as text. The table is constant; nothing here
 * talks to anyone.
 */
#ifndef KVG_CTL_COMMAND_H
#define KVG_CTL_COMMAND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "control.pb-c.h"
#include "tools/ctl/table.h"

#define COMMAND_BUDGETS 6u

/* What stands after a command's name. */
enum command_form {
	FORM_NONE,
	FORM_TENANT,
	FORM_BUDGET,   /* TENANT KEY=SIZE..., each key at most once */
	FORM_RECLAIM,  /* TENANT [SIZE] */
	FORM_CONTEXT,  /* TENANT CONTEXT */
	FORM_SEQUENCE, /* WORKER SEQ */
	FORM_EVICT,    /* the same [--ratio R] */
	FORM_RECALL,   /* the same --ratio R | --budget N */
};

struct command {
	const char *name; /* the words on the command line: "budget set" */
	const char *arguments;
	const char *help;
	enum command_form form;
	Kvg__AdminRequest__BodyCase request;
	Kvg__AdminReply__BodyCase reply;
	const char *list;  /* the reply's repeated field of messages that is shown as a table; NULL: the reply itself */
	const char *empty; /* shown for an empty list */
	const struct column *columns;
	size_t column_count;
	Kvg__SequenceWork__What what; /* FORM_SEQUENCE and those after it */
	bool waits;                   /* the daemon may have to wait for workers, or for copies */
};

/* The commands, in the order of the help. */
const struct command *command_table(size_t *ret_count);

/* What a command's arguments mean. */
struct command_arguments {
	const char *tenant;
	bool budget_set[COMMAND_BUDGETS];
	uint64_t budget[COMMAND_BUDGETS]; /* bytes, in the order of command_budget_key() */
	bool has_bytes, has_ratio, has_tokens;
	uint64_t bytes;       /* of RECLAIM */
	uint64_t context;     /* its id */
	uint64_t worker, seq; /* seq: the handle, EPOCH << 32 | SLOT */
	double ratio;
	uint32_t tokens; /* --budget */
};

/* "device.min" and so on. */
const char *command_budget_key(size_t index);

/* A request and the room for its body; it must not be moved. */
struct command_request {
	Kvg__AdminRequest message;
	union {
		Kvg__Empty empty;
		Kvg__BudgetKey budget_key;
		Kvg__BudgetSet budget_set;
		Kvg__Reclaim reclaim;
		Kvg__ContextDrop context_drop;
		Kvg__SequenceWork sequence_work;
	} body;
};

/* Fills a request. arguments must outlive it. */
void command_request(
	const struct command *command, const struct command_arguments *arguments, struct command_request *ret);

/* The message that answers command, inside reply; NULL when reply answers something else. */
const ProtobufCMessage *command_answer(const struct command *command, const Kvg__AdminReply *reply);

/* Prints an answer as text. 0 or a negative errno, as table_print_rows(). */
int command_print(FILE *out, const struct command *command, const ProtobufCMessage *answer);

/* Prints an answer as one JSON object and a newline. 0, -EIO, or a negative errno as json_from_message(). */
int command_print_json(FILE *out, const ProtobufCMessage *answer);

#endif
