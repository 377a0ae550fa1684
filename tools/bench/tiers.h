/* tiers.h - `kvgate-bench tiers`, and its part that needs a GPU. */
#ifndef KVG_BENCH_TIERS_H
#define KVG_BENCH_TIERS_H

#include <stddef.h>

struct kvg_client;

int bench_tiers(int argc, char **argv);

/* What this machine copies, bytes a second: large copies, and halves of blocks one by one; out of the worker's memory
 * and into it. */
struct tiers_rates {
	double out, in, loop_out, loop_in;
	double batch_out, batch_in; /* halves of blocks in cuMemcpyBatchAsync(); 0: there is none */
};

/* The device as a worker uses it. Only where the kind cuda is built; a negative errno with a line on standard error. */
struct tiers_gpu;
int tiers_gpu_open(int ordinal, struct tiers_gpu **ret);
struct tiers_gpu *tiers_gpu_close(struct tiers_gpu *gpu);
int tiers_gpu_join(const struct tiers_gpu *gpu, struct kvg_client *client);
int tiers_gpu_rates(const struct tiers_gpu *gpu, size_t half, struct tiers_rates *ret);

#endif
