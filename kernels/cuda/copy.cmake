target_sources(kvg_cuda PRIVATE copy.c)
kvg_cuda_image(copy)
