#include "tests/support/runner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "client/client.h"

static void keeps_the_last_failure(void **state)
{
	struct kvg_client *client = calloc(1, sizeof(*client));
	char long_text[2 * CLIENT_TEXT];

	(void)state;
	assert_non_null(client);
	assert_string_equal(kvg_error(client), "");
	assert_int_equal(client_fail(client, -EINVAL, "slot %u of %u", 4, 3), -EINVAL);
	assert_string_equal(kvg_error(client), "slot 4 of 3");
	assert_int_equal(client_check(client), 0);
	memset(long_text, 'x', sizeof(long_text) - 1);
	long_text[sizeof(long_text) - 1] = '\0';
	assert_int_equal(client_fail(client, -EIO, "%s", long_text), -EIO);
	assert_int_equal(strlen(kvg_error(client)), CLIENT_TEXT - 1);
	free(client);
}

static void the_first_break_stays(void **state)
{
	struct kvg_client *client = calloc(1, sizeof(*client));

	(void)state;
	assert_non_null(client);
	assert_int_equal(client_break(client, -EPIPE, "gone %d", 1), -EPIPE);
	assert_int_equal(client_break(client, -EPROTO, "gone %d", 2), -EPIPE);
	assert_int_equal(client_fail(client, -EINVAL, "other"), -EINVAL);
	assert_int_equal(client_check(client), -EPIPE);
	assert_string_equal(kvg_error(client), "gone 1");
	free(client);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(keeps_the_last_failure),
		cmocka_unit_test(the_first_break_stays),
	};

	return runner_run("error", tests, sizeof(tests) / sizeof(*tests));
}
