#include "daemon/tenant/reclaim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"

#define UNIT    65536u
#define WAIT_NS 20000000u /* of requests, in these tests */

/* A pool of 16 units, two tenants of at most 10 or more of them, and what their workers would be told. */
struct scene {
	struct loop *loop;
	struct executor *executor;
	struct kind *kind;
	struct pool *pool;
	struct tenant *tenants[3];
	size_t tenant_count;
	struct reclaim reclaim;
	struct loop_timer *stop;
	int pressure[3];  /* by tenant: told on less told off */
	unsigned told[3]; /* times that it was told on */
	char text[QUOTA_TEXT];
};

/* Something on offer that notes when it is taken. */
struct thing {
	struct reclaimable reclaimable;
	unsigned order; /* of being begun, from 1 on; 0: not yet */
	bool refuses;
	unsigned *begun; /* counter shared by a test's things */
};

struct waiter {
	struct memory_wait wait;
	unsigned asked;
	uint64_t bytes;
	bool granted, refused;
	char text[QUOTA_TEXT];
};

static void on_pressure(void *user, struct tenant *tenant, bool on)
{
	struct scene *scene = user;
	uint32_t i = tenant->index;

	scene->pressure[i] += on ? 1 : -1;
	scene->told[i] += on;
}

static const struct reclaim_ops ops = {.pressure = on_pressure};

static void stop_loop(void *user)
{
	loop_stop(user);
}

static void open_scene(struct scene *scene)
{
	*scene = (struct scene){0};
	assert_int_equal(loop_new(&scene->loop), 0);
	assert_int_equal(executor_new(scene->loop, &scene->executor), 0);
	assert_int_equal(kind_host_new(&scene->kind), 0);
	assert_int_equal(pool_new(scene->loop, scene->executor, scene->kind, 16 * UNIT, UNIT, &scene->pool), 0);
	assert_int_equal(tenant_new(scene->pool, "a", 10 * UNIT, &scene->tenants[0]), 0);
	assert_int_equal(tenant_new(scene->pool, "b", 10 * UNIT, &scene->tenants[1]), 0);
	scene->tenant_count = 2;
	assert_int_equal(reclaim_init(&scene->reclaim, scene->loop, scene->pool, scene->tenants, &scene->tenant_count,
				 WAIT_NS, &ops, scene),
		0);
	for (unsigned i = 0; i < 2; i++)
		scene->tenants[i]->reclaim = &scene->reclaim;
	assert_int_equal(loop_timer_new(scene->loop, stop_loop, scene->loop, &scene->stop), 0);
}

static void close_scene(struct scene *scene)
{
	scene->stop = loop_timer_free(scene->stop);
	reclaim_deinit(&scene->reclaim);
	(void)executor_free(scene->executor);
	(void)pool_free(scene->pool);
	for (unsigned i = 0; i < scene->tenant_count; i++) {
		assert_int_equal(scene->tenants[i]->offered, 0);
		assert_int_equal(scene->tenants[i]->offer_count, 0);
		(void)tenant_free(scene->tenants[i]);
	}
	(void)kind_free(scene->kind);
	(void)loop_free(scene->loop);
}

/* Rounds of the loop until `ns` have passed, one at least. */
static void run_loop(struct scene *scene, uint64_t ns)
{
	loop_timer_set(scene->stop, ns);
	assert_int_equal(loop_run(scene->loop), 0);
}

static void charge(struct scene *scene, unsigned tenant, uint64_t units)
{
	assert_int_equal(quota_charge(&scene->tenants[tenant]->quota, units * UNIT, 0, "test", scene->text), 0);
	reclaim_check(scene->tenants[tenant]);
}

static void refund(struct scene *scene, unsigned tenant, uint64_t units)
{
	quota_refund(&scene->tenants[tenant]->quota, units * UNIT);
}

static int begin_thing(struct reclaimable *reclaimable)
{
	struct thing *thing = list_entry(reclaimable, struct thing, reclaimable);

	if (thing->refuses)
		return -ENOSPC;
	reclaim_withdraw(reclaimable);
	thing->order = ++*thing->begun;
	return 0;
}

static void offer(struct scene *scene, unsigned tenant, enum reclaim_kind kind, struct thing *thing, uint64_t units,
	unsigned *begun)
{
	*thing = (struct thing){.reclaimable = {.bytes = units * UNIT, .begin = begin_thing}, .begun = begun};
	list_init(&thing->reclaimable.node);
	reclaim_offer(scene->tenants[tenant], kind, &thing->reclaimable);
}

/* It has gone to the host. */
static void end_thing(struct scene *scene, struct thing *thing)
{
	quota_refund(&thing->reclaimable.tenant->quota, thing->reclaimable.bytes);
	reclaim_progress(thing->reclaimable.tenant, thing->reclaimable.bytes);
	(void)scene;
}

static void try_again(struct memory_wait *wait)
{
	struct waiter *waiter = list_entry(wait, struct waiter, wait);
	struct tenant *tenant = wait->tenant;

	bool behind = wait->behind || (!wait->since_ns && wait->in_turn && reclaim_is_awaited(tenant));

	waiter->asked++;
	if (!behind && quota_charge(&tenant->quota, waiter->bytes, 0, "the waiter", waiter->text) >= 0)
		waiter->granted = true;
	else if (behind || (!wait->expired && reclaim_want(tenant, waiter->bytes)))
		reclaim_wait(tenant, wait);
	else
		waiter->refused = true;
}

/* Asks for memory as a request does. */
static void ask(struct scene *scene, unsigned tenant, uint64_t units, struct waiter *waiter)
{
	*waiter = (struct waiter){.bytes = units * UNIT, .wait = {.again = try_again}};
	list_init(&waiter->wait.node);
	waiter->wait.tenant = scene->tenants[tenant];
	try_again(&waiter->wait);
}

/* The same, behind those that came before. */
static void ask_in_turn(struct scene *scene, unsigned tenant, uint64_t units, struct waiter *waiter)
{
	*waiter =
		(struct waiter){.bytes = units * UNIT, .wait = {.again = try_again, .request = true, .in_turn = true}};
	list_init(&waiter->wait.node);
	waiter->wait.tenant = scene->tenants[tenant];
	try_again(&waiter->wait);
}

static void test_contexts_go_first_oldest_first_and_no_more_than_lacks(void **state)
{
	struct scene scene;
	struct thing sequence, old, young, last;
	struct waiter waiter;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 10);
	offer(&scene, 0, RECLAIM_SEQUENCE, &sequence, 2, &begun);
	offer(&scene, 0, RECLAIM_CONTEXT, &old, 1, &begun);
	offer(&scene, 0, RECLAIM_CONTEXT, &young, 1, &begun);
	offer(&scene, 0, RECLAIM_SEQUENCE, &last, 2, &begun);
	assert_int_equal(scene.tenants[0]->offered, 6 * UNIT);
	ask(&scene, 0, 4, &waiter);
	assert_int_equal(old.order, 1);
	assert_int_equal(young.order, 2);
	assert_int_equal(sequence.order, 3);
	assert_int_equal(last.order, 0);
	assert_false(waiter.granted || waiter.refused);
	end_thing(&scene, &old);
	run_loop(&scene, 1);
	assert_false(waiter.granted || waiter.refused);
	end_thing(&scene, &young);
	end_thing(&scene, &sequence);
	run_loop(&scene, 1);
	assert_true(waiter.granted);
	assert_int_equal(last.order, 0);
	reclaim_withdraw(&last.reclaimable);
	reclaim_withdraw(&last.reclaimable);
	refund(&scene, 0, 10);
	close_scene(&scene);
}

static void test_nothing_on_its_way_is_a_refusal_at_once(void **state)
{
	struct scene scene;
	struct waiter waiter;
	struct thing stuck;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 10);
	ask(&scene, 0, 1, &waiter);
	assert_true(waiter.refused);
	assert_int_equal(waiter.asked, 1);
	offer(&scene, 0, RECLAIM_SEQUENCE, &stuck, 4, &begun);
	stuck.refuses = true;
	ask(&scene, 0, 1, &waiter);
	assert_true(waiter.refused);
	scene.text[0] = '\0';
	reclaim_explain(scene.tenants[0], UNIT, scene.text, sizeof(scene.text));
	assert_string_equal(scene.text, "; in use 384.0 KiB, idle 256.0 KiB (no room for it on the host)");
	assert_false(list_empty(&stuck.reclaimable.node));
	reclaim_withdraw(&stuck.reclaimable);
	refund(&scene, 0, 10);
	close_scene(&scene);
}

static void test_what_can_never_fit_takes_nothing(void **state)
{
	struct scene scene;
	struct waiter waiter;
	struct thing own, others;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 4);
	charge(&scene, 1, 10);
	offer(&scene, 0, RECLAIM_SEQUENCE, &own, 4, &begun);
	offer(&scene, 1, RECLAIM_SEQUENCE, &others, 2, &begun);
	ask(&scene, 0, 11, &waiter); /* max is 10 */
	assert_true(waiter.refused);
	assert_int_equal(quota_set(&scene.tenants[1]->quota, 8 * UNIT, 0, 10 * UNIT, scene.text), 0);
	ask(&scene, 0, 9, &waiter); /* the other's min leaves 8 of the pool */
	assert_true(waiter.refused);
	assert_int_equal(begun, 0);
	reclaim_explain(scene.tenants[0], 11 * UNIT, scene.text, sizeof(scene.text));
	assert_string_equal(scene.text, "; in use 0 B, idle 256.0 KiB"); /* the host has not been asked */
	reclaim_explain(scene.tenants[0], 6 * UNIT, scene.text, sizeof(scene.text));
	assert_string_equal(scene.text, "; idle 384.0 KiB"); /* the pool's: the other's two units are above its min */
	assert_int_equal(quota_set(&scene.tenants[1]->quota, 9 * UNIT, 0, 10 * UNIT, scene.text), 0);
	quota_unreturned_add(&scene.tenants[1]->quota, 3 * UNIT);
	reclaim_explain(scene.tenants[0], 6 * UNIT, scene.text, sizeof(scene.text));
	assert_string_equal(scene.text, "; idle 320.0 KiB, not yet unmapped 64.0 KiB");
	quota_unreturned_sub(&scene.tenants[1]->quota, 3 * UNIT);
	assert_int_equal(quota_set(&scene.tenants[1]->quota, 8 * UNIT, 0, 10 * UNIT, scene.text), 0);
	ask(&scene, 0, 8, &waiter);
	assert_false(waiter.refused);
	end_thing(&scene, &own);
	run_loop(&scene, 1);
	assert_int_equal(begun, 2);
	end_thing(&scene, &others);
	run_loop(&scene, 1);
	assert_true(waiter.granted);
	refund(&scene, 0, 8);
	refund(&scene, 1, 8);
	close_scene(&scene);
}

static void test_waits_for_what_is_not_yet_unmapped(void **state)
{
	struct scene scene;
	struct waiter first, second;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 10);
	quota_unreturned_add(&scene.tenants[0]->quota, 2 * UNIT);
	ask(&scene, 0, 2, &first);
	ask(&scene, 0, 1, &second);
	assert_false(first.granted || first.refused || second.granted || second.refused);
	run_loop(&scene, 1);
	assert_int_equal(scene.pressure[0], 1);
	assert_int_equal(scene.pressure[1], 0);
	quota_unreturned_sub(&scene.tenants[0]->quota, 2 * UNIT);
	refund(&scene, 0, 2);
	run_loop(&scene, 1);
	assert_true(first.granted); /* who came first */
	assert_true(second.refused);
	run_loop(&scene, 1);
	assert_int_equal(scene.pressure[0], 0);
	refund(&scene, 0, 10);
	close_scene(&scene);
}

/* Small ones that come later do not live on what the large one waits for; who is at work already does. */
static void test_requests_are_served_in_their_order(void **state)
{
	struct waiter large, small[3], other, urgent;
	struct scene scene;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 9);
	quota_unreturned_add(&scene.tenants[0]->quota, 4 * UNIT);
	ask_in_turn(&scene, 0, 5, &large);
	for (unsigned i = 0; i < 3; i++)
		ask_in_turn(&scene, 0, 1, &small[i]); /* there would be room for one */
	ask_in_turn(&scene, 1, 1, &other);
	assert_true(other.granted);
	ask(&scene, 0, 1, &urgent);
	assert_true(urgent.granted);
	for (unsigned i = 0; i < 4; i++) {
		assert_false(large.granted || small[0].granted || small[1].granted || small[2].granted);
		quota_unreturned_sub(&scene.tenants[0]->quota, UNIT);
		refund(&scene, 0, 1);
		run_loop(&scene, 1);
	}
	assert_true(large.refused); /* nothing more comes, and one lacks */
	assert_true(small[0].granted && small[1].granted && small[2].granted);
	assert_int_equal(scene.tenants[0]->waiting, 0);
	refund(&scene, 0, 9);
	refund(&scene, 1, 1);
	close_scene(&scene);
}

/* Whoever is behind one that never gets its memory waits no longer than that. */
static void test_nobody_is_behind_for_ever(void **state)
{
	struct waiter large, small;
	struct scene scene;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 9);
	quota_unreturned_add(&scene.tenants[0]->quota, UNIT);
	ask_in_turn(&scene, 0, 2, &large);
	ask_in_turn(&scene, 0, 1, &small);
	run_loop(&scene, WAIT_NS + WAIT_NS / 2);
	assert_true(large.refused && small.granted);
	quota_unreturned_sub(&scene.tenants[0]->quota, UNIT);
	refund(&scene, 0, 10);
	close_scene(&scene);
}

static void test_no_request_waits_for_ever(void **state)
{
	struct scene scene;
	struct waiter waiter;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 10);
	quota_unreturned_add(&scene.tenants[0]->quota, UNIT);
	ask(&scene, 0, 1, &waiter);
	assert_false(waiter.refused);
	run_loop(&scene, WAIT_NS + WAIT_NS / 2);
	assert_true(waiter.refused && waiter.wait.expired);
	quota_unreturned_sub(&scene.tenants[0]->quota, UNIT);
	refund(&scene, 0, 10);
	close_scene(&scene);
}

static void test_a_full_pool_takes_from_others_what_is_above_their_min(void **state)
{
	struct scene scene;
	struct waiter waiter;
	struct thing others;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 6);
	charge(&scene, 1, 10);
	offer(&scene, 1, RECLAIM_SEQUENCE, &others, 4, &begun);
	ask(&scene, 0, 2, &waiter);
	assert_int_equal(others.order, 1);
	end_thing(&scene, &others);
	run_loop(&scene, 1);
	assert_true(waiter.granted);
	refund(&scene, 0, 8);
	assert_int_equal(quota_set(&scene.tenants[1]->quota, 6 * UNIT, 0, 10 * UNIT, scene.text), 0);
	charge(&scene, 0, 10);
	offer(&scene, 1, RECLAIM_SEQUENCE, &others, 6, &begun);
	ask(&scene, 1, 1, &waiter); /* its own, when it is the one who wants more */
	assert_int_equal(others.order, 2);
	end_thing(&scene, &others);
	run_loop(&scene, 1);
	assert_true(waiter.granted);
	offer(&scene, 1, RECLAIM_SEQUENCE, &others, 1, &begun);
	refund(&scene, 0, 1);
	ask(&scene, 0, 1, &waiter); /* within max, and the pool has it */
	assert_true(waiter.granted);
	reclaim_withdraw(&others.reclaimable);
	refund(&scene, 0, 10);
	refund(&scene, 1, 1);
	close_scene(&scene);
}

/* Not the one that was configured first. */
static void test_others_give_the_furthest_above_its_min_first(void **state)
{
	struct scene scene;
	struct waiter waiter;
	struct thing things[3][2];
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	assert_int_equal(tenant_new(scene.pool, "c", 10 * UNIT, &scene.tenants[2]), 0);
	scene.tenants[2]->reclaim = &scene.reclaim;
	scene.tenant_count = 3;
	charge(&scene, 0, 5);
	charge(&scene, 1, 5);
	charge(&scene, 2, 6);
	assert_int_equal(quota_set(&scene.tenants[0]->quota, 2 * UNIT, 0, 10 * UNIT, scene.text), 0);
	assert_int_equal(quota_set(&scene.tenants[2]->quota, 5 * UNIT, 0, 10 * UNIT, scene.text), 0);
	for (unsigned i = 0; i < 3; i++)
		for (unsigned j = 0; j < 2; j++)
			offer(&scene, i, RECLAIM_SEQUENCE, &things[i][j], 1, &begun);
	ask(&scene, 2, 4, &waiter); /* its own two; of b, 5 above, not of a, 3 above */
	assert_false(waiter.granted || waiter.refused);
	assert_true(things[2][0].order && things[2][1].order && things[1][0].order && things[1][1].order);
	assert_false(things[0][0].order || things[0][1].order);
	for (unsigned i = 1; i < 3; i++)
		for (unsigned j = 0; j < 2; j++)
			end_thing(&scene, &things[i][j]);
	run_loop(&scene, 1);
	assert_true(waiter.granted);
	reclaim_withdraw(&things[0][0].reclaimable);
	reclaim_withdraw(&things[0][1].reclaimable);
	refund(&scene, 0, 5);
	refund(&scene, 1, 3);
	refund(&scene, 2, 8);
	close_scene(&scene);
}

/* 10 units, 7 of them min: only what is no larger than 3 goes for others, whatever is older. */
static void test_others_do_not_take_what_reaches_into_a_min(void **state)
{
	struct scene scene;
	struct waiter waiter;
	struct thing large, small, next;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 6);
	charge(&scene, 1, 10);
	assert_int_equal(quota_set(&scene.tenants[1]->quota, 7 * UNIT, 0, 10 * UNIT, scene.text), 0);
	offer(&scene, 1, RECLAIM_SEQUENCE, &large, 4, &begun);
	offer(&scene, 1, RECLAIM_SEQUENCE, &small, 2, &begun);
	offer(&scene, 1, RECLAIM_SEQUENCE, &next, 2, &begun);
	ask(&scene, 0, 3, &waiter);
	assert_int_equal(large.order, 0);
	assert_int_equal(small.order, 1);
	assert_int_equal(next.order, 0);
	end_thing(&scene, &small);
	run_loop(&scene, 1);
	assert_true(waiter.refused); /* one lacks still, and nothing of that size is there */
	assert_int_equal(begun, 1);
	ask(&scene, 0, 2, &waiter);
	assert_true(waiter.granted);
	reclaim_withdraw(&large.reclaimable);
	reclaim_withdraw(&next.reclaimable);
	refund(&scene, 0, 8);
	refund(&scene, 1, 8);
	close_scene(&scene);
}

static void test_what_the_host_has_no_room_for_is_in_nobodys_way(void **state)
{
	struct scene scene;
	struct waiter waiter;
	struct thing stuck[3], fits;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 10);
	for (unsigned i = 0; i < 3; i++) {
		offer(&scene, 0, RECLAIM_SEQUENCE, &stuck[i], 2, &begun);
		stuck[i].refuses = true;
	}
	offer(&scene, 0, RECLAIM_SEQUENCE, &fits, 2, &begun);
	ask(&scene, 0, 4, &waiter);
	assert_int_equal(fits.order, 1);
	assert_false(waiter.refused);
	end_thing(&scene, &fits);
	run_loop(&scene, 1);
	assert_true(waiter.refused); /* each was asked, and none goes */
	assert_int_equal(begun, 1);
	for (unsigned i = 0; i < 3; i++)
		reclaim_withdraw(&stuck[i].reclaimable);
	refund(&scene, 0, 8);
	close_scene(&scene);
}

static void test_above_high_the_background_reclaims_and_workers_are_told(void **state)
{
	struct scene scene;
	struct thing one, two;
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	assert_int_equal(quota_set(&scene.tenants[0]->quota, 0, 4 * UNIT, 10 * UNIT, scene.text), 0);
	offer(&scene, 0, RECLAIM_SEQUENCE, &one, 2, &begun);
	offer(&scene, 0, RECLAIM_SEQUENCE, &two, 2, &begun);
	charge(&scene, 0, 4);
	run_loop(&scene, 1);
	assert_int_equal(begun, 0);
	assert_int_equal(scene.told[0], 0);
	charge(&scene, 0, 2);
	run_loop(&scene, 1);
	assert_int_equal(begun, 1);
	assert_int_equal(scene.pressure[0], 1);
	end_thing(&scene, &one);
	run_loop(&scene, 1);
	assert_int_equal(scene.pressure[0], 0);
	assert_int_equal(two.order, 0);
	charge(&scene, 0, 6); /* up to max is granted all the same */
	run_loop(&scene, 1);
	assert_int_equal(two.order, 2);
	assert_int_equal(scene.told[0], 2);
	end_thing(&scene, &two);
	run_loop(&scene, 1);
	assert_int_equal(scene.pressure[0], 1); /* still above */
	refund(&scene, 0, 4);
	run_loop(&scene, 1);
	assert_int_equal(scene.pressure[0], 0);
	refund(&scene, 0, 4);
	close_scene(&scene);
}

static void test_begin_counts_by_kind(void **state)
{
	struct scene scene;
	struct thing things[3];
	uint32_t counts[RECLAIM_KINDS] = {0};
	unsigned begun = 0;

	(void)state;
	open_scene(&scene);
	charge(&scene, 0, 6);
	offer(&scene, 0, RECLAIM_SEQUENCE, &things[0], 2, &begun);
	offer(&scene, 0, RECLAIM_CONTEXT, &things[1], 2, &begun);
	offer(&scene, 0, RECLAIM_SEQUENCE, &things[2], 2, &begun);
	assert_int_equal(reclaim_begin(scene.tenants[0], UINT64_MAX, counts), 6 * UNIT);
	assert_int_equal(counts[RECLAIM_CONTEXT], 1);
	assert_int_equal(counts[RECLAIM_SEQUENCE], 2);
	for (unsigned i = 0; i < 3; i++)
		end_thing(&scene, &things[i]);
	close_scene(&scene);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_contexts_go_first_oldest_first_and_no_more_than_lacks),
		cmocka_unit_test(test_nothing_on_its_way_is_a_refusal_at_once),
		cmocka_unit_test(test_what_can_never_fit_takes_nothing),
		cmocka_unit_test(test_waits_for_what_is_not_yet_unmapped),
		cmocka_unit_test(test_requests_are_served_in_their_order),
		cmocka_unit_test(test_nobody_is_behind_for_ever),
		cmocka_unit_test(test_no_request_waits_for_ever),
		cmocka_unit_test(test_a_full_pool_takes_from_others_what_is_above_their_min),
		cmocka_unit_test(test_others_give_the_furthest_above_its_min_first),
		cmocka_unit_test(test_others_do_not_take_what_reaches_into_a_min),
		cmocka_unit_test(test_what_the_host_has_no_room_for_is_in_nobodys_way),
		cmocka_unit_test(test_above_high_the_background_reclaims_and_workers_are_told),
		cmocka_unit_test(test_begin_counts_by_kind),
	};

	return runner_run("reclaim", tests, sizeof(tests) / sizeof(tests[0]));
}
