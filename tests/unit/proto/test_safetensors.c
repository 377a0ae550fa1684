#include "tests/support/runner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proto/frame.h"
#include "proto/safetensors.h"

/* A sealed memfd with a file made of a header and data_size bytes 0, 1, 2, ...; the length written may lie. */
static int make_file(uint64_t length, const char *header, size_t data_size)
{
	size_t header_size = strlen(header), size = 8 + header_size + data_size;
	uint8_t *bytes = malloc(size + 1);
	int fd;

	assert_non_null(bytes);
	memcpy(bytes, &length, 8);
	memcpy(bytes + 8, header, header_size + 1);
	for (size_t i = 0; i < data_size; i++)
		bytes[8 + header_size + i] = (uint8_t)i;
	fd = kvg_memfd_from("test", bytes, size);
	assert_true(fd >= 0);
	free(bytes);
	return fd;
}

static int open_made(uint64_t length, const char *header, size_t data_size, struct kvg_safetensors **ret, char *text)
{
	int fd = make_file(length, header, data_size);
	int r = kvg_safetensors_open_fd(fd, "made.safetensors", ret, text, 256);

	assert_int_equal(close(fd), 0);
	return r;
}

static void reads_a_real_model(void **state)
{
	struct kvg_safetensors *file;
	const struct kvg_tensor *tensor;
	char text[256];

	(void)state;
	assert_int_equal(kvg_safetensors_open("pilot-lm/model.safetensors", &file, text, sizeof(text)), 0);
	tensor = kvg_safetensors_find(file, "model.embed_tokens.weight");
	assert_non_null(tensor);
	assert_int_equal(tensor->dtype, KVG_TENSOR_BF16);
	assert_int_equal(tensor->rank, 2);
	assert_int_equal(tensor->shape[0], 272);
	assert_int_equal(tensor->shape[1], 256);
	assert_int_equal(tensor->count, 272 * 256);
	assert_int_equal(tensor->size, 272 * 256 * 2);
	assert_null(kvg_safetensors_find(file, "model.embed_tokens"));
	for (size_t i = 0; i < kvg_safetensors_count(file); i++)
		assert_ptr_equal(
			kvg_safetensors_find(file, kvg_safetensors_at(file, i)->name), kvg_safetensors_at(file, i));
	assert_null(kvg_safetensors_at(file, kvg_safetensors_count(file)));
	assert_null(kvg_safetensors_free(file));
	assert_int_equal(kvg_safetensors_open("pilot-lm/gate.safetensors", &file, text, sizeof(text)), 0);
	assert_string_equal(kvg_safetensors_metadata(file, "format"), "fast-kvzip-gate");
	assert_null(kvg_safetensors_metadata(file, "nothing"));
	assert_null(kvg_safetensors_free(file));
	assert_null(kvg_safetensors_free(NULL));
}

static const char *const plain = "{\"a\":{\"dtype\":\"U8\",\"shape\":[2,3],\"data_offsets\":[4,10]},"
				 "\"b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
				 "\"c\":{\"dtype\":\"Q9\",\"shape\":[7],\"data_offsets\":[10,12]},"
				 "\"d\":{\"dtype\":\"F64\",\"shape\":[0,5],\"data_offsets\":[12,12]}}  ";

static void reads_scalars_empty_and_unknown(void **state)
{
	struct kvg_safetensors *file;
	const struct kvg_tensor *tensor;
	char text[256];

	(void)state;
	assert_int_equal(open_made(strlen(plain), plain, 12, &file, text), 0);
	assert_int_equal(kvg_safetensors_count(file), 4);
	tensor = kvg_safetensors_find(file, "a");
	assert_memory_equal(tensor->data, "\4\5\6\7\10\11", 6);
	assert_int_equal(kvg_safetensors_find(file, "b")->count, 1);
	assert_int_equal(kvg_safetensors_find(file, "c")->dtype, KVG_TENSOR_OTHER);
	assert_int_equal(kvg_safetensors_find(file, "c")->size, 2);
	assert_int_equal(kvg_safetensors_find(file, "d")->count, 0);
	assert_null(kvg_safetensors_metadata(file, "a"));
	assert_null(kvg_safetensors_free(file));
}

/* Every way to cut a good file short is an error, never a fault. */
static void refuses_every_truncation(void **state)
{
	size_t size = 8 + strlen(plain) + 12;
	struct kvg_safetensors *file = NULL;
	char text[256];
	uint8_t bytes[512];
	int whole = make_file(strlen(plain), plain, 12);

	(void)state;
	assert_int_equal(pread(whole, bytes, sizeof(bytes), 0), size);
	for (size_t cut = 0; cut < size; cut++) {
		int fd = memfd_create("cut", MFD_CLOEXEC);

		assert_int_equal(write(fd, bytes, cut), cut);
		text[0] = '\0';
		assert_int_equal(kvg_safetensors_open_fd(fd, "cut", &file, text, sizeof(text)), -EINVAL);
		assert_memory_equal(text, "cut: ", 5);
		assert_null(file);
		assert_int_equal(close(fd), 0);
	}
	assert_int_equal(close(whole), 0);
}

#define ONE(dtype, shape, offsets) "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void refuses_lies(void **state)
{
	static const struct {
		const char *header, *says;
	} lies[] = {
		{"[]", "not a JSON object"},
		{"{\"a\":1}", "no dtype"},
		{"{\"a\":", "not JSON"},
		{"{\"a\":{}, \"a\":{}}", "not JSON: duplicate"},
		{ONE("4", "[8]", "[0,8]"), "no dtype"},
		{ONE("\"U8\"", "8", "[0,8]"), "no shape"},
		{ONE("\"U8\"", "[-8]", "[0,8]"), "dimension 0 is not a size"},
		{ONE("\"U8\"", "[8.0]", "[0,8]"), "dimension 0 is not a size"},
		{ONE("\"U8\"", "[9223372036854775808]", "[0,8]"), "not JSON"},
		{ONE("\"U8\"", "[4294967296,4294967296]", "[0,8]"), "overflows"},
		{ONE("\"F64\"", "[2305843009213693953]", "[0,8]"), "do not take the 8 bytes"},
		{ONE("\"U8\"", "[1,1,1,1,1,1,1,1,8]", "[0,8]"), "9 dimensions, more than 8"},
		{ONE("\"U8\"", "[9]", "[0,9]"), "outside the file's 8 bytes"},
		{ONE("\"U8\"", "[8]", "[8,0]"), "outside the file's 8 bytes"},
		{ONE("\"U8\"", "[8]", "[-1,7]"), "outside the file's 8 bytes"},
		{ONE("\"U8\"", "[8]", "[0,8,8]"), "not two integers"},
		{ONE("\"U8\"", "[8]", "[0,\"8\"]"), "not two integers"},
		{ONE("\"U8\"", "[7]", "[0,8]"), "7 elements of U8 do not take the 8 bytes"},
		{ONE("\"U8\"", "[7]", "[0,7]"), "1 bytes after the last"},
		{ONE("\"U8\"", "[7]", "[1,8]"), "begins at 1, where the one before ends at 0"},
		{"{\"__metadata__\":{\"a\":1}}", "__metadata__ key a is not a string"},
		{"{\"__metadata__\":[]}", "__metadata__ is not an object"},
		{"{}", "8 bytes after the last"},
		{"{\"a\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[0,5]},"
		 "\"b\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[3,8]}}",
			"tensor b: its data begins at 3, where the one before ends at 5"},
	};
	struct kvg_safetensors *file = NULL;
	char text[256];

	(void)state;
	for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
		assert_int_equal(open_made(strlen(lies[i].header), lies[i].header, 8, &file, text), -EINVAL);
		if (!strstr(text, lies[i].says))
			fail_msg("%s: '%s' does not say '%s'", lies[i].header, text, lies[i].says);
		assert_null(file);
	}
	/* The same form without a lie is accepted. */
	const char *good = ONE("\"U8\"", "[8]", "[0,8]");

	assert_int_equal(open_made(strlen(good), good, 8, &file, text), 0);
	assert_null(kvg_safetensors_free(file));
}

static void refuses_wrong_header_lengths(void **state)
{
	const struct {
		uint64_t length;
		const char *says;
	} lengths[] = {
		{UINT64_MAX, "above the limit of 100000000 bytes"},
		{100000001, "above the limit of 100000000 bytes"},
		{100000000, "goes beyond the file's"},
		{strlen(plain) + 13, "goes beyond the file's"},
		{strlen(plain) + 12, "not JSON"},
		{0, "not JSON"},
	};
	struct kvg_safetensors *file = NULL;
	char text[256];

	(void)state;
	for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
		assert_int_equal(open_made(lengths[i].length, plain, 12, &file, text), -EINVAL);
		assert_non_null(strstr(text, lengths[i].says));
	}
}

static void refuses_what_is_no_file(void **state)
{
	struct kvg_safetensors *file = NULL;
	char text[256], small[8];
	int ends[2];

	(void)state;
	assert_int_equal(kvg_safetensors_open("nowhere/model.safetensors", &file, text, sizeof(text)), -ENOENT);
	assert_string_equal(text, "nowhere/model.safetensors: cannot be opened: No such file or directory");
	assert_int_equal(kvg_safetensors_open(".", &file, text, sizeof(text)), -EINVAL);
	assert_int_equal(kvg_safetensors_open("/dev/zero", &file, NULL, 0), -EINVAL);
	assert_int_equal(kvg_safetensors_open("/dev/zero", &file, small, sizeof(small)), -EINVAL);
	assert_string_equal(small, "/dev/ze");
	assert_int_equal(pipe(ends), 0);
	assert_int_equal(kvg_safetensors_open_fd(ends[0], "pipe", &file, text, sizeof(text)), -EINVAL);
	assert_string_equal(text, "pipe: is not a regular file");
	assert_int_equal(close(ends[0]), 0);
	assert_int_equal(close(ends[1]), 0);
}

/* A file that is cut after it was opened keeps its tensors. */
static void survives_a_later_truncation(void **state)
{
	int source = make_file(strlen(plain), plain, 12), fd = memfd_create("live", MFD_CLOEXEC);
	struct kvg_safetensors *file;
	uint8_t bytes[512];
	char text[256];
	ssize_t n = pread(source, bytes, sizeof(bytes), 0);

	(void)state;
	assert_int_equal(write(fd, bytes, (size_t)n), n);
	assert_int_equal(kvg_safetensors_open_fd(fd, "live", &file, text, sizeof(text)), 0);
	assert_int_equal(ftruncate(fd, 0), 0);
	assert_memory_equal(kvg_safetensors_find(file, "a")->data, "\4\5\6\7\10\11", 6);
	assert_null(kvg_safetensors_free(file));
	assert_int_equal(close(fd), 0);
	assert_int_equal(close(source), 0);
}

/* Every tensor that an accepted file hands out lies within it: reads all of their bytes. */
static void read_all_tensors(const struct kvg_safetensors *file)
{
	volatile uint8_t sink = 0;

	for (size_t i = 0; i < kvg_safetensors_count(file); i++) {
		const struct kvg_tensor *tensor = kvg_safetensors_at(file, i);

		for (uint64_t n = 0; n < tensor->size; n++)
			sink = (uint8_t)(sink + ((const uint8_t *)tensor->data)[n]);
	}
}

static void survives_random_damage(void **state)
{
	int source = make_file(strlen(plain), plain, 12);
	uint8_t good[512], bad[512];
	size_t size = (size_t)pread(source, good, sizeof(good), 0);
	unsigned accepted = 0, refused = 0;
	uint32_t random = 1;

	(void)state;
	for (unsigned round = 0; round < 20000; round++) {
		struct kvg_safetensors *file = NULL;
		char text[256];
		int fd;

		memcpy(bad, good, size);
		for (unsigned i = 0; i <= round % 3; i++) {
			random = random * 1664525u + 1013904223u;
			/* Mostly digits, so that much of it is still a header. */
			bad[(random >> 8) % size] =
				random >> 30 ? (uint8_t)('0' + (random >> 4) % 10) : (uint8_t)random;
		}
		fd = kvg_memfd_from("damaged", bad, size);
		assert_true(fd >= 0);
		if (kvg_safetensors_open_fd(fd, "damaged", &file, text, sizeof(text)) == 0) {
			read_all_tensors(file);
			accepted++;
		} else {
			assert_null(file);
			refused++;
		}
		assert_null(kvg_safetensors_free(file));
		assert_int_equal(close(fd), 0);
	}
	assert_true(accepted > 100 && refused > 100);
	assert_int_equal(close(source), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads_a_real_model),
		cmocka_unit_test(reads_scalars_empty_and_unknown),
		cmocka_unit_test(refuses_every_truncation),
		cmocka_unit_test(refuses_lies),
		cmocka_unit_test(refuses_wrong_header_lengths),
		cmocka_unit_test(refuses_what_is_no_file),
		cmocka_unit_test(survives_a_later_truncation),
		cmocka_unit_test(survives_random_damage),
	};

	return runner_run("safetensors", tests, sizeof(tests) / sizeof(*tests));
}
