target_sources(kvg_cuda PRIVATE tier.c)
kvg_cuda_image(tier)
