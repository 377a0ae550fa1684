#include "tools/bench/gpu_cublas.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

#define WORKSPACE ((size_t)64 << 20)

struct gpu_cublas {
	struct gpu_bench *bench;
	void *library;
	__typeof__(&cublasLtCreate) create;
	__typeof__(&cublasLtDestroy) destroy;
	__typeof__(&cublasLtMatmul) matmul;
	__typeof__(&cublasLtMatmulDescCreate) desc_create;
	__typeof__(&cublasLtMatmulDescDestroy) desc_destroy;
	__typeof__(&cublasLtMatmulDescSetAttribute) desc_set;
	__typeof__(&cublasLtMatrixLayoutCreate) layout_create;
	__typeof__(&cublasLtMatrixLayoutDestroy) layout_destroy;
	__typeof__(&cublasLtMatmulPreferenceCreate) preference_create;
	__typeof__(&cublasLtMatmulPreferenceDestroy) preference_destroy;
	__typeof__(&cublasLtMatmulPreferenceSetAttribute) preference_set;
	__typeof__(&cublasLtMatmulAlgoGetHeuristic) heuristic;
	cublasLtHandle_t handle;
	cublasLtMatmulDesc_t desc;
	cublasLtMatrixLayout_t weights, rows, out;
	cublasLtMatmulHeuristicResult_t best;
	CUdeviceptr a, b, c, workspace;
};

/* Where the toolkit and PyTorch put it. */
static const char *const places[] = {
	"libcublasLt.so.13",
	"/usr/local/cuda/lib64/libcublasLt.so.13",
	"/usr/local/cuda/targets/x86_64-linux/lib/libcublasLt.so.13",
	"/usr/local/lib/python3.12/dist-packages/nvidia/cu13/lib/libcublasLt.so.13",
	"/usr/lib/python3/dist-packages/nvidia/cu13/lib/libcublasLt.so.13",
	"libcublasLt.so.12",
};

static bool find_library(struct gpu_cublas *p)
{
	const char *path = getenv("KVG_CUBLASLT");

	if (path)
		p->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	for (size_t i = 0; i < sizeof(places) / sizeof(*places) && !p->library; i++)
		p->library = dlopen(places[i], RTLD_NOW | RTLD_LOCAL);
	if (!p->library)
		(void)fprintf(
			stderr, "cuBLASLt is not found, so its times are missing; KVG_CUBLASLT may name the file\n");
	return p->library;
}

static bool find_symbols(struct gpu_cublas *p)
{
	const struct {
		const char *name;
		void *at;
	} symbols[] = {
		{"cublasLtCreate", &p->create},
		{"cublasLtDestroy", &p->destroy},
		{"cublasLtMatmul", &p->matmul},
		{"cublasLtMatmulDescCreate", &p->desc_create},
		{"cublasLtMatmulDescDestroy", &p->desc_destroy},
		{"cublasLtMatmulDescSetAttribute", &p->desc_set},
		{"cublasLtMatrixLayoutCreate", &p->layout_create},
		{"cublasLtMatrixLayoutDestroy", &p->layout_destroy},
		{"cublasLtMatmulPreferenceCreate", &p->preference_create},
		{"cublasLtMatmulPreferenceDestroy", &p->preference_destroy},
		{"cublasLtMatmulPreferenceSetAttribute", &p->preference_set},
		{"cublasLtMatmulAlgoGetHeuristic", &p->heuristic},
	};

	for (size_t i = 0; i < sizeof(symbols) / sizeof(*symbols); i++) {
		void *symbol = dlsym(p->library, symbols[i].name);

		if (!symbol) {
			(void)fprintf(stderr, "cuBLASLt has no %s\n", symbols[i].name);
			return false;
		}
		*(void **)symbols[i].at = symbol;
	}
	return true;
}

/* Column-major, as the library counts: out [n, m] = weights [k, n]^T x rows [k, m]. */
static cublasStatus_t describe(struct gpu_cublas *p, uint64_t m, uint64_t n, uint64_t k)
{
	const cublasOperation_t transposed = CUBLAS_OP_T;
	cublasStatus_t status = p->create(&p->handle);

	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->desc_create(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->desc_set(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed));
	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->layout_create(&p->weights, CUDA_R_16BF, k, n, (int64_t)k);
	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->layout_create(&p->rows, CUDA_R_16BF, k, m, (int64_t)k);
	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->layout_create(&p->out, CUDA_R_16BF, n, m, (int64_t)n);
	return status;
}

static cublasStatus_t choose(struct gpu_cublas *p)
{
	const size_t workspace = WORKSPACE;
	cublasLtMatmulPreference_t preference = NULL;
	int found = 0;
	cublasStatus_t status = p->preference_create(&preference);

	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->preference_set(
			preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
	if (status == CUBLAS_STATUS_SUCCESS)
		status = p->heuristic(
			p->handle, p->desc, p->weights, p->rows, p->out, p->out, preference, 1, &p->best, &found);
	if (preference)
		(void)p->preference_destroy(preference);
	return status == CUBLAS_STATUS_SUCCESS && found == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : status;
}

struct gpu_cublas *gpu_cublas_new(
	struct gpu_bench *bench, uint64_t m, uint64_t n, uint64_t k, CUdeviceptr a, CUdeviceptr b, CUdeviceptr c)
{
	struct gpu_cublas *p = calloc(1, sizeof(*p));
	cublasStatus_t status;

	if (!p)
		return NULL;
	*p = (struct gpu_cublas){.bench = bench, .a = a, .b = b, .c = c};
	if (!find_library(p) || !find_symbols(p))
		return gpu_cublas_free(p);
	p->workspace = gpu_alloc(bench, WORKSPACE);
	if (!p->workspace)
		return gpu_cublas_free(p);
	status = describe(p, m, n, k);
	if (status == CUBLAS_STATUS_SUCCESS)
		status = choose(p);
	if (status == CUBLAS_STATUS_SUCCESS)
		return p;
	(void)fprintf(stderr, "cuBLASLt refuses the product: status %d\n", (int)status);
	return gpu_cublas_free(p);
}

struct gpu_cublas *gpu_cublas_free(struct gpu_cublas *p)
{
	if (!p)
		return NULL;
	if (p->weights)
		(void)p->layout_destroy(p->weights);
	if (p->rows)
		(void)p->layout_destroy(p->rows);
	if (p->out)
		(void)p->layout_destroy(p->out);
	if (p->desc)
		(void)p->desc_destroy(p->desc);
	if (p->handle)
		(void)p->destroy(p->handle);
	if (p->workspace)
		gpu_free(p->bench, p->workspace);
	free(p); /* the library stays loaded: it keeps state in the context */
	return NULL;
}

CUresult gpu_cublas_enqueue(void *user, CUstream stream, unsigned turn)
{
	struct gpu_cublas *p = user;
	const float one = 1, zero = 0;
	void *weights = (void *)(uintptr_t)p->b, *rows = (void *)(uintptr_t)p->a, *out = (void *)(uintptr_t)p->c;

	(void)turn;
	return p->matmul(p->handle, p->desc, &one, weights, p->weights, rows, p->rows, &zero, out, p->out, out, p->out,
		       &p->best.algo, (void *)(uintptr_t)p->workspace, WORKSPACE,
		       (cudaStream_t)stream) == CUBLAS_STATUS_SUCCESS
		       ? CUDA_SUCCESS
		       : CUDA_ERROR_LAUNCH_FAILED;
}

#else

struct gpu_cublas *gpu_cublas_new(
	struct gpu_bench *bench, uint64_t m, uint64_t n, uint64_t k, CUdeviceptr a, CUdeviceptr b, CUdeviceptr c)
{
	(void)bench, (void)m, (void)n, (void)k, (void)a, (void)b, (void)c;
	(void)fprintf(stderr, "built without cublasLt.h, so the times of cuBLASLt are missing\n");
	return NULL;
}

struct gpu_cublas *gpu_cublas_free(struct gpu_cublas *product)
{
	(void)product;
	return NULL;
}

CUresult gpu_cublas_enqueue(void *user, CUstream stream, unsigned turn)
{
	(void)user, (void)stream, (void)turn;
	return CUDA_ERROR_NOT_SUPPORTED;
}

#endif

double gpu_cublas_us(struct gpu_bench *bench, uint64_t m, uint64_t n, uint64_t k)
{
	CUdeviceptr a = gpu_random(bench, m * k * 2, 1.0f), b = gpu_random(bench, n * k * 2, 0.02f);
	CUdeviceptr c = gpu_alloc(bench, m * n * 2);
	double us = 0;

	if (a && b && c) {
		struct gpu_cublas *product = gpu_cublas_new(bench, m, n, k, a, b, c);

		if (product)
			us = gpu_time(bench, gpu_cublas_enqueue, product, false);
		(void)gpu_cublas_free(product);
	}
	gpu_free(bench, a);
	gpu_free(bench, b);
	gpu_free(bench, c);
	return us > 0 ? us : 0;
}
