/*
 * admin.h - one question to a daemon's admin socket and its answer.
 *
 * Each call makes a connection of its own and closes it. It blocks until the answer
 * is there or the time is up. No state is kept.
 */
#ifndef KVG_CTL_ADMIN_H
#define KVG_CTL_ADMIN_H

#include "control.pb-c.h"

#define ADMIN_TEXT 1024 /* bytes of an error's text */

/*
 * Sends request to the socket at path and waits at most timeout_ms for the reply, which
 * the caller frees with kvg__admin_reply__free_unpacked(). An Error reply is a failure
 * with the daemon's status and text. 0 or a negative errno with one line in text:
 * -ENAMETOOLONG (path), what connect() gives, -ETIMEDOUT, -EPIPE (hung up before it
 * answered), -EBADMSG or -EPROTO (an answer that makes no sense).
 */
int admin_call(const char *path, const Kvg__AdminRequest *request, int timeout_ms, Kvg__AdminReply **ret,
	char text[ADMIN_TEXT]);

#endif
