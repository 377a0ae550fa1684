#include "tests/support/runner.h"

#include "daemon/tier/turns.h"

#define GAP      100000u
#define SLICE_NS 500000u

static void use(struct turns *turns, struct turn *turn, uint64_t *now, uint64_t ns)
{
	assert_true(turns_begin(turns, turn, *now, SLICE_NS));
	*now += ns;
	turns_end(turns, turn, *now);
}

static void test_one_slice_for_all(void **state)
{
	struct turns turns = {0};
	struct turn a = {.tenant = 0}, b = {.tenant = 1}, c = {.tenant = 2};
	uint64_t now = 1000000;

	(void)state;
	use(&turns, &a, &now, SLICE_NS / 2);
	assert_false(turns_over(&a, a.begun_ns + SLICE_NS - 1, SLICE_NS));
	assert_true(turns_over(&a, a.begun_ns + SLICE_NS, SLICE_NS));
	use(&turns, &b, &now, SLICE_NS);
	assert_false(turns_begin(&turns, &c, now, SLICE_NS)); /* used up; it is next */
	assert_false(turns_begin(&turns, &a, now, SLICE_NS));
	assert_false(turns_begin(&turns, &b, now, SLICE_NS)); /* a new pass, but c waits */
	use(&turns, &c, &now, SLICE_NS);
	assert_false(turns_begin(&turns, &a, now, SLICE_NS));
	assert_false(turns_begin(&turns, &c, now, SLICE_NS)); /* a new pass, but a waits */
	use(&turns, &a, &now, SLICE_NS);
}

/* However many jobs a tenant has, another's next turn comes after one of them. */
static void test_tenants_take_turns(void **state)
{
	struct turns turns = {0};
	struct turn many[4] = {{0}}, other = {.tenant = 1};
	unsigned counts[2] = {0};
	uint64_t now = 1000000;

	(void)state;
	for (unsigned pass = 0; pass < 40; pass++) {
		for (unsigned i = 0; i < 5; i++) {
			struct turn *turn = i < 4 ? &many[i] : &other;

			if (!turns_begin(&turns, turn, now, SLICE_NS))
				continue;
			now += SLICE_NS;
			turns_end(&turns, turn, now);
			counts[turn->tenant]++;
		}
		now += 10;
	}
	assert_in_range(counts[1], counts[0] - 2, counts[0] + 2);
	for (unsigned i = 0; i < 4; i++)
		assert_true(many[i].begun_ns > 0);
}

static void test_who_leaves_is_not_waited_for(void **state)
{
	struct turns turns = {0};
	struct turn a = {.tenant = 0}, b = {.tenant = 1};
	uint64_t now = 1000000;

	(void)state;
	use(&turns, &a, &now, SLICE_NS);
	assert_false(turns_begin(&turns, &b, now, SLICE_NS));
	assert_false(turns_begin(&turns, &a, now, SLICE_NS));
	turns_leave(&turns, &b);
	use(&turns, &a, &now, SLICE_NS);
	turns_leave(&turns, &a);
	assert_null(turns.last);
	now += GAP;
	use(&turns, &b, &now, 1);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_one_slice_for_all),
		cmocka_unit_test(test_tenants_take_turns),
		cmocka_unit_test(test_who_leaves_is_not_waited_for),
	};

	return runner_run("daemon/tier/turns", tests, sizeof(tests) / sizeof(*tests));
}
