/* tier.h - the command that measures offload and restore; apart from bench.h because it needs a daemon and libkvgate.
 */
#ifndef KVG_BENCH_TIER_H
#define KVG_BENCH_TIER_H

int bench_tier(int argc, char **argv);

#endif
