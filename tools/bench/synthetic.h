/*
 * synthetic.h - kernels of the benchmarks' own: content that can be checked, the device's clock, and time that
 * passes; and the device in a worker's process. Only where the kind cuda is built.
 */
#ifndef KVG_BENCH_SYNTHETIC_H
#define KVG_BENCH_SYNTHETIC_H

#include "kernels/cuda/device.h"
#include "tools/bench/content.h"

struct synthetic {
	struct kvg_cuda *cuda; /* owned */
	CUstream stream;       /* the worker's: its own kernels and what libkvgate enqueues */
	CUmodule module;
	CUfunction fill, check, gather, clock, spin, poke;
};

/* Opens the device with that ordinal, whose primary context becomes current. A negative errno with a line on standard
 * error. */
int synthetic_open(int ordinal, struct synthetic **ret);
struct synthetic *synthetic_close(struct synthetic *synthetic);

/* Writes content of `count` appended tokens from number `first` on (token j is position fold_pos + j). */
CUresult synthetic_fill(const struct synthetic *synthetic, const struct content_kv *kv, uint64_t tag, uint32_t slot,
	uint32_t fold_pos, uint32_t first, uint32_t count);

/* As content_check(), of base_len + appended pairs a row; bits and counts are device memory, zeroed by the caller. */
CUresult synthetic_check(const struct synthetic *synthetic, const struct content_kv *kv, uint64_t tag, uint32_t slot,
	uint32_t appended, uint32_t end, CUdeviceptr bits, uint32_t words, CUdeviceptr counts);

/*
 * What an engine does in each decode step to have rows scored later: one row for each sequence and layer is copied to
 * [sequence][layer][capacity][row_bytes] of `to`, at place appended[slot]. Layers of the source are source_layer
 * bytes apart and rows source_row; with source_rows the row is another one in each step, otherwise it is
 * the sequence's number. 16-byte alignment. A slot of UINT32_MAX has no row.
 */
CUresult synthetic_gather(const struct synthetic *synthetic, const struct synthetic_gather_args *args,
	uint32_t sequences, uint32_t layers);

/* Stores %globaltimer (ns) at a device address when the stream gets there. */
CUresult synthetic_clock(const struct synthetic *synthetic, CUdeviceptr at, CUstream stream);

/* Keeps `blocks` blocks of the device busy for that many nanoseconds (at most 10 s). */
CUresult synthetic_spin(const struct synthetic *synthetic, unsigned blocks, uint64_t ns, CUstream stream);

/* Writes to an address, valid or not: the fault of a careless worker. */
CUresult synthetic_poke(const struct synthetic *synthetic, CUdeviceptr at, CUstream stream);

/* Says what failed on standard error; 0 or a negative errno. */
int synthetic_result(const struct synthetic *synthetic, CUresult result, const char *what);

#endif
