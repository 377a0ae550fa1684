#include "tools/lm/needles.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define CONTEXT_MAX (64u << 20)

struct where {
	const char *path;
	unsigned line;
	char *text;
};

static void deinit_needle(struct lm_needle *needle)
{
	for (size_t i = 0; i < needle->query_count; i++) {
		free(needle->queries[i].name.data);
		free(needle->queries[i].code.data);
	}
	free(needle->queries);
	free(needle->context.data);
}

void lm_needles_deinit(struct lm_needles *needles)
{
	for (size_t i = 0; i < needles->count; i++)
		deinit_needle(&needles->list[i]);
	free(needles->list);
	*needles = (struct lm_needles){0};
}

static int read_bytes(const struct where *at, const json_t *object, const char *key, uint32_t max, struct lm_bytes *ret)
{
	const json_t *value = json_object_get(object, key);
	size_t size = json_string_length(value);
	uint8_t *data;

	if (!json_is_string(value))
		return lm_fail(at->text, -EINVAL, "%s:%u: %s is not a string", at->path, at->line, key);
	if (size < 1 || size > max)
		return lm_fail(
			at->text, -EINVAL, "%s:%u: %s has %zu bytes, not 1 to %u", at->path, at->line, key, size, max);
	data = malloc(size);
	if (!data)
		return lm_fail(at->text, -ENOMEM, "%s:%u: out of memory", at->path, at->line);
	memcpy(data, json_string_value(value), size);
	*ret = (struct lm_bytes){.data = data, .size = (uint32_t)size};
	return 0;
}

static int read_queries(const struct where *at, const json_t *list, struct lm_needle *needle)
{
	size_t count = json_array_size(list);

	if (count == 0)
		return lm_fail(at->text, -EINVAL, "%s:%u: queries is not a list of at least one", at->path, at->line);
	needle->queries = calloc(count, sizeof(*needle->queries));
	if (!needle->queries)
		return lm_fail(at->text, -ENOMEM, "%s:%u: out of memory", at->path, at->line);
	needle->query_count = count;
	for (size_t i = 0; i < count; i++) {
		const json_t *query = json_array_get(list, i);
		int e = read_bytes(at, query, "name", LM_NAME_MAX, &needle->queries[i].name);

		if (e == 0)
			e = read_bytes(at, query, "code", LM_CODE_MAX, &needle->queries[i].code);
		if (e < 0)
			return e;
	}
	return 0;
}

static int read_line(const struct where *at, const char *line, size_t size, struct lm_needle *ret)
{
	struct lm_needle needle = {.line = at->line};
	json_error_t error;
	json_t *root = json_loadb(line, size, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
	int e;

	if (!root)
		return lm_fail(at->text, -EINVAL, "%s:%u: column %d: %s", at->path, at->line, error.column, error.text);
	e = read_bytes(at, root, "context", CONTEXT_MAX, &needle.context);
	if (e == 0)
		e = read_queries(at, json_object_get(root, "queries"), &needle);
	json_decref(root);
	if (e < 0)
		deinit_needle(&needle);
	else
		*ret = needle;
	return e;
}

static int append_line(const struct where *at, const char *line, size_t size, struct lm_needles *needles)
{
	struct lm_needle needle = {0}, *grown;
	int e = read_line(at, line, size, &needle);

	if (e < 0)
		return e;
	grown = reallocarray(needles->list, needles->count + 1, sizeof(*grown));
	if (!grown) {
		deinit_needle(&needle);
		return lm_fail(at->text, -ENOMEM, "%s:%u: out of memory", at->path, at->line);
	}
	grown[needles->count++] = needle;
	needles->list = grown;
	return 0;
}

static int read_lines(FILE *file, const char *path, uint32_t limit, struct lm_needles *needles, char *text)
{
	struct where at = {.path = path, .text = text};
	char *line = NULL;
	size_t room = 0;
	int e = 0;

	while (e == 0 && (limit == 0 || needles->count < limit)) {
		ssize_t size = getline(&line, &room, file);

		if (size < 0)
			break;
		at.line++;
		if (strspn(line, " \t\r\n") < (size_t)size)
			e = append_line(&at, line, (size_t)size, needles);
	}
	free(line);
	if (e == 0 && ferror(file))
		e = lm_fail(text, -EIO, "%s: %s", path, strerror(errno));
	if (e == 0 && needles->count == 0)
		e = lm_fail(text, -EINVAL, "%s: has no context", path);
	return e;
}

int lm_needles_read(const char *path, uint32_t limit, struct lm_needles *ret, char *text)
{
	struct lm_needles needles = {0};
	FILE *file = fopen(path, "re");
	int e;

	if (!file)
		return lm_fail(text, -errno, "%s: %s", path, strerror(errno));
	e = read_lines(file, path, limit, &needles, text);
	(void)fclose(file);
	if (e < 0)
		lm_needles_deinit(&needles);
	else
		*ret = needles;
	return e;
}
