/* cuda.h - what the library's CUDA parts share; only they include it. */
#ifndef KVG_CLIENT_CUDA_H
#define KVG_CLIENT_CUDA_H

#include "client/client.h"
#include "kernels/cuda/device.h"

/*
 * Makes the device's context current in this thread and puts back what was there at the end of the block; calls
 * that find it current, as under PyTorch, change nothing.
 */
struct cuda_scope {
	const struct kvg_cuda *cuda; /* NULL: nothing to put back */
	CUresult result;
};
struct cuda_scope cuda_scope_enter(const struct kvg_cuda *cuda);
void cuda_scope_leave(struct cuda_scope *scope);
#define CUDA_SCOPE(device) struct cuda_scope scope __attribute__((cleanup(cuda_scope_leave))) = cuda_scope_enter(device)

/* Imports a descriptor's memory, maps its first `size` bytes at an address of a reserved range, and lets the device
 * read there, and write if it is writable. */
CUresult cuda_map(const struct kvg_cuda *cuda, uint64_t address, uint64_t size, int fd, bool writable);

/* 0, or a negative errno with kvg_error() "WHAT: CUDA_ERROR_..."; an error that ends the context breaks the connection.
 */
int cuda_status(struct kvg_client *client, CUresult result, const char *what);

/* The client's stream. */
static inline CUstream cuda_stream(const struct kvg_client *client)
{
	return client->gpu->stream;
}

/* Whether the stream is being captured; then 0 is returned for calls that may be, and -EBUSY with kvg_error()
 * otherwise. */
int cuda_check_stream(struct kvg_client *client, const char *call);

#endif
