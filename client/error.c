#include "client/client.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct kvg_client *client_turn_quiet(struct kvg_client *client)
{
	if (client && client->gpu)
		(void)pthread_mutex_lock(&client->gpu->lock);
	return client;
}

struct kvg_client *client_turn_take(struct kvg_client *client)
{
	(void)client_turn_quiet(client);
	if (client && client_is_pressed(client))
		(void)client_advance(client); /* the call finds out for itself when the connection has ended */
	return client;
}

void client_turn_end(struct kvg_client **client)
{
	if (*client && (*client)->gpu)
		(void)pthread_mutex_unlock(&(*client)->gpu->lock);
}

int client_check_cuda(struct kvg_client *client, const char *call)
{
	if (client->gpu)
		return 0;
	return client_fail(client, -EOPNOTSUPP, "%s: this connection's memory is of the kind host", call);
}

int client_fail(struct kvg_client *client, int status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	(void)vsnprintf(client->error, sizeof(client->error), format, args);
	va_end(args);
	return status;
}

int client_break(struct kvg_client *client, int status, const char *format, ...)
{
	va_list args;

	if (!client->broken) {
		va_start(args, format);
		(void)vsnprintf(client->reason, sizeof(client->reason), format, args);
		va_end(args);
		client->broken = status;
		if (client->gpu)
			gpu_release_waits(client->gpu);
	}
	return client_check(client);
}

int client_check(struct kvg_client *client)
{
	if (client->broken && !client->background)
		(void)snprintf(client->error, sizeof(client->error), "%s", client->reason);
	return client->broken;
}

const char *kvg_error(const struct kvg_client *client)
{
	return client->error;
}
