/* prompt.h - bytes as tokens: the prompts of the pilot's byte-level vocabulary. Token arrays are the caller's to free.
 */
#ifndef KVG_LM_PROMPT_H
#define KVG_LM_PROMPT_H

#include <stddef.h>
#include <stdint.h>

/* [BOS, bytes...], size + 1 tokens; NULL without memory. */
int32_t *lm_prompt_context(const uint8_t *bytes, uint32_t size);

/* [QUERY, name bytes..., REPLY], size + 2 tokens; NULL without memory. */
int32_t *lm_prompt_query(const uint8_t *name, uint32_t size);

/* Whether the first `size` of `count` tokens are these bytes. */
int lm_prompt_matches(const int32_t *tokens, uint32_t count, const uint8_t *bytes, uint32_t size);

#endif
