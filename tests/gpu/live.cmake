# Tests with a real kvgated of the kind cuda: gpu/parity, gpu/workers, gpu/isolation, gpu/mps, gpu/tiers, and some seconds of churn.
add_library(gpu_live STATIC live.c "${PROJECT_SOURCE_DIR}/tools/bench/service.c")
target_link_libraries(gpu_live PUBLIC integration bench_content kvg_cuda)

foreach(name parity workers isolation mps tiers)
  add_executable("gpu_${name}" "live_${name}.c")
  target_link_libraries("gpu_${name}" PRIVATE gpu_live)
  target_compile_definitions("gpu_${name}" PRIVATE "KVG_BIN_ROLE=\"$<TARGET_FILE:integration_role>\"")
  add_dependencies("gpu_${name}" kvgated integration_role)
  add_test(NAME "gpu/${name}" COMMAND "gpu_${name}" WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}/tests/data")
  set_tests_properties("gpu/${name}" PROPERTIES
    TIMEOUT 300 RUN_SERIAL ON SKIP_RETURN_CODE 77 ENVIRONMENT OPENBLAS_NUM_THREADS=1)
endforeach()
