#include "tests/unit/tools/lm/scratch.h"

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

void scratch_init(struct scratch *scratch)
{
	(void)snprintf(scratch->dir, sizeof(scratch->dir), "/tmp/kvgate-lm-test-XXXXXX");
	assert_non_null(mkdtemp(scratch->dir));
}

const char *scratch_write(struct scratch *scratch, const char *name, const void *data, size_t size)
{
	FILE *file;

	assert_true(snprintf(scratch->path, sizeof(scratch->path), "%s/%s", scratch->dir, name) <
		    (int)sizeof(scratch->path));
	file = fopen(scratch->path, "we");
	assert_non_null(file);
	assert_int_equal(fwrite(data, 1, size, file), size);
	assert_int_equal(fclose(file), 0);
	return scratch->path;
}

const char *scratch_text(struct scratch *scratch, const char *name, const char *text)
{
	return scratch_write(scratch, name, text, strlen(text));
}

const char *scratch_tensors(
	struct scratch *scratch, const char *name, const char *header, const void *data, size_t data_size)
{
	uint64_t length = strlen(header) + 2;
	size_t size = 8 + (size_t)length + data_size;
	char *file = malloc(size + 1);

	assert_non_null(file);
	memcpy(file, &length, 8);
	(void)snprintf(file + 8, size - 7, "{%s}", header);
	memcpy(file + 8 + length, data, data_size);
	(void)scratch_write(scratch, name, file, size);
	free(file);
	return scratch->path;
}

void scratch_deinit(struct scratch *scratch)
{
	DIR *dir = opendir(scratch->dir);
	struct dirent *entry;

	assert_non_null(dir);
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.')
			assert_int_equal(unlinkat(dirfd(dir), entry->d_name, 0), 0);
	(void)closedir(dir);
	assert_int_equal(rmdir(scratch->dir), 0);
}
