#include "tools/lm/continuation.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tools/lm/generation.h"

int lm_text_read(
	const char *path, const struct lm_config *config, uint32_t generate, struct lm_text_file *ret, char *text)
{
	uint32_t around = 1 + generate;
	uint32_t room = config->max_positions > around ? config->max_positions - around : 0;
	uint8_t *data = malloc((size_t)room + 1);
	FILE *file = fopen(path, "re");
	size_t size;
	int e = 0;

	if (!data || !file) {
		e = lm_fail(text, file ? -ENOMEM : -errno, "%s: %s", path, strerror(file ? ENOMEM : errno));
		free(data);
		if (file)
			(void)fclose(file);
		return e;
	}
	size = fread(data, 1, (size_t)room + 1, file);
	if (ferror(file))
		e = lm_fail(text, -EIO, "%s: %s", path, strerror(errno));
	else if (size == 0)
		e = lm_fail(text, -EINVAL, "%s: is empty", path);
	else if (size > room)
		e = lm_fail(text, -EINVAL,
			"%s: is longer than %u bytes, what max_position_embeddings %u leaves beside %u other tokens",
			path, room, config->max_positions, around);
	(void)fclose(file);
	if (e < 0)
		free(data);
	else
		*ret = (struct lm_text_file){.data = data, .size = (uint32_t)size};
	return e;
}

void lm_text_deinit(struct lm_text_file *file)
{
	free(file->data);
	*file = (struct lm_text_file){0};
}

static int write_bytes(const int32_t *tokens, uint32_t count, FILE *out, char *text)
{
	for (uint32_t i = 0; i < count; i++)
		if (tokens[i] <= UINT8_MAX && fputc((int)tokens[i], out) == EOF)
			return lm_fail(text, -EIO, "standard output: %s", strerror(errno));
	return 0;
}

int lm_continue(struct lm_worker *worker, const struct lm_options *options, const struct lm_text_file *file, FILE *out,
	char *text)
{
	struct lm_bytes context = {.data = file->data, .size = file->size};
	struct lm_generation generation;
	int e = lm_generate(worker, options, &context, &generation, text);

	if (e < 0)
		return e;
	e = write_bytes(generation.tokens, generation.count, out, text);
	lm_generation_deinit(&generation);
	return e;
}
