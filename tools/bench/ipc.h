/* ipc.h - the command that measures round trips; apart from bench.h because it needs a daemon and libkvgate. */
#ifndef KVG_BENCH_IPC_H
#define KVG_BENCH_IPC_H

int bench_ipc(int argc, char **argv);

#endif
