#include "tools/bench/insitu_run.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/attention.h"

#define COMPLETIONS    64u
#define EVENTS_AT_ONCE 64u /* three entries each, of a ring of 256 */

int insitu_set_counter(struct insitu *s, uint32_t sequence, uint32_t value)
{
	uint32_t slot = (uint32_t)s->sequences[sequence].seq;
	CUdeviceptr at = (CUdeviceptr)(uintptr_t)&s->rig.view.appended[slot];

	return rig_driver(
		&s->rig, insitu_driver(s)->cuMemsetD32Async(at, value, 1, s->rig.synthetic->stream), "counter");
}

/* Who sits out is left out of the step; when all do, there is no step. */
static int set_slot(struct insitu *s, uint32_t sequence, uint32_t slot)
{
	if (s->together)
		return 0;
	return rig_driver(&s->rig,
		insitu_driver(s)->cuMemsetD32Async(
			s->slots + sequence * sizeof(uint32_t), slot, 1, s->rig.synthetic->stream),
		"slot");
}

/* ---- an event: what a sequence has got since the last one is scored, and it goes back to its budget ---- */

static int stage(struct insitu *s, uint32_t number)
{
	struct insitu_sequence *sequence = &s->sequences[number];
	uint64_t layer_stride = (uint64_t)INSITU_EVENT * s->row_bytes;
	const void *rows = (const void *)(uintptr_t)(s->rows + number * s->options.layers * layer_stride);
	int r = kvg_commit(s->rig.client, sequence->seq, sequence->since);

	if (r == 0)
		r = kvg_stage_device(s->rig.client, sequence->seq,
			s->options.wide ? KVG_STAGE_PREACT : KVG_STAGE_HIDDEN, 0, s->options.layers, sequence->pos,
			sequence->since, rows, layer_stride);
	sequence->pos += sequence->since;
	sequence->since = 0;
	return r;
}

/* ---- one by one: a sequence sits out while it is evicted, and the others go on ---- */

static int send_away(struct insitu *s, uint32_t number)
{
	struct insitu_sequence *sequence = &s->sequences[number];
	struct kvg_sqe evict = {.op = KVG_OP_EVICT,
		.user_data = 2 * number,
		.seq = sequence->seq,
		.generation = s->rig.view.slots[(uint32_t)sequence->seq].generation,
		.evict.mode = KVG_EVICT_DECODE};
	struct kvg_sqe reserve = {.op = KVG_OP_RESERVE,
		.user_data = 2 * number + 1,
		.seq = sequence->seq,
		.reserve.tokens = INSITU_EVENT};
	int r = set_slot(s, number, KVG_CUDA_NO_SLOT);

	if (r < 0)
		return r;
	r = stage(s, number);
	if (r == 0)
		r = kvg_submit(s->rig.client, &evict);
	if (r == 0)
		r = kvg_submit(s->rig.client, &reserve);
	sequence->away = true;
	sequence->left = service_seconds();
	return rig_client(&s->rig, r, "event");
}

static int take_completion(struct insitu *s, const struct kvg_cqe *cqe, const char *text)
{
	uint32_t number = (uint32_t)(cqe->user_data / 2);
	struct insitu_sequence *sequence = &s->sequences[number];

	if (cqe->status < 0) {
		(void)fprintf(
			stderr, "kvgate-bench: event of sequence %u: %s: %s\n", number, strerror(-cqe->status), text);
		return cqe->status;
	}
	if (cqe->user_data % 2 == 0) {
		s->pairs_dropped += cqe->value[1];
		s->evictions++;
		return 0;
	}
	sequence->away = false;
	s->away_seconds += service_seconds() - sequence->left;
	return set_slot(s, number, (uint32_t)sequence->seq);
}

static int reap(struct insitu *s, uint32_t least)
{
	struct kvg_cqe cqe[COMPLETIONS];
	const char *texts[COMPLETIONS];
	int n = kvg_reap(s->rig.client, cqe, texts, COMPLETIONS, least), r = 0;

	if (n < 0)
		return rig_client(&s->rig, n, "completions");
	for (int i = 0; r == 0 && i < n; i++)
		r = take_completion(s, &cqe[i], texts[i]);
	return r == 0 ? rig_client(&s->rig, kvg_process(s->rig.client), "events") : r;
}

static uint32_t count_away(const struct insitu *s)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < s->options.sequences; i++)
		count += s->sequences[i].away;
	return count;
}

static int reap_all(struct insitu *s)
{
	int r = 0;

	while (r == 0 && count_away(s))
		r = reap(s, 1);
	return r;
}

/* ---- together: no step until the events of all are over ---- */

static int events_together(struct insitu *s)
{
	double start = service_seconds(), before = s->away_seconds;
	int r = rig_driver(&s->rig, insitu_driver(s)->cuEventSynchronize(s->step), "step");

	for (uint32_t i = 0; r == 0 && i < s->options.sequences; i++) {
		r = send_away(s, i);
		if (r == 0 && i % EVENTS_AT_ONCE == EVENTS_AT_ONCE - 1)
			r = reap_all(s);
	}
	if (r == 0)
		r = reap_all(s);
	s->away_seconds = before + service_seconds() - start;
	return rig_client(&s->rig, r, "events");
}

/* ---- steps ---- */

/*
 * A step is launched when the one before has ended, as by an engine that samples. Until then the CPU takes what comes
 * from the daemon (mapping extents takes its time): evictions that are done have their sequences in the next step.
 */
static int wait_step(struct insitu *s)
{
	const struct timespec nap = {.tv_nsec = 10000};
	CUresult result = insitu_driver(s)->cuEventQuery(s->step);
	int r = 0;

	for (; r == 0 && result == CUDA_ERROR_NOT_READY; result = insitu_driver(s)->cuEventQuery(s->step)) {
		if (count_away(s))
			r = reap(s, 0);
		(void)nanosleep(&nap, NULL);
	}
	if (r == 0)
		r = rig_driver(&s->rig, result, "step");
	if (r == 0 && count_away(s) == s->options.sequences)
		r = reap(s, 1);
	return r;
}

static int launch(struct insitu *s, bool with)
{
	CUresult result = insitu_driver(s)->cuGraphLaunch(s->graphs[with], s->rig.synthetic->stream);

	if (result == CUDA_SUCCESS)
		result = insitu_driver(s)->cuEventRecord(s->step, s->rig.synthetic->stream);
	return rig_driver(&s->rig, result, "step");
}

/* Of all sequences that do not sit out; adds the tokens. */
static int run_step(struct insitu *s, bool with, uint64_t *tokens)
{
	int r = wait_step(s);
	uint32_t away = count_away(s);

	if (r < 0 || away == s->options.sequences)
		return r;
	r = launch(s, with);
	for (uint32_t i = 0; i < s->options.sequences; i++)
		s->sequences[i].since += !s->sequences[i].away;
	*tokens += s->options.sequences - away;
	s->sat_out += away;
	return r;
}

/* The same rows again: lengths are those of a round with evictions. */
static int set_back(struct insitu *s, uint32_t sequence)
{
	s->sequences[sequence].since = 0;
	return insitu_set_counter(s, sequence, 0);
}

/* What is due behind a step: a sequence has its event after INSITU_EVENT tokens, or while warming up at its place of
 * the first ones, so that later events are spread over the steps. */
static int run_due(struct insitu *s, bool with, const uint32_t *place)
{
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < s->options.sequences; i++) {
		const struct insitu_sequence *sequence = &s->sequences[i];
		bool due = place ? i * INSITU_EVENT / s->options.sequences == *place : sequence->since == INSITU_EVENT;

		if (!due || sequence->away || !sequence->since)
			continue;
		r = with && !s->transfers ? send_away(s, i) : set_back(s, i);
	}
	return r;
}

/* ---- rounds ---- */

static int run_spread(struct insitu *s, bool with, bool warm_up, uint64_t *tokens)
{
	uint32_t steps = (warm_up ? 1 : s->events) * INSITU_EVENT, before[INSITU_SEQUENCES] = {0};
	int r = 0;

	for (uint32_t i = 0; i < s->options.sequences; i++)
		before[i] = s->sequences[i].since;
	for (uint32_t step = 0; r == 0 && step < steps; step++) {
		r = run_step(s, with, tokens);
		if (r == 0)
			r = run_due(s, with, warm_up ? &step : NULL);
	}
	if (with && !s->transfers)
		return r == 0 ? reap_all(s) : r;
	for (uint32_t i = 0; r == 0 && i < s->options.sequences; i++) {
		s->sequences[i].since = before[i];
		r = insitu_set_counter(s, i, before[i]);
	}
	return r;
}

static int run_together(struct insitu *s, bool with, bool warm_up, uint64_t *tokens)
{
	int r = 0;

	for (uint32_t event = 0; r == 0 && event < (warm_up ? 1 : s->events); event++) {
		for (uint32_t step = 0; r == 0 && step < INSITU_EVENT; step++)
			r = run_step(s, with, tokens);
		if (r == 0 && with)
			r = events_together(s);
		for (uint32_t i = 0; r == 0 && !with && i < s->options.sequences; i++)
			r = set_back(s, i);
	}
	return r;
}

/* Tokens a second. */
static int time_round(struct insitu *s, bool with, bool warm_up, double *ret)
{
	CUstream stream = s->rig.synthetic->stream;
	int r = rig_driver(&s->rig, insitu_driver(s)->cuStreamSynchronize(stream), "stream");
	double start = service_seconds();
	uint64_t tokens = 0;

	if (r == 0)
		r = s->together ? run_together(s, with, warm_up, &tokens) : run_spread(s, with, warm_up, &tokens);
	if (r == 0)
		r = rig_driver(&s->rig, insitu_driver(s)->cuStreamSynchronize(stream), "round");
	*ret = (double)tokens / (service_seconds() - start);
	return r;
}

static int run_round(struct insitu *s, bool with, bool warm_up, double *ret)
{
	int r = with && s->transfers ? neighbour_go(&s->neighbour) : 0, stopped = 0;

	if (r < 0)
		return r;
	r = time_round(s, with, warm_up, ret);
	if (with && s->transfers)
		stopped = neighbour_stop(&s->neighbour);
	return r < 0 ? r : stopped;
}

int insitu_rounds(struct insitu *s)
{
	double unused;
	int r = run_round(s, true, true, &unused);

	if (r == 0)
		r = run_round(s, false, true, &unused);
	s->pairs_dropped = s->evictions = s->sat_out = 0;
	s->away_seconds = 0;
	s->neighbour.bytes = s->neighbour.seconds = 0;
	for (uint32_t i = 0; r == 0 && i < s->rounds; i++) {
		bool first = i % 2; /* neither always comes after the other */

		r = run_round(s, first, false, &s->tokens[first][i]);
		if (r == 0)
			r = run_round(s, !first, false, &s->tokens[!first][i]);
	}
	return r;
}
