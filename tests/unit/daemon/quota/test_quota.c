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
	books->pool = (struct quota){.name = "pool", .account = &books->pool_account};
	books->tenant[0] = (struct quota){.name = "tenant a", .parent = &books->pool, .account = &books->account[0]};
	books->tenant[1] = (struct quota){.name = "tenant b", .parent = &books->pool, .account = &books->account[1]};
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
		"tenant b: device pool 1000 B, in use 600 B, promised 400 B, reserve needs 1 B: 1 bytes short");
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

static void check_books(const struct books *books)
{
	const struct quota_account *p = &books->pool_account, *a = &books->account[0], *b = &books->account[1];

	assert_int_equal(p->charged, a->charged + b->charged);
	assert_int_equal(p->promised, a->promised + b->promised);
	assert_true(p->charged + p->promised <= p->max);
	assert_true(a->charged + a->promised <= a->max);
	assert_true(b->charged + b->promised <= b->max);
}

static bool has_room(const struct books *books, unsigned i, uint64_t bytes)
{
	const struct quota_account *pool = &books->pool_account, *account = &books->account[i];

	return pool->charged + pool->promised + bytes <= pool->max &&
	       account->charged + account->promised + bytes <= account->max;
}

static void random_step(struct books *books, struct random *random)
{
	unsigned i = random_below(random, 2);
	struct quota_account *account = &books->account[i], before = *account;
	uint64_t bytes = random_below(random, 400), drawn = random_below(random, (uint32_t)bytes + 1);
	bool fits;

	switch (random_below(random, 4)) {
	case 0:
		fits = has_room(books, i, bytes);
		assert_int_equal(quota_promise(&books->tenant[i], bytes, "x", books->text), fits ? 0 : -ENOSPC);
		assert_int_equal(account->promised, before.promised + (fits ? bytes : 0));
		break;
	case 1:
		if (drawn > account->promised)
			drawn = account->promised;
		fits = books->pool_account.charged + books->pool_account.promised + bytes - drawn <=
			       books->pool_account.max &&
		       account->charged + account->promised + bytes - drawn <= account->max;
		assert_int_equal(quota_charge(&books->tenant[i], bytes, drawn, "x", books->text), fits ? 0 : -ENOSPC);
		assert_int_equal(account->charged, before.charged + (fits ? bytes : 0));
		assert_int_equal(account->promised, before.promised - (fits ? drawn : 0));
		break;
	case 2:
		if (bytes <= account->charged)
			quota_refund_to_promise(&books->tenant[i], bytes, drawn);
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
		cmocka_unit_test(test_random),
	};

	return runner_run("quota", tests, sizeof(tests) / sizeof(tests[0]));
}
