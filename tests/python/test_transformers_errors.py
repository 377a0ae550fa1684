"""transformers on kvgate: what is refused, what goes back to the daemon and when, and other ways to generate."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

import kvgate
import kvgate.transformers
from daemon import Daemon, config
from models import make_model, prompts, write_gate

StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3")


@pytest.fixture
def gate(model: PreTrainedModel, tmp_path: Path) -> str:
    path = str(tmp_path / "gate.safetensors")
    write_gate(model, path)
    return path


def attached(model: PreTrainedModel, daemon: Daemon, **options: Any) -> kvgate.transformers.Attachment:
    return kvgate.transformers.attach(model, daemon.socket(), **{"max_sequences": 6, "max_tokens": 512, **options})


def greedy(model: PreTrainedModel, ids: torch.Tensor, new: int = 20, **options: Any) -> torch.Tensor:
    options.setdefault("past_key_values", DynamicCache(config=model.config))
    return model.generate(input_ids=ids, max_new_tokens=new, **{"do_sample": False, **options})


def clean(daemon: Daemon) -> bool:
    """The worker has gone, the tenant is charged nothing, and the daemon's books agree."""
    return bool(daemon.gone() and daemon.ctl("audit")["clean"])


# ---- refusals ----


def test_without_a_daemon_the_error_says_how_to_start_it(model: PreTrainedModel, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kvgate.NotRunningError, match=r"no\.sock: start it with `kvgated --config FILE`"):
        kvgate.transformers.attach(model, tmp_path / "no.sock")
    assert model.config._attn_implementation == "sdpa"
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_socket(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVGATE_SOCKET", raising=False)
    with pytest.raises(ValueError, match="KVGATE_SOCKET"):
        kvgate.transformers.attach(model)


def test_the_socket_may_come_from_the_environment(
    model: PreTrainedModel, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVGATE_SOCKET", daemon.socket())
    with kvgate.transformers.attach(model, max_tokens=64) as kv:
        assert kv.client.tenant == "a"


@pytest.mark.parametrize("policy", [{"ratio": 0.5}, {"budget": 200}, {"mode": "threshold", "threshold": 0.5}])
def test_evicting_needs_scores(model: PreTrainedModel, daemon: Daemon, policy: dict[str, Any]) -> None:
    with attached(model, daemon) as kv, pytest.raises(ValueError, match="gate= or scorer="):
        kv.cache(**policy)


def test_a_gate_of_another_model_is_refused(gate: str, daemon: Daemon) -> None:
    other = make_model("gemma3")
    with pytest.raises(kvgate.KvgateError, match=r"head_dim|layers|tensor|gate"):
        attached(other, daemon, gate=gate)
    assert other.config._attn_implementation == "sdpa"
    assert clean(daemon)


def test_an_unknown_policy_and_a_prefix_beyond_the_prompt(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20])
    with attached(model, daemon) as kv:
        with pytest.raises(TypeError):
            kv.cache(mask, windw=3)
        with pytest.raises(ValueError, match="ratio is 0"):
            kv.cache(mask, ratio=0.0)
        with kv.cache(mask, prefix_tokens=[3, 4]) as cache, pytest.raises(ValueError, match="a batch of 1"):
            model(ids, past_key_values=cache)
        assert daemon.tenant()["charged"] == 0


@pytest.mark.parametrize("chunk", [16000, 10, 20])
def test_padding_on_the_right_is_refused(model: PreTrainedModel, daemon: Daemon, chunk: int) -> None:
    """Also where a chunk ends just where the padding begins."""
    ids, mask = prompts([30, 30])
    mask[1, 20:] = 0
    with attached(model, daemon) as kv, pytest.raises(ValueError, match="padding has to be on the left"):
        kv.generate(ids, mask, chunk=chunk, max_new_tokens=5)
    assert clean(daemon)


def test_a_mask_of_another_shape_is_refused(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([30])
    with attached(model, daemon) as kv, kv.cache(mask) as cache:
        model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask: shape \(1, 5\)"):
            model(ids[:, 20:], attention_mask=mask[:, :5], past_key_values=cache)


def test_a_batch_goes_on_with_as_many_tokens_of_each(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20, 20])
    longer = torch.cat((mask, torch.tensor([[0, 0, 1], [1, 1, 1]])), dim=1)
    longer[0, :20] = 0
    longer[0, 19] = 0
    with attached(model, daemon) as kv, kv.cache([20, 20]) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="as many tokens of each sequence"):
            model(ids[:, :3], attention_mask=longer, past_key_values=cache)


def test_a_batch_of_another_size_is_refused(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20, 20])
    with attached(model, daemon) as kv, kv.cache(mask) as cache:
        with pytest.raises(ValueError, match="a batch of 1, the cache was made for 2"):
            model(ids[:1], past_key_values=cache)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="a batch of 1, the cache holds 2 sequences"):
            model(ids[:1, :1], past_key_values=cache)


def test_tokens_beyond_what_was_asked_for(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20])
    with attached(model, daemon) as kv, kv.cache(mask, max_new_tokens=7) as cache:
        found = greedy(model, ids, 8, past_key_values=cache)  # the last token is not fed
        assert torch.equal(found, greedy_of(model, ids, 8))
        with pytest.raises(ValueError, match="27 tokens and 1 more, the cache was made for 27"):
            model(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 27
    assert clean(daemon)


def greedy_of(model: PreTrainedModel, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy tokens of the model's own attention, also while it is attached."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        return greedy(model, ids, new)
    finally:
        model.set_attn_implementation(before)


def test_a_refusal_names_bytes_leaks_nothing_and_ends(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config(a="device.max = 2M"))
    ids, mask = prompts([100] * 3)
    expected = greedy(model, ids[:1])
    with attached(model, daemon) as kv:
        with pytest.raises(kvgate.RefusedError, match=r"[0-9.]+ [KM]iB|bytes"):
            kv.generate(*prompts([400] * 6), max_new_tokens=100)
        assert daemon.tenant()["charged"] == daemon.tenant()["promised"] == 0
        assert not kv.client.sequences
        assert torch.equal(kv.generate(ids[:1], mask[:1], max_new_tokens=20, do_sample=False), expected)
    assert clean(daemon)


def test_an_attached_model_needs_its_cache(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20])
    with attached(model, daemon) as kv:
        with pytest.raises(kvgate.KvgateError, match=r"past_key_values=attachment\.cache"):
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
        with pytest.raises(kvgate.KvgateError, match=r"past_key_values=attachment\.cache"):
            model(ids)
        assert kv.generate(ids, mask, max_new_tokens=3).shape == (1, 23)


def test_beam_search_is_refused(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20])
    with attached(model, daemon) as kv:
        with pytest.raises(kvgate.KvgateError, match="beam search needs sequences that share blocks"):
            kv.generate(ids, mask, max_new_tokens=5, num_beams=2)
        assert not kv.client.sequences
        text = "beam search needs sequences that share blocks"
        with kv.cache(max_new_tokens=5) as cache, pytest.raises(kvgate.KvgateError, match=text):
            greedy(model, ids, 5, past_key_values=cache, num_beams=2)
        assert not kv.client.sequences


def test_a_model_is_attached_once(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20])
    with attached(model, daemon) as kv:
        with pytest.raises(ValueError, match="attached to kvgate already"):
            attached(model, daemon)
        assert torch.equal(kv.generate(ids, mask, max_new_tokens=9, do_sample=False), greedy_of(model, ids, 9))
    assert model.config._attn_implementation == "sdpa"
    with attached(model, daemon) as kv:
        assert kv.generate(ids, mask, max_new_tokens=3).shape == (1, 23)


def test_a_cache_works_with_its_own_model_only(model: PreTrainedModel, daemon: Daemon) -> None:
    """Elsewhere, attention would see the newest tokens only, without a word."""
    ids, mask = prompts([20])
    other = make_model("llama")
    with attached(model, daemon) as kv, kv.cache(mask) as cache:
        with pytest.raises(kvgate.KvgateError, match="only with the model that it was made for"):
            other(ids, past_key_values=cache)
        with attached(other, daemon), pytest.raises(ValueError, match="made by another attachment"):
            other(ids, past_key_values=cache)
        with pytest.raises(kvgate.KvgateError, match="called as a whole"):
            model.model(ids, past_key_values=cache)
        model(ids, past_key_values=cache)
    with pytest.raises(kvgate.KvgateError, match=r"until detach\(\)"):
        model(ids, past_key_values=cache)


# ---- steps that break off ----


class Breaks:
    """Makes a module of the model raise once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.armed = True
        self.hook = module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        if self.armed:
            self.armed = False
            raise MemoryError("no memory for this layer")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("part", ["mlp of layer 2", "head"])
@torch.no_grad()
def test_a_step_that_broke_off_may_be_repeated(family: str, part: str, daemon: Daemon) -> None:
    """The prompt, several tokens, one token; with a budget and its pending hidden states, and at its event."""
    model = make_model(family)
    ids, _ = prompts([420])
    parts = [ids[:, :140], *ids[:, 140:390].split(1, dim=1)]  # events after the prompt and at 257 and 385 tokens
    if family == "llama":
        parts += [ids[:, 390:409], ids[:, 409:]]

    def logits(breaks: set[int]) -> list[torch.Tensor]:
        found = []
        policy: dict[str, Any] = {"ratio": 0.9, "window": 4, "budget": 135, "max_new_tokens": 280}
        kv = attached(model, daemon, scorer=lambda _, h: h[:, :2].float().sigmoid())
        with kv, kv.cache([140], **policy) as cache:
            for i, step in enumerate(parts):
                if i in breaks:
                    broken = Breaks(model.model.layers[2].mlp if part != "head" else model.lm_head)
                    with pytest.raises(MemoryError):
                        model(step, past_key_values=cache)
                    broken.hook.remove()
                    assert cache.get_seq_length() == sum(p.shape[1] for p in parts[:i])
                found.append(model(step, past_key_values=cache).logits)
            assert cache.info()[0].generation > 1
            found.append(torch.tensor([float(cache.info()[0].pairs)]))
        return found

    expected = logits(set())
    for ours, theirs in zip(logits({0, 5, 6, 117, 150, len(parts) - 1}), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert clean(daemon)


@torch.no_grad()
def test_a_broken_chunk_of_sliding_layers_is_not_gone_on_with(daemon: Daemon) -> None:
    model = make_model("gemma3")
    ids, _ = prompts([60])
    expected = greedy(model, ids)
    with attached(model, daemon) as kv, kv.cache(ids) as cache:
        model(ids[:, :40], past_key_values=cache)
        broken = Breaks(model.model.layers[2].mlp)
        with pytest.raises(MemoryError):
            model(ids[:, 40:50], past_key_values=cache)
        broken.hook.remove()
        for _ in range(2):
            with pytest.raises(kvgate.KvgateError, match="overwritten KV of the sliding layers"):
                model(ids[:, 40:50], past_key_values=cache)
        cache.free()
        assert torch.equal(greedy(model, ids, past_key_values=cache), expected)


# ---- lifetime ----


def test_detach_restores_the_model(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([20])
    expected = greedy(model, ids)
    kv = attached(model, daemon)
    cache = kv.cache(mask)
    greedy(model, ids, past_key_values=cache)
    kv.detach()
    assert clean(daemon)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(greedy(model, ids), expected)
    kv.detach()
    cache.free()


def test_a_cache_that_nobody_has_is_freed(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, _ = prompts([20])
    with attached(model, daemon) as kv:
        gc.disable()
        try:
            cache = kv.cache()
            greedy(model, ids, past_key_values=cache)
            assert daemon.tenant()["charged"] > 0
            del cache
            assert not kv.client.sequences, "it takes the garbage collector"
        finally:
            gc.enable()
        assert daemon.tenant()["charged"] == 0
        cache = kv.cache()
        cache.myself = cache  # type: ignore[attr-defined]
        greedy(model, ids, past_key_values=cache)
        del cache
        gc.collect()
        assert not kv.client.sequences
        assert daemon.ctl("audit")["clean"]


def test_a_cache_that_ends_inside_of_a_call_waits_for_the_next_step(model: PreTrainedModel, daemon: Daemon) -> None:
    """The garbage collector may run in the middle of a client's call, on the thread that has the client's lock."""
    ids, mask = prompts([20])
    with attached(model, daemon) as kv:
        cache = kv.cache()
        greedy(model, ids, past_key_values=cache)
        done = threading.Event()

        def inside() -> None:
            nonlocal cache
            with kv.client._turns:
                del cache
            done.set()

        threading.Thread(target=inside, daemon=True).start()
        assert done.wait(30), "deadlock"
        assert len(kv.client.sequences) == 1
        kv.generate(ids, mask, max_new_tokens=2)
        assert not kv.client.sequences


def test_a_failed_step_does_not_keep_its_cache_alive(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, _ = prompts([20])
    with attached(model, daemon) as kv:
        cache = kv.cache()
        broken = Breaks(model.model.layers[1].mlp)
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        broken.hook.remove()
        del cache
        gc.collect()
        assert not kv.client.sequences


def test_two_caches_take_turns(model: PreTrainedModel, daemon: Daemon) -> None:
    one, two = prompts([30], seed=5)[0], prompts([18], seed=6)[0]
    expected = [greedy(model, one), greedy(model, two)]
    with attached(model, daemon) as kv, kv.cache() as first, kv.cache() as second, torch.no_grad():
        caches, tokens = [first, second], [one, two]
        for _ in range(20):
            for i, cache in enumerate(caches):
                new = model(tokens[i][:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1].argmax(-1)
                tokens[i] = torch.cat((tokens[i], new[:, None]), dim=1)
        assert all(map(torch.equal, tokens, expected))
        first.free()
        assert len(kv.client.sequences) == 1
        assert torch.equal(greedy(model, one, past_key_values=first), expected[0])
    assert clean(daemon)


def test_a_batch_loses_sequences(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, _ = prompts([25, 25, 25])
    expected = greedy(model, ids)
    with attached(model, daemon) as kv, kv.cache() as cache, torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert len(kv.client.sequences) == 2
        assert torch.equal(greedy(model, ids[[2, 0]], past_key_values=cache), expected[[2, 0]])
        with pytest.raises(kvgate.KvgateError, match="share blocks"):
            cache.batch_select_indices(torch.tensor([0, 0]))


# ---- other ways to generate ----


def test_crop_goes_back(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, _ = prompts([40])
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        with attached(model, daemon) as kv, kv.cache() as cache:
            model(ids[:, :35], past_key_values=cache)
            model(ids[:, :9], past_key_values=cache)
            cache.crop(-9)
            cache.crop(0)
            assert cache.get_seq_length() == 35
            found = model(ids[:, 35:], past_key_values=cache).logits[:, -1]
            with pytest.raises(ValueError, match=r"crop\(3\)"):
                cache.crop(3)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_crop_stops_at_an_eviction(model: PreTrainedModel, gate: str, daemon: Daemon) -> None:
    """Of a batch too, where one sequence has nothing to evict: none is cropped then."""
    ids, mask = prompts([60, 60])
    with torch.no_grad(), attached(model, daemon, gate=gate) as kv, kv.cache(mask, ratio=0.5) as cache:
        model(ids, past_key_values=cache)
        model(ids[:, :5], past_key_values=cache)
        cache.crop(-5)
        with pytest.raises(kvgate.KvgateError, match=r"crop\(-1\): sequence . has 60 tokens, and the oldest 60"):
            cache.crop(-1)
        assert cache.get_seq_length() == 60


@torch.no_grad()
def test_crop_with_a_budget_scores_what_stayed(model: PreTrainedModel, gate: str, daemon: Daemon) -> None:
    """Drafts that were rejected on the way to an event, and over one that had nothing to do, leave no trace."""
    ids, _ = prompts([200])
    junk, _ = prompts([30], seed=9)
    found = []
    for drafts in (False, True):
        with attached(model, daemon, gate=gate) as kv, kv.cache([100], budget=165) as cache:
            model(ids[:, :100], past_key_values=cache)
            for at in range(100, 200):
                if drafts and at in (103, 110, 128):
                    model(junk, past_key_values=cache)  # from 103, 110: over position 128, within the budget
                    cache.crop(-30)
                model(ids[:, at : at + 1], past_key_values=cache)
            for at in range(70):
                logits = model(ids[:, at : at + 1], past_key_values=cache).logits
            found.append((logits, cache.info()[0].pairs, cache.info()[0].generation))
    assert found[0][1:] == found[1][1:]
    assert found[0][2] > 0
    assert found[0][1] < 270 * 8
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)


def test_assisted_decoding_gives_the_same_tokens(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([40])
    draft = make_model("qwen3")
    with torch.no_grad():
        draft.lm_head.weight[::7] += 0.05  # right now and then
    expected = greedy(model, ids, 60)
    crops: list[int] = []
    with attached(model, daemon) as kv, kv.cache(mask) as cache:
        real = cache.crop
        cache.crop = lambda n: (crops.append(n), real(n))[1]  # type: ignore[method-assign]
        found = greedy(model, ids, 60, past_key_values=cache, attention_mask=mask, assistant_model=draft)
        assert torch.equal(found, expected)
        assert min(crops) < 0, "every draft was right"
    assert clean(daemon)


def test_prompt_lookup_gives_the_same_tokens(daemon: Daemon) -> None:
    model = make_model("qwen2")
    ids = torch.arange(2, 12).repeat(6)[None]
    expected = greedy(model, ids, 40)
    with attached(model, daemon) as kv:
        mask = torch.ones_like(ids)
        found = kv.generate(ids, mask, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [[30], [30, 13]])
def test_several_samples_of_each_prompt(model: PreTrainedModel, daemon: Daemon, lengths: list[int]) -> None:
    ids, mask = prompts(lengths)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7}
    torch.manual_seed(1)
    expected = greedy(model, ids, attention_mask=mask, **options)
    assert len({tuple(row.tolist()) for row in expected}) == 3 * len(lengths)
    with attached(model, daemon) as kv:
        torch.manual_seed(1)
        found = kv.generate(ids, mask, max_new_tokens=20, chunk=8, **options)
        assert torch.equal(found, expected)
    assert clean(daemon)


# ---- a daemon that dies ----


def test_a_daemon_that_dies_ends_the_generation(model: PreTrainedModel, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    ids, mask = prompts([40])
    expected = greedy(model, ids)
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 10:
            os.kill(daemon.pid, signal.SIGKILL)

    with attached(model, daemon) as kv:
        hook = model.register_forward_hook(count)
        with pytest.raises(kvgate.ConnectionLostError, match=r"daemon|connection|gone"):
            kv.generate(ids, mask, max_new_tokens=400, do_sample=False)
        hook.remove()
        assert 10 <= steps <= 10 + 128 + 1
        with pytest.raises(kvgate.ConnectionLostError):
            kv.generate(ids, mask, max_new_tokens=20)
    assert torch.equal(greedy(model, ids), expected)
    again = start_daemon()
    with attached(model, again) as kv:
        assert torch.equal(kv.generate(ids, mask, max_new_tokens=20, do_sample=False), expected)


def test_a_window_that_the_configuration_does_not_lay_out_is_refused(daemon: Daemon) -> None:
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=16)).eval()
    ids, mask = prompts([40])
    with (
        kvgate.transformers.attach(model, daemon.socket(), max_tokens=256) as kv,
        pytest.raises(ValueError, match="window of 16 tokens"),
    ):
        kv.generate(ids, mask, max_new_tokens=2)


@pytest.mark.parametrize(("key", "value"), [("model_type", "llama"), ("hidden_size", "4096"), ("model_layers", "[3]")])
def test_a_gate_that_names_another_model_is_refused(
    model: PreTrainedModel, gate: str, daemon: Daemon, tmp_path: Path, key: str, value: str
) -> None:
    other = str(tmp_path / "other.safetensors")
    save_file(load_file(gate), other, metadata={key: value})
    with pytest.raises(ValueError, match=key):
        kvgate.transformers.attach(model, daemon.socket(), gate=other, max_tokens=256)


def test_padding_counts_when_a_prompt_is_fed_token_by_token(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([30, 9])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    own = model.generate(input_ids=ids, attention_mask=mask, **options)
    with kvgate.transformers.attach(model, daemon.socket(), max_tokens=256) as kv:
        assert torch.equal(kv.generate(ids, mask, chunk=1, **options), own)


def test_a_second_thread_is_refused_and_the_first_goes_on(model: PreTrainedModel, daemon: Daemon) -> None:
    ids, mask = prompts([30])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    own = model.generate(input_ids=ids, attention_mask=mask, **options)
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread() is first and not go_on.is_set():
            inside.set()
            assert go_on.wait(60)

    found: list[torch.Tensor] = []
    with kvgate.transformers.attach(model, daemon.socket(), max_tokens=256) as kv:
        hook = model.model.layers[1].register_forward_hook(hold)
        first = threading.Thread(target=lambda: found.append(kv.generate(ids, mask, **options)), name="the-first")
        first.start()
        assert inside.wait(60)
        try:
            with pytest.raises(kvgate.KvgateError, match="the-first is in a forward pass"):
                kv.generate(ids, mask, **options)
        finally:
            go_on.set()
            first.join()
            hook.remove()
        assert torch.equal(found[0], own)
        assert torch.equal(kv.generate(ids, mask, **options), own)
