#include "tools/lm/config.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#define ARCHITECTURE "Qwen3ForCausalLM"

struct reader {
	const json_t *root;
	const char *path;
	char *text;
};

/* Integers of the file, with the bounds that keep every later product of sizes in range. */
static const struct {
	const char *key;
	uint32_t max;
	size_t offset;
} integers[] = {
	{"hidden_size", 1u << 16, offsetof(struct lm_config, hidden)},
	{"intermediate_size", 1u << 18, offsetof(struct lm_config, intermediate)},
	{"num_hidden_layers", 1u << 10, offsetof(struct lm_config, layers)},
	{"num_attention_heads", 1u << 10, offsetof(struct lm_config, heads)},
	{"num_key_value_heads", 1u << 10, offsetof(struct lm_config, kv_heads)},
	{"vocab_size", 1u << 20, offsetof(struct lm_config, vocab)},
	{"max_position_embeddings", 1u << 24, offsetof(struct lm_config, max_positions)},
};

static int read_integer(const struct reader *r, const char *key, uint32_t max, uint32_t *ret)
{
	const json_t *value = json_object_get(r->root, key);
	json_int_t number;

	if (!value)
		return lm_fail(r->text, -EINVAL, "%s: %s is missing", r->path, key);
	if (!json_is_integer(value))
		return lm_fail(r->text, -EINVAL, "%s: %s is not an integer", r->path, key);
	number = json_integer_value(value);
	if (number < 1 || number > (json_int_t)max)
		return lm_fail(
			r->text, -EINVAL, "%s: %s is %lld, not within 1 and %u", r->path, key, (long long)number, max);
	*ret = (uint32_t)number;
	return 0;
}

static int read_number(const struct reader *r, const json_t *object, const char *key, double *value)
{
	const json_t *number = json_object_get(object, key);

	if (!number)
		return 0;
	if (!json_is_number(number) || json_number_value(number) <= 0.0)
		return lm_fail(r->text, -EINVAL, "%s: %s is not a positive number", r->path, key);
	*value = json_number_value(number);
	return 0;
}

static int read_bool(const struct reader *r, const char *key, bool *value)
{
	const json_t *flag = json_object_get(r->root, key);

	if (!flag)
		return 0;
	if (!json_is_boolean(flag))
		return lm_fail(r->text, -EINVAL, "%s: %s is neither true nor false", r->path, key);
	*value = json_is_true(flag);
	return 0;
}

static int check_architecture(const struct reader *r)
{
	const char *name = json_string_value(json_array_get(json_object_get(r->root, "architectures"), 0));

	if (!name)
		return lm_fail(r->text, -EINVAL, "%s: architectures is missing", r->path);
	if (strcmp(name, ARCHITECTURE) != 0)
		return lm_fail(
			r->text, -EOPNOTSUPP, "architecture %s in %s: kvgate-lm runs " ARCHITECTURE, name, r->path);
	return 0;
}

/* rope_scaling, or rope_parameters as newer files have it: only the plain kind is built. */
static int check_rope(const struct reader *r, const char *key)
{
	const json_t *rope = json_object_get(r->root, key);
	const char *type;

	if (!rope || json_is_null(rope))
		return 0;
	type = json_string_value(json_object_get(rope, "rope_type"));
	if (!type)
		type = json_string_value(json_object_get(rope, "type"));
	if (!type || strcmp(type, "default") != 0)
		return lm_fail(r->text, -EOPNOTSUPP, "%s of type %s in %s: kvgate-lm has plain rotary positions only",
			key, type ? type : "(none)", r->path);
	return 0;
}

static int check_flag_off(const struct reader *r, const char *key)
{
	bool on = false;
	int e = read_bool(r, key, &on);

	if (e < 0)
		return e;
	if (on)
		return lm_fail(
			r->text, -EOPNOTSUPP, "%s is true in %s: kvgate-lm runs models without it", key, r->path);
	return 0;
}

static int check_supported(const struct reader *r)
{
	const char *act = json_string_value(json_object_get(r->root, "hidden_act"));
	const json_t *quantization = json_object_get(r->root, "quantization_config");
	int e = check_architecture(r);

	if (e == 0)
		e = check_rope(r, "rope_scaling");
	if (e == 0)
		e = check_rope(r, "rope_parameters");
	if (e == 0)
		e = check_flag_off(r, "attention_bias");
	if (e == 0)
		e = check_flag_off(r, "use_sliding_window");
	if (e < 0)
		return e;
	if (act && strcmp(act, "silu") != 0)
		return lm_fail(r->text, -EOPNOTSUPP, "hidden_act %s in %s: kvgate-lm has silu only", act, r->path);
	if (quantization && !json_is_null(quantization))
		return lm_fail(r->text, -EOPNOTSUPP,
			"quantization_config in %s: kvgate-lm runs bf16, f16 and f32 weights", r->path);
	return 0;
}

static int read_head_dim(const struct reader *r, struct lm_config *config)
{
	const json_t *value = json_object_get(r->root, "head_dim");

	if (value && !json_is_null(value)) {
		int e = read_integer(r, "head_dim", 1u << 10, &config->head_dim);

		if (e < 0)
			return e;
	} else {
		config->head_dim = config->hidden / config->heads;
	}
	if (config->head_dim == 0 || config->head_dim % 2 != 0)
		return lm_fail(r->text, -EINVAL, "%s: head_dim is %u, not even", r->path, config->head_dim);
	return 0;
}

static int read_fields(const struct reader *r, struct lm_config *config)
{
	int e;

	for (size_t i = 0; i < sizeof(integers) / sizeof(integers[0]); i++) {
		uint32_t *field = (uint32_t *)(void *)((char *)config + integers[i].offset);

		e = read_integer(r, integers[i].key, integers[i].max, field);
		if (e < 0)
			return e;
	}
	if (config->heads % config->kv_heads != 0)
		return lm_fail(r->text, -EINVAL,
			"%s: num_attention_heads is %u, not a multiple of num_key_value_heads %u", r->path,
			config->heads, config->kv_heads);
	e = read_head_dim(r, config);
	if (e == 0)
		e = read_number(r, json_object_get(r->root, "rope_parameters"), "rope_theta", &config->rope_theta);
	if (e == 0)
		e = read_number(r, r->root, "rope_theta", &config->rope_theta);
	if (e == 0)
		e = read_number(r, r->root, "rms_norm_eps", &config->norm_eps);
	if (e == 0)
		e = read_bool(r, "tie_word_embeddings", &config->tied);
	return e;
}

static int load_json(const char *path, json_t **ret, char *text)
{
	json_error_t error;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return lm_fail(text, -errno, "%s: %s", path, strerror(errno));
	*ret = json_loadfd(fd, JSON_REJECT_DUPLICATES, &error);
	(void)close(fd);
	if (!*ret)
		return lm_fail(text, -EINVAL, "%s:%d: %s", path, error.line, error.text);
	if (!json_is_object(*ret)) {
		json_decref(*ret);
		return lm_fail(text, -EINVAL, "%s: not a JSON object", path);
	}
	return 0;
}

int lm_config_read(const char *dir, struct lm_config *ret, char *text)
{
	struct lm_config config = {.rope_theta = 10000.0, .norm_eps = 1e-6};
	char path[4096];
	json_t *root = NULL;
	struct reader reader;
	int e;

	if (snprintf(path, sizeof(path), "%s/config.json", dir) >= (int)sizeof(path))
		return lm_fail(text, -ENAMETOOLONG, "%.64s...: the path is longer than %zu bytes", dir, sizeof(path));
	e = load_json(path, &root, text);
	if (e < 0)
		return e;
	reader = (struct reader){.root = root, .path = path, .text = text};
	e = check_supported(&reader);
	if (e == 0)
		e = read_fields(&reader, &config);
	json_decref(root);
	if (e == 0)
		*ret = config;
	return e;
}
