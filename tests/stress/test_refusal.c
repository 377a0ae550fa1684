/* The stress test's judge of refusals sees what is wrong with them. */
#include "tests/stress/refusal.h"

#include <string.h>

#include "tests/support/runner.h"

#define MIN (UINT64_C(9) << 19) /* 4.5 MiB */
#define POOL                                                                                                           \
	"tenant a: device pool 60.0 MiB, in use 50.0 MiB, promised 9.0 MiB, reserve needs 1.2 MiB: 262144 bytes short"
#define OWN   "; own use 3.2 MiB, min 4.5 MiB, max 24.0 MiB; idle 1.0 MiB" /* and 1.25 MiB more are 4.5 */
#define ABOVE "; own use 3.5 MiB, min 4.5 MiB, max 24.0 MiB"

static void judge(const char *text, const char *wrong)
{
	const char *found = refusal_wrong(text, MIN);

	if (!found != !wrong || (found && !strstr(found, wrong)))
		fail_msg("\"%s\": %s", text, found ? found : "nothing wrong");
}

static void test_refusals(void **state)
{
	(void)state;
	judge(POOL OWN, "within the tenant's min");
	judge(POOL ABOVE, NULL);
	judge(POOL, "does not say what the tenant has");
	judge(POOL "; own use 3.5 MiB, min 4.0 MiB, max 24.0 MiB", "another min");
	judge("tenant a: device budget 24.0 MiB, in use 1.0 MiB, promised 0 B, reserve needs 1.0 MiB",
		"how many bytes");
	judge("tenant a: device budget 24.0 MiB, in use 24.0 MiB, promised 0 B, reserve needs 1.0 MiB: 1048576 bytes "
	      "short",
		NULL);
	judge("tenant a: host pool 60.0 MiB, in use 60.0 MiB, promised 0 B, an image needs 1.0 MiB: 1 bytes short",
		NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_refusals)};

	return runner_run("refusal", tests, 1);
}
