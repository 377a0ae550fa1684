/*
 * checkpoint.h - the tensors of a model folder by name, whether they lie in one
 * safetensors file or in shards with an index. Shards are files of the folder itself:
 * an index that names a path is refused.
 */
#ifndef KVG_LM_CHECKPOINT_H
#define KVG_LM_CHECKPOINT_H

#include "proto/safetensors.h"
#include "tools/lm/text.h"

struct lm_checkpoint;

/* Opens DIR/model.safetensors, or the shards of DIR/model.safetensors.index.json. 0 or a negative errno with text. */
int lm_checkpoint_open(const char *dir, struct lm_checkpoint **ret, char *text);
struct lm_checkpoint *lm_checkpoint_free(struct lm_checkpoint *checkpoint); /* NULL is fine; returns NULL */

/*
 * Copies the tensor `name`, which must be bf16, f16 or f32 of shape [rows][columns] (columns 0: [rows]),
 * to dst as fp32. 0, -ENOENT or -EINVAL with text.
 */
int lm_checkpoint_read(const struct lm_checkpoint *checkpoint, const char *name, uint64_t rows, uint64_t columns,
	float *dst, char *text);

#endif
