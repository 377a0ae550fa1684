#include "tools/lm/weights.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tools/lm/checkpoint.h"

/* Every matrix starts on a cache line. */
#define ALIGN_FLOATS 16u

/* One walk over all weights: the first counts floats, the second reads tensors into them. */
struct walk {
	const struct lm_checkpoint *checkpoint; /* NULL: only count */
	float *memory;
	size_t used;
	unsigned layer;
	char *text;
	int error;
};

static float *place(struct walk *walk, size_t count)
{
	float *at = walk->memory ? walk->memory + walk->used : NULL;

	walk->used += (count + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
	return at;
}

static void read_into(struct walk *walk, float *dst, const char *name, size_t rows, size_t columns)
{
	if (walk->checkpoint && walk->error == 0)
		walk->error = lm_checkpoint_read(walk->checkpoint, name, rows, columns, dst, walk->text);
}

static float *tensor(struct walk *walk, const char *name, size_t rows, size_t columns)
{
	float *dst = place(walk, rows * (columns ? columns : 1));

	read_into(walk, dst, name, rows, columns);
	return dst;
}

struct part {
	const char *name; /* within the layer, without ".weight" */
	size_t rows;
};

/* Parts with the same columns, one below the other. columns 0: a vector. */
static float *layer_tensor(struct walk *walk, size_t columns, const struct part *parts, size_t count)
{
	size_t width = columns ? columns : 1, rows = 0, done = 0;
	float *dst;

	for (size_t i = 0; i < count; i++)
		rows += parts[i].rows;
	dst = place(walk, rows * width);
	for (size_t i = 0; i < count; i++) {
		char name[128];

		(void)snprintf(name, sizeof(name), "model.layers.%u.%s.weight", walk->layer, parts[i].name);
		read_into(walk, dst ? dst + done * width : NULL, name, parts[i].rows, columns);
		done += parts[i].rows;
	}
	return dst;
}

#define LAYER_TENSOR(walk, columns, ...)                                                                               \
	layer_tensor(walk, columns, (const struct part[]){__VA_ARGS__},                                                \
		sizeof((const struct part[]){__VA_ARGS__}) / sizeof(struct part))

static struct lm_layer_weights walk_layer(struct walk *walk, const struct lm_config *c)
{
	size_t q = (size_t)c->heads * c->head_dim, kv = (size_t)c->kv_heads * c->head_dim;
	struct lm_layer_weights w;

	w.input_norm = LAYER_TENSOR(walk, 0, {"input_layernorm", c->hidden});
	w.qkv = LAYER_TENSOR(
		walk, c->hidden, {"self_attn.q_proj", q}, {"self_attn.k_proj", kv}, {"self_attn.v_proj", kv});
	w.q_norm = LAYER_TENSOR(walk, 0, {"self_attn.q_norm", c->head_dim});
	w.k_norm = LAYER_TENSOR(walk, 0, {"self_attn.k_norm", c->head_dim});
	w.output = LAYER_TENSOR(walk, q, {"self_attn.o_proj", c->hidden});
	w.post_norm = LAYER_TENSOR(walk, 0, {"post_attention_layernorm", c->hidden});
	w.gate_up = LAYER_TENSOR(walk, c->hidden, {"mlp.gate_proj", c->intermediate}, {"mlp.up_proj", c->intermediate});
	w.down = LAYER_TENSOR(walk, c->intermediate, {"mlp.down_proj", c->hidden});
	return w;
}

static void walk_model(struct walk *walk, const struct lm_config *c, struct lm_weights *w)
{
	w->embedding = tensor(walk, "model.embed_tokens.weight", c->vocab, c->hidden);
	w->norm = tensor(walk, "model.norm.weight", c->hidden, 0);
	w->head = c->tied ? w->embedding : tensor(walk, "lm_head.weight", c->vocab, c->hidden);
	for (walk->layer = 0; walk->layer < c->layers && walk->error == 0; walk->layer++)
		w->layers[walk->layer] = walk_layer(walk, c);
}

int lm_weights_read(const char *dir, const struct lm_config *config, struct lm_weights *ret, char *text)
{
	struct lm_weights w = {.layers = calloc(config->layers, sizeof(*w.layers))};
	struct walk walk = {.text = text};
	struct lm_checkpoint *checkpoint;
	int e;

	if (!w.layers)
		return lm_fail(text, -ENOMEM, "%s: no memory for %u layers", dir, config->layers);
	e = lm_checkpoint_open(dir, &checkpoint, text);
	if (e < 0) {
		lm_weights_deinit(&w);
		return e;
	}
	walk_model(&walk, config, &w);
	w.memory = aligned_alloc(64, walk.used * sizeof(float));
	if (w.memory) {
		walk = (struct walk){.checkpoint = checkpoint, .memory = w.memory, .text = text};
		walk_model(&walk, config, &w);
		e = walk.error;
	} else {
		e = lm_fail(
			text, -ENOMEM, "%s: no memory for %zu MiB of weights", dir, walk.used * sizeof(float) >> 20);
	}
	(void)lm_checkpoint_free(checkpoint);
	if (e < 0)
		lm_weights_deinit(&w);
	else
		*ret = w;
	return e;
}

void lm_weights_deinit(struct lm_weights *weights)
{
	free(weights->layers);
	free(weights->memory);
	*weights = (struct lm_weights){0};
}
