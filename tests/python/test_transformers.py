"""transformers on kvgate without eviction: the same tokens as with transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import kvgate.transformers
from daemon import Daemon
from models import FAMILIES, WINDOW, make_model, prompts

StartDaemon = Callable[..., Daemon]

LENGTHS = [70, 45, 9]  # all but one longer than gemma3's window
CHUNK = 20  # divides none of them
NEW = 28  # gemma3's window wraps


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of each family in f32."""
    return make_model(request.param)


def greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """What the model's own attention and cache say."""
    options.setdefault("past_key_values", DynamicCache(config=model.config))
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


def attached(model: PreTrainedModel, daemon: Daemon, **options: Any) -> kvgate.transformers.Attachment:
    """The model on the daemon, with tables of this file's size."""
    return kvgate.transformers.attach(model, daemon.socket(), max_sequences=6, max_tokens=512, **options)


@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one", "ragged"])
def test_greedy_tokens_are_those_of_the_own_cache(model: PreTrainedModel, daemon: Daemon, lengths: list[int]) -> None:
    ids, mask = prompts(lengths)
    expected = greedy(model, ids, mask)
    assert len(set(expected[0, -NEW:].tolist())) > 4, "the model says the same all the time"
    with attached(model, daemon) as kv:
        for chunk in (16000, CHUNK):
            found = kv.generate(ids, mask, chunk=chunk, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(found, expected), f"chunk {chunk}"
    assert torch.equal(greedy(model, ids, mask), expected), "after detach()"
    assert daemon.gone()


def test_chunks_need_not_divide_what_model_generate_is_given(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts(LENGTHS)
    expected = greedy(model, ids, mask)
    with attached(model, daemon) as kv, kv.cache(mask, chunk=CHUNK, max_new_tokens=NEW) as cache:
        found = greedy(model, ids, mask, past_key_values=cache, prefill_chunk_size=CHUNK)
        assert torch.equal(found, expected)
        assert cache.get_seq_length() == ids.shape[1] + NEW - 1
        assert [row.pairs for row in cache.info()] == [
            (n + NEW - 1) * kv.store.layers * kv.store.heads for n in LENGTHS
        ]


def test_forward_gives_the_logits_of_the_own_cache(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, _ = prompts([60])
    parts = [ids[:, :23], ids[:, 23:24], ids[:, 24:51], ids[:, 51:]]
    with torch.no_grad():
        own = DynamicCache(config=model.config)
        expected = [model(part, past_key_values=own).logits for part in parts]
        with attached(model, daemon) as kv, kv.cache(ids) as cache:
            found = [model(part, past_key_values=cache).logits for part in parts]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_padding_is_found_where_arguments_have_no_names(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([30, 12])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, mask, positions).logits[:, -1]
        with attached(model, daemon) as kv, kv.cache(mask) as cache:
            found = model(ids, mask, positions, cache).logits[:, -1]
            assert [row.pairs // kv.store.layers // kv.store.heads for row in cache.info()] == [30, 12]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one", "ragged"])
def test_a_conversation_goes_on_in_its_cache(model: PreTrainedModel, daemon: Daemon, lengths: list[int]) -> None:
    ids, mask = prompts(lengths)
    more, _ = prompts([33] * len(lengths), seed=8)

    def talk(cache: Any, **options: Any) -> list[torch.Tensor]:
        first = greedy(model, ids, mask, past_key_values=cache, **options)
        second = torch.cat((first, more), dim=1)
        ones = torch.ones_like(second[:, ids.shape[1] :])
        return [first, greedy(model, second, torch.cat((mask, ones), dim=1), past_key_values=cache, **options)]

    expected = talk(DynamicCache(config=model.config))
    with attached(model, daemon) as kv:
        for options in ({}, {"prefill_chunk_size": CHUNK}):
            with kv.cache(mask, max_new_tokens=2 * NEW + more.shape[1]) as cache:
                found = talk(cache, **options)
            assert all(map(torch.equal, found, expected)), options


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_as_its_rounding(family: str, daemon: Daemon) -> None:
    """The same bf16 K, V and weights go through another order of sums: each of 4 layers rounds its output to 8 bits,
    2^-9 of its size, so the results differ by some units of that. The bound is 4 layers x 2 x 2^-8 of the logits' size.
    """
    model = make_model(family, torch.bfloat16)
    ids, _ = prompts([70])
    parts = [ids[:, :50], ids[:, 50:69], ids[:, 69:]]
    with torch.no_grad():
        own = DynamicCache(config=model.config)
        expected = torch.cat([model(part, past_key_values=own).logits for part in parts], dim=1).float()
        with attached(model, daemon) as kv, kv.cache(ids) as cache:
            found = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1).float()
            assert kv.client.layout is not None
            assert kv.client.layout.dtype == "bf16"
    error = (found - expected).norm() / expected.norm()
    assert error < 4 * 2 * 2**-8, f"{error:.4f}"


def test_gemma3_holds_no_more_than_its_window(daemon: Daemon) -> None:
    model = make_model("gemma3")
    ids, mask = prompts([200])
    with attached(model, daemon) as kv:
        assert (kv.store.layers, kv.store.window) == (2, -1)
        assert kv.ring is not None
        assert (kv.ring.layers, kv.ring.window) == (2, WINDOW)
        with kv.cache(mask) as cache:
            greedy(model, ids, mask, past_key_values=cache)
            rings = kv.ring.client.sequences
            blocks = -(-WINDOW // 16)
            assert [ring.query().reserved_pos <= 512 for ring in rings] == [True]
            assert rings[0].query().blocks <= 8 * blocks * kv.ring.layers * kv.ring.heads
