#include "daemon/sequence/image.h"

#include <string.h>

#include "tests/support/space_model.h"

static struct kvg_group group_of(uint32_t k_dim, uint32_t v_dim, uint32_t dtype)
{
	return (struct kvg_group){.k_dim = k_dim, .v_dim = v_dim, .k_dtype = dtype, .v_dtype = dtype};
}

/* Frames counted by laying the image out unit by unit. */
static uint32_t lay_out(const struct image_shape *shape, uint32_t frame_size, uint64_t blocks, bool places)
{
	uint32_t frames = 1, offset = 0;

	for (uint64_t i = 0; i < blocks * shape->units; i++) {
		frames += offset + shape->unit > frame_size;
		offset = offset + shape->unit > frame_size ? shape->unit : offset + shape->unit;
	}
	offset = (offset + 127) / 128 * 128;
	for (uint64_t i = 0; places && i < blocks; i++) {
		frames += offset + IMAGE_PLACES > frame_size;
		offset = offset + IMAGE_PLACES > frame_size ? IMAGE_PLACES : offset + IMAGE_PLACES;
	}
	return blocks ? frames : 0;
}

static void test_frames(void **state)
{
	static const uint32_t dims[] = {4, 8, 20, 64, 96, 128, 576, 1024};
	static const uint32_t sizes[] = {HOST_FRAME, HOST_FRAME_DEVICE};

	(void)state;
	for (size_t i = 0; i < sizeof(dims) / sizeof(*dims); i++)
		for (size_t k = 0; k < sizeof(dims) / sizeof(*dims); k++)
			for (size_t s = 0; s < 2; s++) {
				struct kvg_group group = group_of(dims[i], dims[k], k & 1 ? KVG_F32 : KVG_BF16);
				struct image_shape shape = image_shape(&group, sizes[s]);

				assert_true(shape.units == 2 || shape.k_half + shape.v_half <= sizes[s]);
				for (uint64_t blocks = 0; blocks < 1200; blocks += 1 + blocks / 7)
					for (unsigned places = 0; places < 2; places++)
						assert_int_equal(image_frames(&shape, sizes[s], blocks, places),
							lay_out(&shape, sizes[s], blocks, places));
			}
}

/* The canonical order, whatever is asked for at a time. */
static void test_walk(void **state)
{
	static const struct kvg_policy policy = {.ratio = 0.5,
		.mode = KVG_MODE_CHUNKED,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = 1024,
		.chunk_tokens = 512};
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM);
	const struct sequence *sequence = space_sequence(fixture->space, model->handle);
	uint32_t ids[4096], rows = fixture->space->rows, total = 0, at = 0, n;
	struct image *image;

	(void)state;
	assert_int_equal(model_append(model, 512), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	assert_int_equal(model_append(model, 300), 0);
	image = image_new(sequence, 0, false);
	assert_non_null(image);
	for (uint32_t most = 1; (n = image_walk_next(image, ids + total, most)); most = most % 37 + 1)
		total += n;
	assert_int_equal(total, sequence->meta->blocks);
	for (uint32_t row = 0; row < rows; row++)
		for (uint32_t i = 0; i < meta_rows(&fixture->space->part, sequence->slot)[row].held_blocks; i++)
			assert_int_equal(ids[at++], meta_held(&fixture->space->part, sequence->slot, row)[i]);
	assert_true(at > 0);
	for (uint32_t s = 0; s < sequence->meta->stripes; s++)
		for (uint32_t row = 0; row < rows; row++)
			for (uint32_t i = 0; i < KVG_RUN_BLOCKS; i++)
				assert_int_equal(
					ids[at++], meta_run(&fixture->space->part, sequence->slot, s)[row] + i);
	assert_int_equal(at, total);
	(void)image_free(image);
	model_release(model);
	fixture_free(fixture);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_frames),
		cmocka_unit_test(test_walk),
	};

	return runner_run("daemon/sequence/image", tests, sizeof(tests) / sizeof(*tests));
}
