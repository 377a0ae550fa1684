/*
 * gpu_cublas.h - the rival of our matrix products: cuBLASLt, loaded when it is there.
 */
#ifndef KVG_BENCH_GPU_CUBLAS_H
#define KVG_BENCH_GPU_CUBLAS_H

#include "tools/bench/gpu.h"

/* A prepared product; enqueued like any work of the benchmark. */
struct gpu_cublas;

/*
 * Prepares [m, k] x [n, k]^T -> [m, n], all bf16 and row-major with fp32 sums, by the library's best guess. NULL, with
 * one line on stderr, where cuBLASLt is absent or refuses; that is no failure of the benchmark. a, b and c are device
 * memory that outlives the product.
 */
struct gpu_cublas *gpu_cublas_new(
	struct gpu_bench *bench, uint64_t m, uint64_t n, uint64_t k, CUdeviceptr a, CUdeviceptr b, CUdeviceptr c);
struct gpu_cublas *gpu_cublas_free(struct gpu_cublas *product); /* NULL is fine; returns NULL */

/* A gpu_work: user is the struct gpu_cublas. */
CUresult gpu_cublas_enqueue(void *user, CUstream stream, unsigned turn);

/* Median microseconds of that product on random numbers; 0 where it cannot be had. */
double gpu_cublas_us(struct gpu_bench *bench, uint64_t m, uint64_t n, uint64_t k);

#endif
