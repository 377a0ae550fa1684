"""The pilot model with caches that were on the host, were recalled, or belong to another process: the same answers."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from test_transformers_pilot import BOS, GATE, PILOT, QUERY, REPLY, needles
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvgate.transformers
from conftest import StartDaemon
from daemon import config
from models import make_model

CHUNK = 1000
RULES: dict[str, Any] = {"chunk": CHUNK, "window": 50, "prefix_tokens": 1, "max_new_tokens": 64}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(PILOT, dtype=torch.float32).eval()
    return loaded


def context() -> torch.Tensor:
    return torch.tensor([[BOS, *needles()[0]["context"].encode("latin-1")]])


def question(number: int) -> torch.Tensor:
    return torch.tensor([[QUERY, *needles()[0]["queries"][number]["name"].encode(), REPLY]])


@torch.no_grad()
def read(model: PreTrainedModel, cache: kvgate.transformers.KvgateCache, tokens: torch.Tensor) -> None:
    for begin in range(0, tokens.shape[1], CHUNK):
        model(tokens[:, begin : begin + CHUNK], past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def ask(model: PreTrainedModel, cache: kvgate.transformers.KvgateCache, number: int) -> torch.Tensor:
    """Logits of a question's tokens, which are forgotten afterwards."""
    ids = question(number)
    logits: torch.Tensor = model(ids, past_key_values=cache).logits
    cache.crop(-ids.shape[1])
    return logits


def test_a_cache_comes_back_from_the_host(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config(size="128M", host="64M"))
    with (
        kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=1) as kv,
        kv.cache(context(), ratio=0.3, **RULES) as cache,
    ):
        read(model, cache, context())
        before, mapped = ask(model, cache, 0), kv.client.mapped_bytes
        assert cache.offload() > 0
        assert kv.client.mapped_bytes < mapped
        assert cache.sequences[0].residency().offloaded
        # The next step brings it back.
        assert torch.equal(ask(model, cache, 0), before)
        cache.offload()
        cache.restore()
        assert not cache.sequences[0].residency().offloaded
        assert torch.equal(ask(model, cache, 0), before)
        cache.idle()
        assert cache.sequences[0].residency().idle
        assert torch.equal(ask(model, cache, 0), before)
    assert daemon.gone()
    assert daemon.ctl("audit")["clean"]


def test_recall_answers_as_the_higher_ratio(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config(size="128M", host="64M"))
    rules: dict[str, Any] = {**RULES, "chunk": 16000}
    with kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=2) as kv, torch.no_grad():
        high = kv.cache(context(), ratio=0.3, **rules)
        low = kv.cache(context(), ratio=0.1, retain="host", **rules)
        for cache in (high, low):
            model(context(), past_key_values=cache, logits_to_keep=1)
        assert low.info()[0].pairs < high.info()[0].pairs
        (result,) = low.recall(ratio=0.3)
        assert result.pairs_held == high.info()[0].pairs
        assert result.pairs_recalled > 0
        for number in range(len(needles()[0]["queries"])):
            torch.testing.assert_close(ask(model, low, number), ask(model, high, number), rtol=0, atol=1e-3)


def test_another_attachment_begins_with_a_published_context(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    daemon, tokens = start_daemon(config(size="128M")), context()
    full = [torch.cat((tokens, question(number)), 1) for number in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "prefill_chunk_size": CHUNK}

    with kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=1) as kv:
        expected = []
        for ids in full:
            with kv.cache(tokens, ratio=0.3, **RULES) as cache:
                read(model, cache, tokens)
                expected.append(model.generate(input_ids=ids, past_key_values=cache, **options))
        with kv.cache(tokens, ratio=0.3, **RULES) as cache:
            read(model, cache, tokens)
            info = kv.publish(cache, tokens)
            assert (info.tokens, info.existed) == (tokens.shape[1], False)
            # The publisher goes on.
            assert torch.equal(model.generate(input_ids=full[0], past_key_values=cache, **options), expected[0])
    with kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=1) as kv:
        for ids, wanted in zip(full, expected, strict=True):
            with kv.attach_context(tokens, ratio=0.3, **RULES) as cache:
                assert cache.columns == cache.get_seq_length() == tokens.shape[1]
                assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **options), wanted)
        with pytest.raises(kvgate.KvgateError, match="no part of the 3000 tokens is published") as error:
            kv.attach_context(tokens[:, :3000], ratio=0.4, **RULES)
        assert error.value.errno == errno.ENOENT
    assert daemon.ctl("audit")["clean"]


def test_the_longest_part_is_taken_and_the_rest_is_fed(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    """What is published between two chunks serves every prompt that begins so."""
    daemon, tokens = start_daemon(config(size="128M")), context()
    rules: dict[str, Any] = {**RULES, "ratio": 1.0}
    ids = torch.cat((tokens, question(0)), 1)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "prefill_chunk_size": CHUNK}
    with kvgate.transformers.attach(model, daemon.socket(), gate=GATE, max_sequences=1) as kv:
        with kv.cache(tokens, **rules) as cache:
            read(model, cache, tokens[:, : 2 * CHUNK])
            kv.publish(cache, tokens[0, : 2 * CHUNK].tolist())
            read(model, cache, tokens[:, 2 * CHUNK :])
            expected = model.generate(input_ids=ids, past_key_values=cache, **options)
        with kv.attach_context(tokens, **rules) as cache:
            assert cache.columns == 2 * CHUNK
            assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **options), expected)


def test_what_cannot_be_shared_is_refused(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    daemon, two = start_daemon(config(size="128M")), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with kvgate.transformers.attach(model, daemon.socket(), max_sequences=2) as kv, kv.cache(two) as cache:
        with pytest.raises(ValueError, match="publish: the cache holds 0 sequences, not one"):
            kv.publish(cache, [1, 2, 3])
        read(model, cache, two)
        with pytest.raises(ValueError, match="publish: the cache holds 2 sequences, not one"):
            kv.publish(cache, [1, 2, 3])
        with pytest.raises(ValueError, match="tokens: 2 sequences, not one"):
            kv.attach_context(two)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match="publish: 2 tokens, the cache holds 3"):
            kv.publish(cache, [1, 2])
    gemma = make_model("gemma3")
    with kvgate.transformers.attach(gemma, daemon.socket(), max_sequences=1) as kv, kv.cache(two[:1]) as cache:
        read(gemma, cache, two[:1])
        with pytest.raises(kvgate.KvgateError, match="contexts are not shared by models with sliding layers"):
            kv.publish(cache, two[:1])
