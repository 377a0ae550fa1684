#include "tools/lm/model.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/host/dtype.h"
#include "tools/lm/numerics.h"
#include "tools/lm/weights.h"

#define INLINE_ROWS   16u        /* fewer rows are not worth waking threads for */
#define INLINE_WORK   (1u << 15) /* nor is a smaller matrix of weights in a product of one row */
#define SPLIT_ROWS    64u        /* rows of a task of a matrix product; fewer rows are split by columns instead */
#define SPLIT_COLUMNS 32u

struct lm_model {
	struct lm_config config;
	struct lm_weights weights;
	struct lm_pool *pool;
	size_t q_dim, kv_dim, qkv_dim;
	uint32_t chunk_cap, rows; /* tokens that the chunk buffers hold; tokens of the last forward */
	/* of a chunk */
	float *x;               /* [chunk_cap][D]: residual stream */
	float *cosines, *sines; /* [chunk_cap][head_dim / 2] */
	/* of a slab */
	float *h;         /* [LM_SLAB_TOKENS][D]: normed */
	uint16_t *staged; /* [LM_SLAB_TOKENS][D]: h in bf16 */
	float *qkv;       /* [LM_SLAB_TOKENS][qkv_dim] */
	float *attended;  /* [LM_SLAB_TOKENS][q_dim] */
	float *mlp;       /* [LM_SLAB_TOKENS][2 * intermediate] */
	float *logits;    /* [vocab] */
};

/* One slab of one layer on its way through the pool. */
struct slab {
	struct lm_model *model;
	const struct lm_layer_weights *w;
	const struct lm_kv *kv;
	uint32_t layer, pos, rows;
	float *x; /* the slab's rows of the residual stream */
	const float *cosines, *sines;
	const float *norm; /* for norm_rows() */
	size_t row_tasks, query_tasks;
	atomic_int error;
};

struct span {
	size_t begin, end;
};

/* Part `index` of n things in `parts` nearly equal spans that begin at multiples of `unit`. */
static struct span split(size_t n, size_t parts, size_t index, size_t unit)
{
	size_t units = (n + unit - 1) / unit;
	struct span s = {units * index / parts * unit, units * (index + 1) / parts * unit};

	if (s.end > n)
		s.end = n;
	return s;
}

/* ---- matrix products ---- */

/* y [rows][n] = x [rows][k] times w [n][k] transposed, plus beta times y. */
struct product {
	const float *x, *w;
	float *y;
	size_t rows, n, k, x_stride;
	float beta;
	bool by_rows; /* the tasks are spans of rows, else of columns */
	size_t tasks;
};

static void multiply(const struct product *p, struct span rows, struct span columns)
{
	size_t m = rows.end - rows.begin, n = columns.end - columns.begin;
	const float *x = p->x + rows.begin * p->x_stride, *w = p->w + columns.begin * p->k;
	float *y = p->y + rows.begin * p->n + columns.begin;

	if (m == 0 || n == 0)
		return;
	if (m == 1)
		cblas_sgemv(CblasRowMajor, CblasNoTrans, (blasint)n, (blasint)p->k, 1.0f, w, (blasint)p->k, x, 1,
			p->beta, y, 1);
	else
		cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)m, (blasint)n, (blasint)p->k, 1.0f, x,
			(blasint)p->x_stride, w, (blasint)p->k, p->beta, y, (blasint)p->n);
}

static void product_task(void *user, size_t task)
{
	const struct product *p = user;
	struct span rows = {0, p->rows}, columns = {0, p->n};

	if (p->by_rows)
		rows = split(p->rows, p->tasks, task, SPLIT_ROWS);
	else
		columns = split(p->n, p->tasks, task, SPLIT_COLUMNS);
	multiply(p, rows, columns);
}

static void linear(struct lm_model *model, struct product p)
{
	p.tasks = lm_pool_threads(model->pool);
	p.by_rows = p.rows >= SPLIT_ROWS * p.tasks;
	if (p.rows == 1 && p.n * p.k < INLINE_WORK)
		p.tasks = 1;
	lm_pool_run(model->pool, p.tasks, product_task, &p);
}

/* ---- rows ---- */

/* Runs fn over the slab's rows: tasks of the pool, or one task right here for a few rows. */
static void run_rows(struct slab *s, void (*fn)(void *user, size_t task))
{
	s->row_tasks = s->rows < INLINE_ROWS ? 1 : 2 * (size_t)lm_pool_threads(s->model->pool);
	lm_pool_run(s->model->pool, s->row_tasks, fn, s);
}

static void norm_rows(void *user, size_t task)
{
	struct slab *s = user;
	struct span rows = split(s->rows, s->row_tasks, task, 1);
	size_t d = s->model->config.hidden;

	for (size_t t = rows.begin; t < rows.end; t++)
		lm_rmsnorm(s->model->h + t * d, s->x + t * d, s->norm, d, (float)s->model->config.norm_eps);
}

static void stage_rows(void *user, size_t task)
{
	struct slab *s = user;
	struct span rows = split(s->rows, s->row_tasks, task, 1);
	size_t d = s->model->config.hidden;

	kvg_dtype_store(KVG_KERNEL_BF16, s->model->staged + rows.begin * d, s->model->h + rows.begin * d,
		(rows.end - rows.begin) * d);
}

/* QK norms and rotation. */
static void rotate_rows(void *user, size_t task)
{
	struct slab *s = user;
	const struct lm_config *c = &s->model->config;
	struct span rows = split(s->rows, s->row_tasks, task, 1);
	size_t dim = c->head_dim;

	for (size_t t = rows.begin; t < rows.end; t++) {
		float *row = s->model->qkv + t * s->model->qkv_dim;

		for (uint32_t head = 0; head < c->heads + c->kv_heads; head++) {
			float *x = row + head * dim;

			lm_rmsnorm(x, x, head < c->heads ? s->w->q_norm : s->w->k_norm, dim, (float)c->norm_eps);
			lm_rope(x, dim, s->cosines + t * (dim / 2), s->sines + t * (dim / 2));
		}
	}
}

static void silu_rows(void *user, size_t task)
{
	struct slab *s = user;
	struct span rows = split(s->rows, s->row_tasks, task, 1);
	size_t n = s->model->config.intermediate;

	for (size_t t = rows.begin; t < rows.end; t++) {
		float *row = s->model->mlp + t * 2 * n;

		lm_silu_mul(row, row + n, n);
	}
}

/* ---- KV ---- */

static void note_error(struct slab *s, int error)
{
	int none = 0;

	if (error < 0)
		(void)atomic_compare_exchange_strong(&s->error, &none, error);
}

static void append_head(void *user, size_t task)
{
	struct slab *s = user;
	const struct lm_model *m = s->model;
	const float *k = m->qkv + m->q_dim + task * m->config.head_dim;

	note_error(
		s, s->kv->append(s->kv->user, s->layer, (uint32_t)task, s->pos, s->rows, k, k + m->kv_dim, m->qkv_dim));
}

static void attend_head(void *user, size_t task)
{
	struct slab *s = user;
	const struct lm_model *m = s->model;
	const struct lm_config *c = &m->config;
	uint32_t head = (uint32_t)(task % c->kv_heads);
	struct span rows = split(s->rows, s->query_tasks, task / c->kv_heads, 16);
	size_t at = (size_t)head * (c->heads / c->kv_heads) * c->head_dim;

	if (rows.begin == rows.end)
		return;
	note_error(s, s->kv->attend(s->kv->user, s->layer, head, s->pos + (uint32_t)rows.begin,
			      (uint32_t)(rows.end - rows.begin), 1.0f / sqrtf((float)c->head_dim),
			      m->qkv + rows.begin * m->qkv_dim + at, m->qkv_dim,
			      m->attended + rows.begin * m->q_dim + at, m->q_dim));
}

/* Appends, then attends. Heads are the tasks; with more threads than heads, queries are split as well. */
static void attend(struct slab *s)
{
	struct lm_pool *pool = s->model->pool;
	size_t heads = s->model->config.kv_heads, threads = lm_pool_threads(pool);

	if (s->rows < INLINE_ROWS)
		for (size_t head = 0; head < heads; head++)
			append_head(s, head);
	else
		lm_pool_run(pool, heads, append_head, s);
	s->query_tasks = s->rows < SPLIT_ROWS || heads % threads == 0 ? 1 : (2 * threads + heads - 1) / heads;
	if (atomic_load(&s->error) == 0)
		lm_pool_run(pool, heads * s->query_tasks, attend_head, s);
}

/* ---- layers ---- */

static int slab_error(struct slab *s, const char *what, char *text)
{
	int e = atomic_load(&s->error);

	if (e < 0)
		return lm_fail(text, e, "layer %u: %s of positions %u to %u: %s", s->layer, what, s->pos,
			s->pos + s->rows - 1, strerror(-e));
	return 0;
}

static int attention_block(struct slab *s, char *text)
{
	struct lm_model *m = s->model;
	size_t d = m->config.hidden;
	int e;

	s->norm = s->w->input_norm;
	run_rows(s, norm_rows);
	if (s->kv->stage) {
		run_rows(s, stage_rows);
		note_error(s, s->kv->stage(s->kv->user, s->layer, s->pos, s->rows, m->staged));
		e = slab_error(s, "hidden states", text);
		if (e < 0)
			return e;
	}
	linear(m, (struct product){.x = m->h,
			  .x_stride = d,
			  .rows = s->rows,
			  .w = s->w->qkv,
			  .n = m->qkv_dim,
			  .k = d,
			  .y = m->qkv});
	run_rows(s, rotate_rows);
	attend(s);
	e = slab_error(s, "KV", text);
	if (e < 0)
		return e;
	linear(m, (struct product){.x = m->attended,
			  .x_stride = m->q_dim,
			  .rows = s->rows,
			  .w = s->w->output,
			  .n = d,
			  .k = m->q_dim,
			  .y = s->x,
			  .beta = 1.0f});
	return 0;
}

static void mlp_block(struct slab *s)
{
	struct lm_model *m = s->model;
	size_t d = m->config.hidden, n = m->config.intermediate;

	s->norm = s->w->post_norm;
	run_rows(s, norm_rows);
	linear(m, (struct product){.x = m->h,
			  .x_stride = d,
			  .rows = s->rows,
			  .w = s->w->gate_up,
			  .n = 2 * n,
			  .k = d,
			  .y = m->mlp});
	run_rows(s, silu_rows);
	linear(m, (struct product){.x = m->mlp,
			  .x_stride = 2 * n,
			  .rows = s->rows,
			  .w = s->w->down,
			  .n = d,
			  .k = n,
			  .y = s->x,
			  .beta = 1.0f});
}

/* One layer over all rows of the chunk, slab by slab: a slab's queries see its own and all earlier slabs' keys. */
static int run_layer(struct lm_model *model, const struct lm_kv *kv, uint32_t layer, uint32_t pos, char *text)
{
	size_t half = model->config.head_dim / 2;

	for (uint32_t done = 0; done < model->rows; done += LM_SLAB_TOKENS) {
		uint32_t left = model->rows - done;
		struct slab s = {.model = model,
			.w = &model->weights.layers[layer],
			.kv = kv,
			.layer = layer,
			.pos = pos + done,
			.rows = left < LM_SLAB_TOKENS ? left : LM_SLAB_TOKENS,
			.x = model->x + (size_t)done * model->config.hidden,
			.cosines = model->cosines + done * half,
			.sines = model->sines + done * half};
		int e = attention_block(&s, text);

		if (e < 0)
			return e;
		mlp_block(&s);
	}
	return 0;
}

/* ---- the model ---- */

static float *floats(size_t rows, size_t columns)
{
	return aligned_alloc(64, (rows * columns * sizeof(float) + 63) & ~(size_t)63);
}

static void free_chunk(struct lm_model *model)
{
	free(model->x);
	free(model->cosines);
	free(model->sines);
	model->x = model->cosines = model->sines = NULL;
	model->chunk_cap = 0;
}

static int grow_chunk(struct lm_model *model, uint32_t rows, char *text)
{
	const struct lm_config *c = &model->config;

	if (rows <= model->chunk_cap)
		return 0;
	free_chunk(model);
	model->x = floats(rows, c->hidden);
	model->cosines = floats(rows, c->head_dim / 2);
	model->sines = floats(rows, c->head_dim / 2);
	if (!model->x || !model->cosines || !model->sines) {
		free_chunk(model);
		(void)lm_fail(text, -ENOMEM, "no memory for a chunk of %u tokens", rows);
		return -ENOMEM;
	}
	model->chunk_cap = rows;
	return 0;
}

static int allocate(struct lm_model *model, char *text)
{
	const struct lm_config *c = &model->config;

	model->q_dim = (size_t)c->heads * c->head_dim;
	model->kv_dim = (size_t)c->kv_heads * c->head_dim;
	model->qkv_dim = model->q_dim + 2 * model->kv_dim;
	model->h = floats(LM_SLAB_TOKENS, c->hidden);
	model->staged = (uint16_t *)floats(LM_SLAB_TOKENS / 2, c->hidden);
	model->qkv = floats(LM_SLAB_TOKENS, model->qkv_dim);
	model->attended = floats(LM_SLAB_TOKENS, model->q_dim);
	model->mlp = floats(LM_SLAB_TOKENS, 2 * (size_t)c->intermediate);
	model->logits = floats(1, c->vocab);
	if (!model->h || !model->staged || !model->qkv || !model->attended || !model->mlp || !model->logits)
		return lm_fail(text, -ENOMEM, "no memory for the activations of %u tokens", LM_SLAB_TOKENS);
	return 0;
}

int lm_model_load(const char *dir, struct lm_pool *pool, struct lm_model **ret, char *text)
{
	struct lm_model *model = calloc(1, sizeof(*model));
	int e;

	if (!model)
		return lm_fail(text, -ENOMEM, "%s: out of memory", dir);
	model->pool = pool;
	e = lm_config_read(dir, &model->config, text);
	if (e == 0)
		e = lm_weights_read(dir, &model->config, &model->weights, text);
	if (e == 0)
		e = allocate(model, text);
	if (e < 0) {
		(void)lm_model_free(model);
		return e;
	}
	openblas_set_num_threads(1);
	*ret = model;
	return 0;
}

struct lm_model *lm_model_free(struct lm_model *model)
{
	if (!model)
		return NULL;
	free_chunk(model);
	free(model->h);
	free(model->staged);
	free(model->qkv);
	free(model->attended);
	free(model->mlp);
	free(model->logits);
	lm_weights_deinit(&model->weights);
	free(model);
	return NULL;
}

const struct lm_config *lm_model_config(const struct lm_model *model)
{
	return &model->config;
}

static int embed(struct lm_model *model, const int32_t *tokens, uint32_t count, char *text)
{
	size_t d = model->config.hidden;

	for (uint32_t t = 0; t < count; t++) {
		if (tokens[t] < 0 || (uint32_t)tokens[t] >= model->config.vocab)
			return lm_fail(text, -EINVAL, "token %u is %d, the vocabulary has %u", t, tokens[t],
				model->config.vocab);
		memcpy(model->x + t * d, model->weights.embedding + (size_t)tokens[t] * d, d * sizeof(float));
	}
	return 0;
}

int lm_model_forward(
	struct lm_model *model, const struct lm_kv *kv, const int32_t *tokens, uint32_t pos, uint32_t count, char *text)
{
	const struct lm_config *c = &model->config;
	int e;

	if (count == 0 || pos > c->max_positions || count > c->max_positions - pos)
		return lm_fail(text, -EINVAL, "positions %u to %llu: the model has max_position_embeddings %u", pos,
			(unsigned long long)pos + count, c->max_positions);
	e = grow_chunk(model, count, text);
	if (e == 0)
		e = embed(model, tokens, count, text);
	if (e < 0)
		return e;
	model->rows = count;
	lm_rope_table(model->cosines, model->sines, pos, count, c->head_dim, c->rope_theta);
	for (uint32_t layer = 0; layer < c->layers; layer++) {
		e = run_layer(model, kv, layer, pos, text);
		if (e < 0)
			return e;
	}
	return 0;
}

const float *lm_model_logits(struct lm_model *model, uint32_t row)
{
	size_t d = model->config.hidden;

	lm_rmsnorm(model->h, model->x + row * d, model->weights.norm, d, (float)model->config.norm_eps);
	linear(model, (struct product){.x = model->h,
			      .x_stride = d,
			      .rows = 1,
			      .w = model->weights.head,
			      .n = model->config.vocab,
			      .k = d,
			      .y = model->logits});
	return model->logits;
}
