#include "tools/lm/prompt.h"

#include <stdlib.h>

#include "tools/lm/worker.h"

static void copy_bytes(int32_t *tokens, const uint8_t *bytes, uint32_t size)
{
	for (uint32_t i = 0; i < size; i++)
		tokens[i] = bytes[i];
}

int32_t *lm_prompt_context(const uint8_t *bytes, uint32_t size)
{
	int32_t *tokens = malloc(((size_t)size + 1) * sizeof(*tokens));

	if (!tokens)
		return NULL;
	tokens[0] = LM_TOKEN_BOS;
	copy_bytes(tokens + 1, bytes, size);
	return tokens;
}

int32_t *lm_prompt_query(const uint8_t *name, uint32_t size)
{
	int32_t *tokens = malloc(((size_t)size + 2) * sizeof(*tokens));

	if (!tokens)
		return NULL;
	tokens[0] = LM_TOKEN_QUERY;
	copy_bytes(tokens + 1, name, size);
	tokens[size + 1] = LM_TOKEN_REPLY;
	return tokens;
}

int lm_prompt_matches(const int32_t *tokens, uint32_t count, const uint8_t *bytes, uint32_t size)
{
	if (count < size)
		return 0;
	for (uint32_t i = 0; i < size; i++)
		if (tokens[i] != bytes[i])
			return 0;
	return 1;
}
