/*
 * loop.h - the reactor: one thread, one io_uring, readiness of descriptors,
 * timers, signals, and a poller for shared-memory rings.
 *
 * All calls are the reactor thread's own. Callbacks run from loop_run() only,
 * never from inside another call here, and may add and remove anything,
 * themselves included. No callback of a removed watch or timer runs any more.
 */
#ifndef KVG_LOOP_H
#define KVG_LOOP_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

struct loop;
struct loop_watch;
struct loop_timer;

/* 0 or a negative errno (-ENOSYS, -EPERM: no io_uring here). */
int loop_new(struct loop **ret);
struct loop *loop_free(struct loop *loop); /* everything added has been removed before */

/*
 * Watches fd (not owned) for poll(2) events, edge-triggered (multishot poll): cb runs at least once
 * after each change to ready, with the ready events. The callback reads until -EAGAIN or calls
 * loop_watch_again() to be called once more in the next round.
 */
typedef void (*loop_watch_cb)(void *user, uint32_t revents);
int loop_watch_new(struct loop *loop, int fd, uint32_t events, loop_watch_cb cb, void *user, struct loop_watch **ret);
void loop_watch_again(struct loop_watch *watch);
struct loop_watch *loop_watch_free(struct loop_watch *watch); /* NULL is fine; returns NULL; then fd may be closed */

/* A timer that is off until set. ns from now; 0 turns it off. One shot. */
typedef void (*loop_timer_cb)(void *user);
int loop_timer_new(struct loop *loop, loop_timer_cb cb, void *user, struct loop_timer **ret);
void loop_timer_set(struct loop_timer *timer, uint64_t ns);
struct loop_timer *loop_timer_free(struct loop_timer *timer);

/* Signals of the set (already blocked in all threads) call cb with their number. Once. */
typedef void (*loop_signal_cb)(void *user, int signal);
int loop_signals(struct loop *loop, const sigset_t *set, loop_signal_cb cb, void *user);

/*
 * The poller looks for work in shared memory without a system call. poll() handles what there is and returns
 * whether there was any. The loop calls it in each round, and while it finds work, and for spin_ns after the last
 * work (of poll() or an event), the loop does not sleep. Before it sleeps it calls sleep(user, true), which asks
 * peers to ring a doorbell and returns true when work has come meanwhile (then the loop does not sleep); after it
 * slept, sleep(user, false). Every sleep(true) is followed by a sleep(false), also when this or another poller said
 * true. sleep() makes no call of the loop.
 * Several pollers may be added; each is asked in turn. A removed one (that of these ops and user) is not asked again.
 */
struct loop_poller_ops {
	bool (*poll)(void *user);
	bool (*sleep)(void *user, bool going);
};
int loop_poller_add(struct loop *loop, const struct loop_poller_ops *ops, void *user);
void loop_poller_remove(struct loop *loop, const struct loop_poller_ops *ops, const void *user);
void loop_set_spin(struct loop *loop, uint64_t spin_ns);

/*
 * Closes a descriptor that somebody else made: the kernel does it from a thread of its own where the file has a say
 * (a FUSE server could keep close(2) waiting).
 */
void loop_close_fd(struct loop *loop, int fd);

/* Runs until loop_stop(). 0 or a negative errno of the ring itself. */
int loop_run(struct loop *loop);
void loop_stop(struct loop *loop);

/* CLOCK_MONOTONIC in ns. */
uint64_t loop_now(void);

#endif
