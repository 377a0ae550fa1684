/*
 * gate_sm90.cuh - the instructions of compute capability 9.0 that the gate uses: matrix products of a warpgroup from
 * shared memory, tiles brought by the tensor copy engine, and the barriers between them. (PTX ISA 8.x: wgmma,
 * cp.async.bulk.tensor, mbarrier, setmaxnreg)
 */
#ifndef KVG_CUDA_GATE_SM90_CUH
#define KVG_CUDA_GATE_SM90_CUH

#include <cuda.h>
#include <stdint.h>

__device__ __forceinline__ unsigned shared_address(const void *at)
{
	return (unsigned)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ unsigned cluster_rank()
{
	unsigned rank;

	asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
	return rank;
}

__device__ __forceinline__ void cluster_sync()
{
	asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

/* ---- barriers in shared memory ---- */

__device__ __forceinline__ void barrier_init(uint64_t *barrier, unsigned count)
{
	asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

/* Makes the initialised barriers known to the other block of the cluster and to the copy engine. */
__device__ __forceinline__ void barrier_publish()
{
	asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ bool barrier_try(unsigned barrier, unsigned parity)
{
	unsigned done;

	asm volatile("{\n.reg .pred p;\n"
		     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
		     "selp.u32 %0, 1, 0, p;\n}"
		     : "=r"(done)
		     : "r"(barrier), "r"(parity)
		     : "memory");
	return done;
}

/* Waits for the phase of that parity; gives up the kernel after some seconds, because then an arrival was lost. */
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned parity)
{
	const unsigned at = shared_address(barrier);

	if (barrier_try(at, parity))
		return;
	for (unsigned tries = 0; tries < (1u << 26); tries++)
		if (barrier_try(at, parity))
			return;
	__trap();
}

/* One arrival, and the phase ends only when that many bytes have come too. */
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, unsigned bytes)
{
	asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
		     : "memory");
}

/*
 * One arrival at the barrier at the same place in a block of the cluster. It orders nothing of other memory there:
 * that would cost a microsecond, and only the copy engine and the products touch the stages.
 */
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier, unsigned rank)
{
	asm volatile("{\n.reg .b32 at;\n"
		     "mapa.shared::cluster.u32 at, %0, %1;\n"
		     "mbarrier.arrive.shared::cluster.b64 _, [at];\n}" ::"r"(shared_address(barrier)),
		     "r"(rank)
		     : "memory");
}

/* ---- tiles ---- */

/* Fetches the map itself. */
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map)
{
	asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Brings a box at (column, row, layer) into this block. */
__device__ __forceinline__ void bring(
	void *to, const CUtensorMap *map, uint64_t *barrier, unsigned column, unsigned row, unsigned layer)
{
	asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
		     "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
		     "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(layer)
		     : "memory");
}

/* The same for what nobody reads again: it leaves the second cache first. */
__device__ __forceinline__ void bring_once(
	void *to, const CUtensorMap *map, uint64_t *barrier, unsigned column, unsigned row, unsigned layer)
{
	asm volatile("{\n.reg .b64 policy;\n"
		     "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
		     "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
		     "[%0], [%1, {%3, %4, %5}], [%2], policy;\n}" ::"r"(shared_address(to)),
		     "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(layer)
		     : "memory");
}

/* Brings it to the same place in both blocks of the cluster and tells both barriers. */
__device__ __forceinline__ void bring_both(
	void *to, const CUtensorMap *map, uint64_t *barrier, unsigned column, unsigned row, unsigned layer)
{
	asm volatile(
		"cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
		"[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
		"l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(layer), "h"((uint16_t)3)
		: "memory");
}

/* ---- products ---- */

template <int COUNT> __device__ __forceinline__ void registers_raise()
{
	asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void registers_lower()
{
	asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* Describes a tile of rows of 128 bytes, swizzled as the copy engine does it (8 rows of 128 bytes repeat). */
__device__ __forceinline__ uint64_t tile_descriptor(const void *at)
{
	return (uint64_t)((shared_address(at) & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 |
	       (uint64_t)1 << 62;
}

__device__ __forceinline__ void product_begin()
{
	asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void product_commit()
{
	asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void product_wait()
{
	asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define LIST_10(tens)                                                                                                  \
	"%" tens "0,%" tens "1,%" tens "2,%" tens "3,%" tens "4,%" tens "5,%" tens "6,%" tens "7,%" tens "8,%" tens "9"
#define LIST_60  LIST_10("") "," LIST_10("1") "," LIST_10("2") "," LIST_10("3") "," LIST_10("4") "," LIST_10("5")
#define LIST_64  LIST_60 ",%60,%61,%62,%63"
#define LIST_80  LIST_60 "," LIST_10("6") "," LIST_10("7")
#define LIST_90  LIST_80 "," LIST_10("8")
#define LIST_96  LIST_90 ",%90,%91,%92,%93,%94,%95"
#define LIST_120 LIST_90 "," LIST_10("9") "," LIST_10("10") "," LIST_10("11")
#define LIST_128 LIST_120 ",%120,%121,%122,%123,%124,%125,%126,%127"

#define OPERANDS_4(at)  "+f"(sums[at]), "+f"(sums[(at) + 1]), "+f"(sums[(at) + 2]), "+f"(sums[(at) + 3])
#define OPERANDS_16(at) OPERANDS_4(at), OPERANDS_4((at) + 4), OPERANDS_4((at) + 8), OPERANDS_4((at) + 12)
#define OPERANDS_64     OPERANDS_16(0), OPERANDS_16(16), OPERANDS_16(32), OPERANDS_16(48)
#define OPERANDS_80     OPERANDS_64, OPERANDS_16(64)
#define OPERANDS_96     OPERANDS_80, OPERANDS_16(80)
#define OPERANDS_128    OPERANDS_96, OPERANDS_16(96), OPERANDS_16(112)

/* sums (64 x N, fp32) = rows (64 x 16) . weights (N x 16)^T, plus the sums before where `add` is not 0. */
template <int N>
__device__ __forceinline__ void product(float (&sums)[N / 2], uint64_t rows, uint64_t weights, int add);

#define PRODUCT(N, COUNT, ROWS, WEIGHTS, ADD)                                                                          \
	template <>                                                                                                    \
	__device__ __forceinline__ void product<N>(float(&sums)[COUNT], uint64_t rows, uint64_t weights, int add)      \
	{                                                                                                              \
		asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                          \
			     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST_##COUNT                 \
			     "}, " ROWS ", " WEIGHTS ", p, 1, 1, 0, 0;\n}\n"                                           \
			     : OPERANDS_##COUNT                                                                        \
			     : "l"(rows), "l"(weights), "r"(add));                                                     \
	}

PRODUCT(128, 64, "%64", "%65", "%66")
PRODUCT(160, 80, "%80", "%81", "%82")
PRODUCT(192, 96, "%96", "%97", "%98")
PRODUCT(256, 128, "%128", "%129", "%130")

#endif
