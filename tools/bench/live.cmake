# What works with a live daemon: churn, tiers, insitu, timeline. bench_content is shared with tests/gpu.
add_library(bench_content STATIC content.c)
target_link_libraries(bench_content PUBLIC kvgate kvg_kernels)
target_sources(kvgate-bench PRIVATE churn.c churn_worker.c service.c tiers.c)
target_link_libraries(kvgate-bench PRIVATE bench_content)

if(TARGET kvg_cuda)
  # The benchmarks' own device code lies in bench_content, not in the library of kernels.
  set(codes "")
  foreach(arch ${KVG_CUDA_ARCHS})
    if(arch STREQUAL "ptx")
      list(APPEND codes -gencode arch=compute_90,code=compute_90)
    else()
      list(APPEND codes -gencode arch=compute_${arch},code=sm_${arch})
    endif()
  endforeach()
  set(fatbin "${CMAKE_CURRENT_BINARY_DIR}/synthetic.fatbin")
  add_custom_command(OUTPUT "${fatbin}"
    COMMAND "${KVG_NVCC}" -fatbin ${codes} -std=c++17 -O3 -Werror all-warnings -I "${PROJECT_SOURCE_DIR}"
      -o "${fatbin}" "${CMAKE_CURRENT_SOURCE_DIR}/synthetic.cu"
    DEPENDS synthetic.cu content.h VERBATIM)
  set_source_files_properties(synthetic.c PROPERTIES OBJECT_DEPENDS "${fatbin}")
  target_sources(bench_content PRIVATE synthetic.c)
  target_compile_definitions(bench_content PRIVATE "SYNTHETIC_IMAGE=\"${fatbin}\"")
  target_link_libraries(bench_content PUBLIC kvg_cuda)
  target_sources(kvgate-bench PRIVATE insitu.c insitu_model.c insitu_neighbour.c insitu_rounds.c insitu_worker.c tiers_gpu.c timeline.c)
else()
  target_sources(kvgate-bench PRIVATE no_live.c)
endif()
