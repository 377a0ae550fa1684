/*
 * oracle.h - the eviction rules of the method applied to the model of a
 * sequence (kv.h), the plain way: copy the scores, sort them all, compare.
 */
#ifndef KVG_TEST_ORACLE_H
#define KVG_TEST_ORACLE_H

#include "tests/integration/kv.h"

/* Prefill eviction by the sequence's policy: clears what goes from kv->held and moves kv->start. 0 or -ENOMEM. */
int oracle_prefill(struct kv *kv);

/* Decode eviction by the sequence's budget. 0 or -ENOMEM. */
int oracle_decode(struct kv *kv);

#endif
