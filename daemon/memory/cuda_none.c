#include <errno.h>
#include <stdio.h>

#include "daemon/memory/kind.h"

int kind_cuda_new(int ordinal, struct kind **ret, char *text, size_t text_size)
{
	(void)ordinal;
	(void)ret;
	(void)snprintf(text, text_size, "kind cuda: this kvgated was built without the CUDA toolkit");
	return -EOPNOTSUPP;
}
