# Gates: gate_sm90 holds code that only compute capability 9.0 runs.
target_sources(kvg_cuda PRIVATE gate.c gate_model.c)
kvg_cuda_image(gate)
kvg_cuda_image(gate_sm90 ARCHS 90a)
