/* The store of retained pairs: where they lie, which stay, and how holes are filled. */
#include "daemon/sequence/retain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/host/dtype.h"
#include "kernels/host/select.h"

#define ALIGN 16u

static size_t align_up(size_t size)
{
	return (size + ALIGN - 1) / ALIGN * ALIGN;
}

void retain_form_init(struct retain_form *form, const struct kvg_group *group, size_t frame_size)
{
	*form = (struct retain_form){.k_bytes = group->k_dim * (uint32_t)kvg_dtype_size(group->k_dtype),
		.v_bytes = group->v_dim * (uint32_t)kvg_dtype_size(group->v_dtype),
		.frame_size = frame_size};
	form->per_frame = (uint32_t)(frame_size / retain_pair_bytes(form));
	for (; form->per_frame; form->per_frame--) {
		size_t v = align_up((size_t)form->per_frame * form->k_bytes);
		size_t index = align_up(v + (size_t)form->per_frame * form->v_bytes);

		if (index + form->per_frame * sizeof(struct retain_entry) > frame_size)
			continue;
		form->v_offset = (uint32_t)v;
		form->index_offset = (uint32_t)index;
		return;
	}
}

/* ---- what stays ---- */

/* keep[] of the old pairs, then of the new ones: the `count` best. 0 or -ENOMEM. */
static int choose_best(
	const struct retain *retain, const float *scores, uint64_t new_count, uint64_t count, uint8_t *keep)
{
	size_t n = retain->count + new_count, offset[2] = {0, n};
	size_t bytes = (kvg_select_scratch(n, 1) + 127) / 64 * 64;
	float *all = malloc((n + 1) * sizeof(float));
	void *scratch = aligned_alloc(64, bytes);
	struct kvg_select_input in = {.scores = all, .offset = offset, .layers = 1, .heads = 1};

	if (all && scratch) {
		for (uint64_t i = 0; i < retain->count; i++)
			all[i] = retain_entry(retain, i)->score;
		if (new_count)
			memcpy(all + retain->count, scores, new_count * sizeof(float));
		memset(keep, 0, n);
		if (count)
			kvg_select_floor(&in, (uint32_t)count, keep, scratch);
	}
	free(scratch);
	free(all);
	return all && scratch ? 0 : -ENOMEM;
}

/* New pairs that stay go to the places of old ones that do not, and then to the end. */
static void assign(uint64_t old_count, uint64_t new_count, const uint8_t *keep, struct retain_plan *plan)
{
	uint64_t hole = 0;

	plan->count = old_count;
	for (uint64_t i = 0; i < new_count; i++) {
		if (!keep[old_count + i]) {
			plan->place[i] = RETAIN_NOWHERE;
			continue;
		}
		while (hole < old_count && keep[hole])
			hole++;
		plan->place[i] = hole < old_count ? hole++ : plan->count++;
	}
}

int retain_plan(const struct retain *retain, const float *scores, uint64_t new_count, struct retain_plan *ret)
{
	struct retain_plan plan = {.place = malloc((new_count + 1) * sizeof(uint64_t))};
	uint8_t *keep = malloc(retain->count + new_count + 1);
	int r = plan.place && keep ? 0 : -ENOMEM;

	if (r >= 0 && retain->count + new_count > retain_capacity(retain))
		r = choose_best(retain, scores, new_count, retain_capacity(retain), keep);
	else if (r >= 0)
		memset(keep, 1, retain->count + new_count);
	if (r >= 0)
		assign(retain->count, new_count, keep, &plan);
	free(keep);
	if (r < 0)
		retain_plan_deinit(&plan);
	else
		*ret = plan;
	return r;
}

void retain_plan_deinit(struct retain_plan *plan)
{
	free(plan->place);
	*plan = (struct retain_plan){0};
}

/* ---- what goes ---- */

int retain_choose_worst(const struct retain *retain, uint64_t stay, uint64_t **ret, uint64_t *ret_count)
{
	uint64_t *chosen = malloc((retain->count + 1) * sizeof(uint64_t)), n = 0;
	uint8_t *keep = malloc(retain->count + 1);
	int r = chosen && keep ? choose_best(retain, NULL, 0, stay, keep) : -ENOMEM;

	for (uint64_t i = 0; r >= 0 && i < retain->count; i++)
		if (!keep[i])
			chosen[n++] = i;
	free(keep);
	if (r < 0) {
		free(chosen);
		return r;
	}
	*ret = chosen;
	*ret_count = n;
	return 0;
}

static void move_pair(const struct retain *retain, uint64_t from, uint64_t to)
{
	memcpy(retain_k(retain, to), retain_k(retain, from), retain->form.k_bytes);
	memcpy(retain_v(retain, to), retain_v(retain, from), retain->form.v_bytes);
	*retain_entry(retain, to) = *retain_entry(retain, from);
}

void retain_remove(struct retain *retain, const uint64_t *chosen, uint64_t n)
{
	uint64_t end = retain->count, last = n;

	/* From the end: a pair that goes itself fills no hole. */
	for (uint64_t i = 0; i < n && chosen[i] < retain->count - n; i++) {
		while (last && chosen[last - 1] == end - 1) {
			last--;
			end--;
		}
		move_pair(retain, --end, chosen[i]);
	}
	retain->count -= n;
}
