/*
 * fake_daemon.h - an admin socket that answers one connection as the test says, on a
 * thread of its own. A test that starts one must stop it.
 */
#ifndef KVG_TEST_FAKE_DAEMON_H
#define KVG_TEST_FAKE_DAEMON_H

#include <pthread.h>

#include "control.pb-c.h"

enum fake_answer {
	FAKE_REPLY,    /* the reply, with the request's id */
	FAKE_VERBATIM, /* the reply as it is */
	FAKE_GARBAGE,  /* bytes that are no message */
	FAKE_HANG_UP,  /* nothing: the connection is closed */
	FAKE_SILENCE,  /* nothing: until the client goes */
	FAKE_FULL,     /* nobody accepts, and the backlog is full */
};

struct fake_daemon {
	char dir[64], path[96];
	int listener, filler;
	pthread_t thread;
	enum fake_answer answer;
	const Kvg__AdminReply *reply;
	Kvg__AdminRequest *request; /* what was asked; valid after fake_daemon_stop(), owned */
};

/* Starts one; reply may be NULL where the answer needs none. Fails the test when it cannot. */
void fake_daemon_start(struct fake_daemon *fake, enum fake_answer answer, const Kvg__AdminReply *reply);

/* Waits for the end of its connection (except FAKE_FULL, which has none) and removes its socket. */
void fake_daemon_stop(struct fake_daemon *fake);

/* Frees the request. */
void fake_daemon_deinit(struct fake_daemon *fake);

#endif
