target_sources(kvg_cuda PRIVATE maxima.c)
kvg_cuda_image(maxima)
