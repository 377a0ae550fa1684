/* insitu.h - the commands that measure a worker with a load of its own beside a kvgated of the kind cuda. */
#ifndef KVG_BENCH_INSITU_H
#define KVG_BENCH_INSITU_H

int bench_insitu(int argc, char **argv);
int bench_timeline(int argc, char **argv);

#endif
