/* share.h - `kvgate-bench share`. */
#ifndef KVG_BENCH_SHARE_H
#define KVG_BENCH_SHARE_H

int bench_share(int argc, char **argv);

#endif
