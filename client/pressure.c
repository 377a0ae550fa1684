/* Memory is short: what the daemon asks of a worker, and the worker's answer. */
#include "client/client.h"

#include <errno.h>

static bool is_asked(const struct kvg_client *client)
{
	uint32_t pressure = ring_pressure(&client->ring);

	return pressure && pressure != client->relieved;
}

/* Entries run in order: what was dropped is acknowledged before. */
static bool can_answer(const struct kvg_client *client)
{
	return client->ack_sent == client->drop_event && client->ring.outstanding < client->ring.capacity;
}

bool client_is_pressed(const struct kvg_client *client)
{
	return client->entries && is_asked(client) && can_answer(client);
}

bool client_owes(const struct kvg_client *client)
{
	return client->entries && client->ack_sent != client->drop_event && !client->ack_in_flight &&
	       client->ring.outstanding < client->ring.capacity;
}

int client_relieve(struct kvg_client *client)
{
	struct kvg_sqe sqe = {.op = KVG_OP_RELIEF};

	if (client->broken || !client_is_pressed(client))
		return client->broken;
	sqe.relief.pressure = ring_pressure(&client->ring);
	if (client_submit(client, ENTRY_RELIEF, &sqe, 0, 0) == 0)
		client->relieved = sqe.relief.pressure;
	return client->broken;
}

uint32_t kvg_pressure(struct kvg_client *client)
{
	CLIENT_TURN(client);
	return client->broken ? 0 : ring_pressure(&client->ring);
}
