/* The host kind's work: kernels/host over mapped memory, done when a function returns. */
#include "daemon/sequence/compute.h"

#include "daemon/sequence/evict.h"
#include "daemon/sequence/image.h"
#include "daemon/sequence/score.h"

static int host_open(struct space *space, const struct space_memory *memory, char *text)
{
	(void)space;
	(void)memory;
	(void)text;
	return 0;
}

static int host_select(struct request *request)
{
	int r = evict_survey(request->sequence, request->evict);

	if (r >= 0)
		r = evict_select(request->sequence, request->evict);
	if (r >= 0)
		evict_count(request->sequence, request->evict);
	return r;
}

static int host_mark(struct request *request)
{
	evict_mark(request->sequence, request->evict);
	return 0;
}

static int host_move(struct request *request)
{
	evict_move(request->sequence, request->evict);
	return 0;
}

static int host_copy(struct request *request)
{
	return image_copy(request->sequence, request->image);
}

const struct compute_ops compute_host = {
	.open = host_open,
	.select = host_select,
	.mark = host_mark,
	.move = host_move,
	.evictions = 1,
	.score = score_slice,
	.unload = host_copy,
	.load = host_copy,
};
