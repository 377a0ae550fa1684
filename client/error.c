#include "client/client.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

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
	}
	return client_check(client);
}

int client_check(struct kvg_client *client)
{
	if (client->broken)
		(void)snprintf(client->error, sizeof(client->error), "%s", client->reason);
	return client->broken;
}

const char *kvg_error(const struct kvg_client *client)
{
	return client->error;
}
