#include "daemon/memory/kind.h"

struct kind *kind_free(struct kind *kind)
{
	if (!kind)
		return NULL;
	if (kind->detach)
		kind->detach(kind->attached);
	return kind->ops->free(kind);
}
