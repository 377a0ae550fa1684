#include "daemon/quota/quota.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/kernels/random.h"

struct books {
	struct quota_account pool_account, account[2];
	struct quota pool, tenant[2];
	char text[QUOTA_TEXT];
};

static void open_books(struct books *books, uint64_t pool, uint64_t a, uint64_t b)
{
	*books = (struct books){.pool_account.max = pool, .account = {{.max = a}, {.max = b}}};
	books->pool = (struct quota){.name = "pool", .tier = "device", .account = &books->pool_account};
	books->tenant[0] = (struct quota){
		.name = "tenant a", .tier = "device", .parent = &books->pool, .account = &books->account[0]};
	books->tenant[1] = (struct quota){
		.name = "tenant b", .tier = "device", .parent = &books->pool, .account = &books->account[1]};
}

static void test_last_byte(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 4096, 1024, 4096);
	assert_int_equal(quota_charge(&books.tenant[0], 1023, 0, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "reserve", books.text), -ENOSPC);
	assert_string_equal(books.text,
		"tenant a: device budget 1.0 KiB, in use 1.0 KiB, promised 0 B, reserve needs 1 B: 1 bytes short");
	assert_int_equal(quota_promise(&books.tenant[0], 1, "x", books.text), -ENOSPC);
	assert_int_equal(books.account[0].charged, 1024);
	assert_int_equal(books.account[0].high_water, 1024);
	assert_int_equal(books.account[0].refusals, 2);
	quota_forgive(&books.tenant[0]);
	quota_forgive(&books.tenant[0]); /* one refusal only */
	assert_int_equal(books.account[0].refusals, 1);
	quota_refund(&books.tenant[0], 1024);
	assert_int_equal(books.account[0].charged, 0);
	assert_int_equal(books.pool_account.charged, 0);
	assert_int_equal(books.account[0].high_water, 1024);
}

/* The pool is full although the tenant's own budget is not. */
static void test_pool_is_a_limit(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 800, 800);
	assert_int_equal(quota_charge(&books.tenant[0], 600, 0, "x", books.text), 0);
	assert_int_equal(quota_promise(&books.tenant[1], 400, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[1], 1, 0, "reserve", books.text), -ENOSPC);
	assert_string_equal(books.text,
		"tenant b: device pool 1000 B, in use 600 B, promised 400 B, reserve needs 1 B: 1 bytes short; own use "
		"400 B, min 0 B, max 800 B");
	assert_int_equal(books.account[1].charged, 0);
	assert_int_equal(quota_charge(&books.tenant[1], 400, 400, "x", books.text), 0);
	assert_int_equal(books.pool_account.charged, 1000);
	assert_int_equal(books.pool_account.promised, 0);
}

/* What was promised can always be drawn, and not a byte more. */
static void test_promise_is_kept(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 1000, 1000);
	assert_int_equal(quota_promise(&books.tenant[0], 700, "the sequence", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[1], 301, 0, "x", books.text), -ENOSPC);
	assert_int_equal(quota_charge(&books.tenant[1], 300, 0, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 701, 700, "x", books.text), -ENOSPC);
	assert_int_equal(quota_charge(&books.tenant[0], 500, 500, "x", books.text), 0);
	quota_refund_to_promise(&books.tenant[0], 500, 500);
	assert_int_equal(quota_promise(&books.tenant[1], 1, "x", books.text), -ENOSPC);
	assert_int_equal(quota_charge(&books.tenant[0], 700, 700, "x", books.text), 0);
	quota_refund_to_promise(&books.tenant[0], 700, 100);
	assert_int_equal(books.account[0].promised, 100);
	quota_unpromise(&books.tenant[0], 100);
	assert_int_equal(books.pool_account.promised, 0);
	assert_int_equal(books.pool_account.charged, 300);
}

/* A budget that was lowered below its use refuses everything new, promised or not, until there is room. */
static void test_lowered_budget(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 1000, 1000);
	assert_int_equal(quota_promise(&books.tenant[0], 200, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 600, 0, "x", books.text), 0);
	books.account[0].max = 700;
	assert_int_equal(quota_charge(&books.tenant[0], 101, 101, "x", books.text), -ENOSPC);
	assert_int_equal(quota_charge(&books.tenant[0], 100, 100, "x", books.text), 0);
	assert_int_equal(quota_promise(&books.tenant[0], 1, "x", books.text), -ENOSPC);
	quota_refund(&books.tenant[0], 700);
	assert_int_equal(books.account[0].promised, 100);
}

/* Sums of absurd sizes must not wrap around to something that fits. */
static void test_absurd_sizes(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 1000, 1000);
	assert_int_equal(quota_charge(&books.tenant[0], 10, 0, "x", books.text), 0);
	assert_int_equal(quota_promise(&books.tenant[0], UINT64_MAX, "x", books.text), -ENOSPC);
	assert_int_equal(quota_promise(&books.tenant[0], UINT64_MAX - 9, "x", books.text), -ENOSPC);
	assert_int_equal(quota_charge(&books.tenant[0], UINT64_MAX - 5, 0, "x", books.text), -ENOSPC);
	assert_int_equal(books.pool_account.charged, 10);
	assert_int_equal(books.pool_account.promised, 0);
}

static void test_unreturned(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 100, 100, 100);
	assert_int_equal(quota_charge(&books.tenant[0], 100, 0, "x", books.text), 0);
	quota_unreturned_add(&books.tenant[0], 60);
	assert_int_equal(books.pool_account.unreturned, 60);
	assert_int_equal(quota_promise(&books.tenant[0], 1, "x", books.text), -ENOSPC);
	assert_non_null(strstr(books.text, "(some not yet unmapped)"));
	quota_unreturned_sub(&books.tenant[0], 60);
	assert_int_equal(books.account[0].unreturned, 0);
	assert_int_equal(books.account[0].charged, 100);
}

static void set_budget(struct books *books, unsigned i, uint64_t min, uint64_t high, uint64_t max)
{
	if (quota_set(&books->tenant[i], min, high, max, books->text) < 0)
		fail_msg("%s", books->text);
}

static void refuse_budget(
	struct books *books, unsigned i, uint64_t min, uint64_t high, uint64_t max, int status, const char *text)
{
	const struct quota_account account = books->account[i], pool = books->pool_account;

	assert_int_equal(quota_set(&books->tenant[i], min, high, max, books->text), status);
	assert_string_equal(books->text, text);
	assert_memory_equal(&account, &books->account[i], sizeof(account));
	assert_memory_equal(&pool, &books->pool_account, sizeof(pool));
}

/* Whatever the neighbour takes: growth within min is granted, and the neighbour gets all the rest and not a byte more.
 */
static void test_min_holds_against_a_greedy_neighbour(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 800, 1000);
	set_budget(&books, 0, 300, 0, 800);
	assert_int_equal(books.pool_account.committed, 300);
	assert_int_equal(quota_charge(&books.tenant[1], 701, 0, "reserve", books.text), -ENOSPC);
	assert_string_equal(books.text,
		"tenant b: device pool 1000 B, in use 0 B, promised 0 B, others' unused min 300 B, reserve needs 701 "
		"B: 1 bytes short; own use 0 B, min 0 B, max 1000 B");
	assert_int_equal(quota_charge(&books.tenant[1], 400, 0, "x", books.text), 0);
	assert_int_equal(quota_promise(&books.tenant[1], 300, "x", books.text), 0);
	assert_int_equal(quota_promise(&books.tenant[1], 1, "x", books.text), -ENOSPC);
	assert_int_equal(books.pool_account.committed, 1000);
	assert_int_equal(quota_promise(&books.tenant[0], 100, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 150, 50, "x", books.text), 0);
	assert_int_equal(quota_promise(&books.tenant[1], 1, "x", books.text), -ENOSPC);
	assert_non_null(strstr(books.text, "others' unused min 100 B"));
	assert_int_equal(quota_charge(&books.tenant[0], 100, 0, "x", books.text), 0);
	assert_int_equal(books.account[0].charged + books.account[0].promised, 300);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "x", books.text), -ENOSPC);
	assert_int_equal(quota_promise(&books.tenant[1], 1, "x", books.text), -ENOSPC);
	assert_null(strstr(books.text, "unused min"));
	quota_refund(&books.tenant[1], 1);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "x", books.text), 0); /* above its min like anybody */
	quota_refund(&books.tenant[0], 251);
	quota_unpromise(&books.tenant[0], 50);
	assert_int_equal(books.pool_account.committed, 300 + 699);
}

/* A promise that is drawn, or given back as one, moves nothing at the pool. */
static void test_min_and_promises(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 1000, 1000);
	set_budget(&books, 0, 300, 0, 1000);
	assert_int_equal(quota_promise(&books.tenant[0], 500, "x", books.text), 0);
	assert_int_equal(books.pool_account.committed, 500);
	assert_int_equal(quota_promise(&books.tenant[1], 500, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 500, 500, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[1], 500, 500, "x", books.text), 0);
	quota_refund_to_promise(&books.tenant[0], 500, 500);
	assert_int_equal(books.pool_account.committed, 1000);
	quota_unpromise(&books.tenant[0], 199);
	assert_int_equal(books.pool_account.committed, 801);
	quota_unpromise(&books.tenant[0], 2);
	assert_int_equal(books.pool_account.committed, 800);
	quota_unpromise(&books.tenant[0], 299);
	assert_int_equal(books.pool_account.committed, 800);
}

static void test_values_that_contradict(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 4096, 2048, 4096);
	refuse_budget(&books, 0, 0, 0, 4097, -EINVAL, "tenant a: device.max 4.0 KiB is more than the pool's 4.0 KiB");
	refuse_budget(&books, 0, 1025, 0, 1024, -EINVAL, "tenant a: device.min 1.0 KiB is more than max, 1.0 KiB");
	refuse_budget(&books, 0, 512, 1025, 1024, -EINVAL, "tenant a: device.high 1.0 KiB is more than max, 1.0 KiB");
	refuse_budget(&books, 0, 512, 511, 1024, -EINVAL, "tenant a: device.high 511 B is less than min, 512 B");
	books.tenant[0].tier = "host";
	refuse_budget(&books, 0, 512, 511, 1024, -EINVAL, "tenant a: host.high 511 B is less than min, 512 B");
	set_budget(&books, 0, 512, 512, 512);
	assert_int_equal(quota_high(&books.account[0]), 512);
	set_budget(&books, 0, 0, 0, 4096);
	assert_int_equal(quota_high(&books.account[0]), 4096);
	set_budget(&books, 0, 0, 0, 0);
}

/* A min is granted to the last byte that the others leave, and not one more; lowering one makes room. */
static void test_min_is_never_overbooked(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 1000, 1000);
	set_budget(&books, 0, 400, 0, 1000);
	refuse_budget(&books, 1, 601, 0, 1000, -ENOSPC,
		"tenant b: device.min 601 B: of the pool, 1000 B, other tenants' min and use take 400 B: 1 bytes "
		"short");
	set_budget(&books, 1, 600, 0, 1000);
	refuse_budget(&books, 0, 401, 0, 1000, -ENOSPC,
		"tenant a: device.min 401 B: of the pool, 1000 B, other tenants' min and use take 600 B: 1 bytes "
		"short");
	set_budget(&books, 1, 100, 0, 1000);
	assert_int_equal(books.pool_account.committed, 500);
	assert_int_equal(quota_charge(&books.tenant[1], 600, 0, "x", books.text), 0);
	refuse_budget(&books, 0, 401, 0, 1000, -ENOSPC,
		"tenant a: device.min 401 B: of the pool, 1000 B, other tenants' min and use take 600 B: 1 bytes "
		"short");
	assert_int_equal(quota_charge(&books.tenant[0], 400, 0, "x", books.text), 0);
	set_budget(&books, 0, 300, 0, 1000); /* below the use: nothing is given away by that */
	assert_int_equal(books.pool_account.committed, 1000);
	set_budget(&books, 0, 400, 0, 1000);
	quota_refund(&books.tenant[1], 600);
	assert_int_equal(books.pool_account.committed, 500);
}

/* max below the use is taken, and then nothing is granted until the use is below; min still counts at the pool. */
static void test_max_below_use(void **state)
{
	struct books books;

	(void)state;
	open_books(&books, 1000, 1000, 1000);
	assert_int_equal(quota_charge(&books.tenant[0], 600, 0, "x", books.text), 0);
	set_budget(&books, 0, 100, 0, 500);
	assert_int_equal(books.account[0].charged, 600);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "reserve", books.text), -ENOSPC);
	assert_string_equal(books.text,
		"tenant a: device budget 500 B, in use 600 B, promised 0 B, reserve needs 1 B: 101 bytes short");
	quota_refund(&books.tenant[0], 101);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "x", books.text), 0);
	assert_int_equal(quota_charge(&books.tenant[0], 1, 0, "x", books.text), -ENOSPC);
	assert_int_equal(books.pool_account.committed, 500);
}

static uint64_t committed(const struct quota_account *account)
{
	return account->min > account->charged + account->promised ? account->min
								   : account->charged + account->promised;
}

static void check_books(const struct books *books)
{
	const struct quota_account *p = &books->pool_account, *a = &books->account[0], *b = &books->account[1];

	assert_int_equal(p->charged, a->charged + b->charged);
	assert_int_equal(p->promised, a->promised + b->promised);
	assert_int_equal(p->committed, committed(a) + committed(b));
	assert_true(p->committed <= p->max);
	assert_true(a->charged + a->promised <= a->max);
	assert_true(b->charged + b->promised <= b->max);
}

static bool has_room(const struct books *books, unsigned i, uint64_t bytes)
{
	const struct quota_account *pool = &books->pool_account, *account = &books->account[i];

	struct quota_account after = *account;

	after.promised += bytes;
	return pool->committed + committed(&after) - committed(account) <= pool->max &&
	       account->charged + account->promised + bytes <= account->max;
}

static void random_step(struct books *books, struct random *random)
{
	unsigned i = random_below(random, 2);
	struct quota_account *account = &books->account[i], before = *account;
	uint64_t bytes = random_below(random, 400), drawn = random_below(random, (uint32_t)bytes + 1), min;
	bool fits;

	switch (random_below(random, 5)) {
	case 0:
		fits = has_room(books, i, bytes);
		assert_int_equal(quota_promise(&books->tenant[i], bytes, "x", books->text), fits ? 0 : -ENOSPC);
		assert_int_equal(account->promised, before.promised + (fits ? bytes : 0));
		break;
	case 1:
		if (drawn > account->promised)
			drawn = account->promised;
		fits = has_room(books, i, bytes - drawn);
		assert_int_equal(quota_charge(&books->tenant[i], bytes, drawn, "x", books->text), fits ? 0 : -ENOSPC);
		assert_int_equal(account->charged, before.charged + (fits ? bytes : 0));
		assert_int_equal(account->promised, before.promised - (fits ? drawn : 0));
		break;
	case 2:
		if (bytes <= account->charged)
			quota_refund_to_promise(&books->tenant[i], bytes, drawn);
		break;
	case 3:
		min = random_below(random, 2000);
		fits = books->pool_account.committed - committed(account) <= books->pool_account.max - min;
		fits |= min <= committed(account);
		assert_int_equal(quota_set(&books->tenant[i], min, 0, account->max, books->text), fits ? 0 : -ENOSPC);
		assert_int_equal(account->min, fits ? min : before.min);
		break;
	default:
		if (bytes <= account->promised)
			quota_unpromise(&books->tenant[i], bytes);
	}
}

static void test_random(void **state)
{
	struct random random = {.state = 42};
	struct books books;

	(void)state;
	open_books(&books, 3000, 2000, 2500);
	for (unsigned i = 0; i < 100000; i++) {
		random_step(&books, &random);
		check_books(&books);
	}
	assert_true(books.account[0].refusals > 1000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_last_byte),
		cmocka_unit_test(test_pool_is_a_limit),
		cmocka_unit_test(test_promise_is_kept),
		cmocka_unit_test(test_lowered_budget),
		cmocka_unit_test(test_absurd_sizes),
		cmocka_unit_test(test_unreturned),
		cmocka_unit_test(test_min_holds_against_a_greedy_neighbour),
		cmocka_unit_test(test_min_and_promises),
		cmocka_unit_test(test_values_that_contradict),
		cmocka_unit_test(test_min_is_never_overbooked),
		cmocka_unit_test(test_max_below_use),
		cmocka_unit_test(test_random),
	};

	return runner_run("quota", tests, sizeof(tests) / sizeof(tests[0]));
}
