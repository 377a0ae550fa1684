/* gates.h - the gates of a model, one for each layer, as the scoring uses them. */
#ifndef KVG_GATES_H
#define KVG_GATES_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/host/gate.h"
#include "proto/kvgate_abi.h"

struct kind;
struct kvg_cuda_gate;

struct gate_set {
	uint32_t layers, folded, width;
	struct kvg_cuda_gate *device; /* cuda: all layers' weights on the device */
	uint64_t device_bytes;        /* of them */
	struct kvg_gate *gates[];     /* host */
};

/*
 * Reads a gate file from a memfd that is sealed against any change, and checks it against the layout (layers,
 * KV heads, group, hidden_dim). Long work: runs on the executor. 0 or a negative errno with text.
 */
int gate_set_load(int fd, const struct kvg_layout *layout, struct kind *kind, struct gate_set **ret, char *text,
	size_t text_size);

/* Gives back what it holds on the device, on the executor. NULL is fine. */
void gate_set_close(struct gate_set *set);

/* A closed set, or one of the host kind. NULL is fine; returns NULL. */
struct gate_set *gate_set_free(struct gate_set *set);

#endif
