target_sources(kvg_cuda PRIVATE select.c)
kvg_cuda_image(select)
