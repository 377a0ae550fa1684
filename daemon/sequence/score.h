/* score.h - staged rows of the host kind become scores in the places of their pairs. */
#ifndef KVG_SCORE_H
#define KVG_SCORE_H

#include "daemon/sequence/space.h"

/* A slice of the rows, so that the jobs of others get their turn. On the executor, but for short ones. 0 or -ENOMEM. */
int score_slice(struct request *request);

/*
 * Whether the request brings so few finished scores that one slice stores them (a decode step's: some microseconds)
 * sooner than the executor could be told of them: then the reactor does.
 */
bool score_is_short(const struct request *request);

/* Whether all rows of the request are scored. */
bool score_is_complete(const struct request *request);

#endif
