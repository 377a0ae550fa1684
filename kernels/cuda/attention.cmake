target_sources(kvg_cuda PRIVATE attention.c attention_decode.c)
kvg_cuda_image(attention)
kvg_cuda_image(attention_decode)
