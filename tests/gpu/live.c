#include "tests/gpu/live.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/integration/process.h"
#include "tests/support/runner.h"

#define STAGING (4u << 20)

bool live_gpu(void)
{
	pid_t pid = fork();
	int status = 0;

	if (pid == 0) {
		struct kvg_cuda *cuda;
		char text[256] = "";
		int r = kvg_cuda_open(0, &cuda, text, sizeof(text));

		if (r < 0)
			(void)fprintf(stderr, "skipped: %s\n", text);
		_exit(r < 0 ? 77 : 0);
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void live_config(char *ret, size_t size, bool cuda, const char *pool_size, const char *more)
{
	int n = snprintf(ret, size, "[pool]\nkind = %s\ndevice.size = %s\nextent_size = 2M\n%s", cuda ? "cuda" : "host",
		pool_size, more);

	assert_in_range(n, 1, size - 1);
}

void live_audit(const struct fixture *fixture)
{
	struct service service;
	struct service_audit audit;
	char path[FIXTURE_PATH];

	assert_int_equal(service_attach(&service, fixture_path(fixture, "state", path)), 0);
	assert_int_equal(service_audit(&service, &audit), 0);
	if (!audit.clean)
		fail_msg("audit: %s", audit.difference);
	assert_int_equal(audit.physical, audit.charged);
}

/* ---- a worker ---- */

void live_layout(struct kvg_layout *layout, uint32_t max_sequences, uint32_t max_tokens)
{
	*layout = (struct kvg_layout){.model = "gpu-test",
		.hidden_dim = 256,
		.group_count = 1,
		.max_sequences = max_sequences,
		.max_tokens = max_tokens};
	layout->groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = 6,
		.head_count = 4,
		.head_total = 4,
		.world = 1,
		.k_dim = 32,
		.v_dim = 32,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
}

void live_open(struct live *live, const char *socket, bool cuda, const struct kvg_layout *layout)
{
	char text[256] = "";

	*live = (struct live){.layout = *layout};
	must(kvg_connect(socket, "gpu-test", &live->client, text, sizeof(text)) == 0, text);
	must((kvg_kind(live->client) == KVG_KIND_CUDA) == cuda, "the daemon's kind");
	if (cuda) {
		must(synthetic_open(0, &live->synthetic) == 0, "device");
		must(kvg_set_stream(live->client, live->synthetic->stream) == 0, kvg_error(live->client));
	}
	must(kvg_register(live->client, layout, STAGING) == 0, kvg_error(live->client));
	must(content_new(live->client, layout, live->synthetic, &live->content) == 0, "content");
}

void live_close(struct live *live)
{
	live->content = content_free(live->content);
	live->client = kvg_close(live->client);
	live->synthetic = synthetic_close(live->synthetic);
}

/* ---- a sequence ---- */

void live_create(struct live *live, const struct kvg_policy *policy, uint64_t tag, struct live_sequence *ret)
{
	*ret = (struct live_sequence){.tag = tag};
	must(kvg_create(live->client, policy, &ret->seq) == 0, kvg_error(live->client));
}

static float score_of(const struct live_sequence *sequence, uint32_t row, uint32_t pos)
{
	uint32_t bits = content_word(sequence->tag ^ 0x5c0e5c0eu, row, pos, 1, 7) >> 8;

	if (sequence->levels)
		return (float)(bits % sequence->levels) / (float)sequence->levels;
	/* Rows differ, so that they keep unlike shares. */
	return (float)bits / (float)(1 << 24) * (0.4f + 0.6f * (float)(row % 5) / 4);
}

static void stage(struct live *live, const struct live_sequence *sequence, uint32_t tokens)
{
	const struct kvg_group *group = &live->layout.groups[0];
	uint32_t heads = group->head_count;
	float *scores = malloc((size_t)tokens * heads * sizeof(*scores));

	must(scores, "memory");
	for (uint32_t layer = 0; layer < group->layers; layer++) {
		for (uint32_t i = 0; i < tokens * heads; i++)
			scores[i] = score_of(sequence, layer * heads + i % heads, sequence->pos + i / heads);
		must(kvg_stage_scores(live->client, sequence->seq, layer, sequence->pos, tokens, scores) == 0,
			kvg_error(live->client));
	}
	free(scores);
}

void live_feed(struct live *live, struct live_sequence *sequence, uint32_t tokens)
{
	must(kvg_reserve(live->client, sequence->seq, tokens) == 0, kvg_error(live->client));
	must(content_fill(live->content, sequence->seq, sequence->tag, sequence->pos, tokens) == 0, "fill");
	stage(live, sequence, tokens);
	must(kvg_commit(live->client, sequence->seq, tokens) == 0, kvg_error(live->client));
	sequence->pos += tokens;
}

uint64_t live_check(struct live *live, const struct live_sequence *sequence, uint32_t *bits)
{
	size_t size = (size_t)content_rows(live->content) * content_words(live->content) * sizeof(*bits);
	uint32_t *found = bits ? bits : malloc(size);
	struct content_counts counts;

	must(found, "memory");
	must(content_check(live->content, sequence->seq, sequence->tag, sequence->pos, found, &counts) == 0, "check");
	must(counts.wrong == 0, "every word");
	must(counts.repeated == 0, "no pair twice");
	must(counts.strange == 0, "no unknown pair");
	if (!bits)
		free(found);
	return counts.pairs;
}

void live_evict(struct live *live, const struct live_sequence *sequence, uint32_t mode, struct kvg_evict_result *ret)
{
	struct kvg_evict_result result;

	must(kvg_evict(live->client, sequence->seq, mode, &result) == 0, kvg_error(live->client));
	must(live_check(live, sequence, NULL) == result.pairs_held, "the pairs that the eviction said");
	if (ret)
		*ret = result;
}

void live_free(struct live *live, struct live_sequence *sequence)
{
	must(kvg_free(live->client, sequence->seq) == 0, kvg_error(live->client));
	sequence->seq = 0;
}
