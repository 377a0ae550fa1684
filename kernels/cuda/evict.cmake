target_sources(kvg_cuda PRIVATE evict.c)
kvg_cuda_image(evict)
