/* cleanup.h - memory that is freed at the end of its scope. */
#ifndef KVG_LM_CLEANUP_H
#define KVG_LM_CLEANUP_H

#include <stdlib.h>

static inline void lm_cleanup_free(void *pointer)
{
	free(*(void **)pointer);
}

#define _cleanup_free_ __attribute__((cleanup(lm_cleanup_free)))

#endif
