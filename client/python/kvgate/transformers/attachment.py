"""Puts a transformers model on kvgated: connections, hooks, and the attention function."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import AttentionInterface

from kvgate import Client, ContextInfo, KvgateError, Policy

from .cache import NO_BEAMS, KvgateCache
from .geometry import attention_modules, check_gate, geometry_of
from .rows import Row
from .scoring import Scorer, Stage
from .store import Store

_NAME = "kvgate"
_CHUNK = 16000
_MAX_TOKENS = 32768  # of a sequence, when neither the caller nor the model says less
_RING_STAGING = 1 << 20


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B][query heads][T][D], key and value [B][heads][T][D] fresh ones."""
    _refuse(module, options)
    cache = getattr(key, "kvgate_cache", None)
    if not isinstance(cache, KvgateCache):
        raise KvgateError(0, "the model is attached to kvgate: pass past_key_values=attachment.cache(...)")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    cache.check_window(int(module.layer_idx), options.get("sliding_window"))
    return cache.attend(int(module.layer_idx), query.detach(), key.detach(), value.detach(), scale), None


def _refuse(module: Any, options: dict[str, Any]) -> None:
    """ValueError for what a model asks of its attention function and kvgate's does not do."""
    what = f"{type(module).__name__} of layer {module.layer_idx}"
    for name in ("s_aux", "softcap", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"{what}: its attention has {name}, which kvgate does not compute")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{what}: its attention is not causal")


AttentionInterface.register(_NAME, attention)


class Attachment:
    """A model whose KV lies in kvgated, until detach() or the end of `with`. Made by attach()."""

    def __init__(
        self,
        model: Any,
        socket: str | os.PathLike[str] | None,
        *,
        gate: str | os.PathLike[str] | None,
        scorer: Scorer | None,
        name: str,
        max_sequences: int,
        max_tokens: int | None,
        staging_bytes: int | None,
        stage: Literal["hidden", "preact"] | None,
    ) -> None:
        self.model, self.geometry = model, geometry_of(model)
        self.scores = gate is not None or scorer is not None
        self.measure = False
        self._spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._clients: list[Client] = []
        self._orphans: list[Row] = []
        self._names = list(inspect.signature(model.forward).parameters)
        self._before: str = self.model.config._attn_implementation
        self._cache: KvgateCache | None = None
        self._turn = threading.Lock()
        self._thread: threading.Thread | None = None  # the one in a forward pass
        if self._before == _NAME:
            raise ValueError(f"{type(model).__name__}: it is attached to kvgate already: detach() that first")
        path = os.fspath(socket) if socket is not None else os.environ.get("KVGATE_SOCKET", "")
        if not path:
            raise ValueError("no socket: pass the path of the tenant's socket, or set KVGATE_SOCKET")
        try:
            self._open(path, gate, scorer, name, max_sequences, max_tokens, staging_bytes, stage)
            self._hook()
        except BaseException:
            self.detach()
            raise

    # ---- set-up ----

    def _open(
        self,
        path: str,
        gate: str | os.PathLike[str] | None,
        scorer: Scorer | None,
        name: str,
        max_sequences: int,
        max_tokens: int | None,
        staging_bytes: int | None,
        stage: str | None,
    ) -> None:
        shape = self.geometry
        device = next(self.model.parameters()).device
        tokens = max_tokens or min(self.model.config.get_text_config().max_position_embeddings, _MAX_TOKENS)
        staging = staging_bytes or max(16 << 20, 4 * min(_CHUNK, tokens) * shape.hidden)
        self.client = self._connect(path, name, len(shape.global_layers), max_sequences, tokens, staging, device)
        if gate is not None:
            self.client.load_gate(gate)
            check_gate(os.fspath(gate), shape)
        self.store, self.ring = Store(self.client), None
        preact = (stage or ("preact" if self.client.kind == "cuda" else "hidden")) == "preact"
        self.stage = Stage(self.client, os.fspath(gate) if gate else None, scorer, preact, device)
        if shape.window_layers:
            ring = self._connect(
                path,
                name + "-window",
                len(shape.window_layers),
                max_sequences,
                shape.window,
                _RING_STAGING + 2 * shape.hidden,
                device,
            )
            self.ring = Store(ring, shape.window)
        self.stores = [self.store, self.ring] if self.ring else [self.store]
        self._places = {number: (self.store, i) for i, number in enumerate(shape.global_layers)}
        if self.ring:
            self._places |= {number: (self.ring, i) for i, number in enumerate(shape.window_layers)}

    def _connect(
        self, path: str, name: str, layers: int, max_sequences: int, max_tokens: int, staging: int, device: torch.device
    ) -> Client:
        client = Client(path, name)
        self._clients.append(client)
        if (client.kind == "cuda") != (device.type == "cuda"):
            raise ValueError(f"the model is on {device}, the daemon's memory is of the kind {client.kind}")
        if client.kind == "cuda":
            client.set_stream(torch.cuda.current_stream(device))
        client.register(self.geometry.layout(layers, max_sequences, max_tokens), staging)
        return client

    def _hook(self) -> None:
        layers = len(self.geometry.global_layers) + len(self.geometry.window_layers)
        for module in attention_modules(self.model, layers):
            if module.layer_idx in self.geometry.global_layers:
                self._hooks.append(module.register_forward_pre_hook(self._attention_begins, with_kwargs=True))
        self._hooks.append(self.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._forward_ends, always_call=True))
        self.model.set_attn_implementation(_NAME)

    def detach(self) -> None:
        """Takes the model off kvgate and gives all of its KV back. Harmless a second time."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self.model.set_attn_implementation(self._before)
        self._hooks, self._cache = [], None
        for client in self._clients:
            client.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # ---- hooks ----

    def _take_turn(self) -> None:
        """KvgateError when another thread is in a forward pass. Who was interrupted in one may begin again."""
        thread = threading.current_thread()
        with self._turn:
            if self._thread not in (None, thread) and self._thread.is_alive():
                raise KvgateError(
                    0,
                    f"thread {self._thread.name} is in a forward pass of this model: one at a time (use a lock, or a "
                    "model and an attachment for each thread)",
                )
            self._thread = thread

    def _forward_begins(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take_turn()
        given = dict(zip(self._names, args, strict=False)) | kwargs
        self._cache, cache = None, given.get("past_key_values")
        if not isinstance(cache, KvgateCache):
            return
        if not cache.belongs_to(self):
            raise ValueError(f"past_key_values: the cache was made by another attachment, not by {self.client.name}'s")
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        self.free_orphans()
        cache.begin(tokens.shape[0], tokens.shape[1], given.get("attention_mask"))
        self._cache = cache

    def _forward_ends(self, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """output is None when the forward pass raised: the cache stays where it was before."""
        if self._thread is not threading.current_thread():
            return  # refused by _forward_begins
        cache, self._cache = self._cache, None
        try:
            if cache is not None and output is not None:
                cache.end()
        finally:
            self._thread = None

    def _attention_begins(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._cache is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._cache.stage(self._places[module.layer_idx][1], hidden)

    # ---- for caches ----

    def place(self, layer: int) -> tuple[Store, int]:
        """Where a layer of the model has its KV: the store, and the layer's number there."""
        return self._places[layer]

    def make_ring(self, row: Row) -> None:
        """Room in the sliding layers for one sequence."""
        if self.ring:
            window = self.geometry.window
            row.window = self.ring.client.create(Policy(mode="off", max_new_tokens=window))
            row.window.reserve(window)

    def runs(self, cache: KvgateCache) -> bool:
        """Whether a forward pass with this cache is under way."""
        return self._cache is cache

    def collect(self, rows: list[Row]) -> None:
        """Frees the rows of a cache that nobody has any more: at once, or later if this interrupted a client's call."""
        self._orphans += rows
        if not any(client.busy for client in self._clients):
            self.free_orphans()

    def free_orphans(self) -> None:
        """Frees what collect() could not."""
        while self._orphans:
            self._orphans.pop().free()

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Measures on the stream what is enqueued inside, when `measure` is set."""
        if not self.measure or not self.store.on_gpu:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._spans.setdefault(what, []).append((begin, end))

    @property
    def timing(self) -> dict[str, float]:
        """Seconds since the last look that the stream spent on "stage" and "evict", waiting for the daemon included."""
        spans, self._spans = self._spans, {}
        if spans:
            torch.cuda.synchronize()
        return {what: sum(a.elapsed_time(b) for a, b in pairs) / 1000 for what, pairs in spans.items()}

    # ---- use ----

    def cache(
        self,
        inputs: Any = None,
        *,
        ratio: float = 1.0,
        chunk: int = _CHUNK,
        prefix_tokens: int | list[int] = 0,
        max_new_tokens: int = 256,
        **policy: Any,
    ) -> KvgateCache:
        """A cache for one batch, for model.generate(past_key_values=...) or the model's forward.

        inputs: the prompts (a tokenizer's output, an attention mask or token ids [B][T], or a list of lengths): needed
        when they are fed in chunks, so that the daemon can promise the whole. max_new_tokens: all tokens after them,
        later turns of a conversation included. Other arguments are Policy's: level, window, budget, mode, floor,
        threshold, retain.
        """
        return KvgateCache(self, self._rules(ratio, chunk, policy), prefix_tokens, max_new_tokens, _lengths(inputs))

    def _rules(self, ratio: float, chunk: int, policy: dict[str, Any]) -> Policy:
        self.free_orphans()
        rules = Policy(ratio=ratio, chunk_tokens=chunk, **policy)
        if (ratio < 1 or rules.budget or rules.mode == "threshold") and not self.scores:
            raise ValueError("evicting needs scores: attach the model with gate= or scorer=")
        return rules

    # ---- contexts ----

    def context_keys(self, rules: Policy, tokens: list[int]) -> list[bytes]:
        """Keys of a context's tokens up to the end of each chunk. KvgateError: the model has sliding layers."""
        if self.ring:
            raise KvgateError(0, "contexts are not shared by models with sliding layers, whose KV is overwritten")
        return self.client.context_keys(rules, tokens, rules.chunk_tokens)

    def publish(self, cache: KvgateCache, tokens: Any) -> ContextInfo:
        """Seals what a cache of one sequence holds: attach_context() finds it, in any process of the tenant.

        tokens: the ids that the cache was fed so far, [T] or [1][T]. The cache goes on; what it holds now is evicted
        no more.
        """
        return cache.publish(_token_list(tokens))

    def attach_context(
        self,
        tokens: Any,
        *,
        ratio: float = 1.0,
        chunk: int = _CHUNK,
        prefix_tokens: int = 0,
        max_new_tokens: int = 256,
        **policy: Any,
    ) -> KvgateCache:
        """A cache that begins with what is published of a context, for model.generate(past_key_values=...).

        tokens: the context's ids, [T] or [1][T]; the other arguments are cache()'s and must be those of the cache that
        was published. The longest part that ends with a chunk, or all of it, is taken: cache.columns tokens.
        generate() is given all ids, the context's too, and feeds what is behind those. KvgateError with ENOENT: no part
        is published.
        """
        rules, numbers = self._rules(ratio, chunk, policy), _token_list(tokens)
        keys = self.context_keys(replace(rules, prefix_tokens=prefix_tokens), numbers)
        found = self.client.find_longest(keys)
        if found is None:
            raise KvgateError(errno.ENOENT, f"no part of the {len(numbers)} tokens is published with these arguments")
        cache = KvgateCache(self, rules, 0, max_new_tokens, None)
        cache.begin_with(keys[found[0]], found[1].tokens, len(numbers))
        return cache

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        ratio: float = 1.0,
        chunk: int = _CHUNK,
        max_new_tokens: int = 256,
        policy: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """model.generate() with a cache of its own, the prompt in chunks, freed afterwards.

        policy: cache()'s other arguments; options: model.generate()'s. Beam search is refused with a KvgateError.
        """
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        config = options.get("generation_config") or self.model.generation_config
        if (options.get("num_beams", config.num_beams) or 1) > 1:
            raise KvgateError(0, NO_BEAMS)
        copies: int = options.get("num_return_sequences", config.num_return_sequences) or 1
        lengths = [length for length in mask.long().sum(1).tolist() for _ in range(copies)]
        rules = dict(policy or {})
        if isinstance(rules.get("prefix_tokens"), list):
            rules["prefix_tokens"] = [prefix for prefix in rules["prefix_tokens"] for _ in range(copies)]
        with self.cache(lengths, ratio=ratio, chunk=chunk, max_new_tokens=max_new_tokens, **rules) as cache:
            return self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=cache,
                prefill_chunk_size=chunk,
                max_new_tokens=max_new_tokens,
                **options,
            )


def _token_list(tokens: Any) -> list[int]:
    """Token ids of one sequence, of a list or a tensor [T] or [1][T]."""
    numbers: list[Any] = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    if numbers and isinstance(numbers[0], list):
        if len(numbers) != 1:
            raise ValueError(f"tokens: {len(numbers)} sequences, not one")
        numbers = numbers[0]
    return numbers


def _lengths(inputs: Any) -> list[int] | None:
    """Tokens of each prompt, without padding."""
    if inputs is None or isinstance(inputs, list):
        return inputs
    if not isinstance(inputs, torch.Tensor):
        inputs = inputs["attention_mask"] if "attention_mask" in inputs else inputs["input_ids"]
    if inputs.dtype == torch.bool or int(inputs.max()) <= 1:
        counts: list[int] = inputs.long().sum(1).tolist()
        return counts
    return [inputs.shape[1]] * inputs.shape[0]


def attach(
    model: torch.nn.Module,
    socket: str | os.PathLike[str] | None = None,
    *,
    gate: str | os.PathLike[str] | None = None,
    scorer: Scorer | None = None,
    name: str = "transformers",
    max_sequences: int = 8,
    max_tokens: int | None = None,
    staging_bytes: int | None = None,
    stage: Literal["hidden", "preact"] | None = None,
) -> Attachment:
    """Puts a transformers decoder (Qwen2, Qwen3, Llama, Gemma3) on the daemon behind `socket` (or $KVGATE_SOCKET).

    gate: a safetensors file of tools/import-gate, for the layers with full attention; or scorer: scores made by the
    worker, scorer(layer, hidden [T][hidden]) -> [T][heads], layers counted among those with full attention. Without
    both nothing can be evicted. max_sequences, max_tokens: of all caches at a time, of one sequence. stage: what
    decoded tokens are scored from: "preact" (the gate's products; the default on a GPU) or "hidden".

    NotRunningError: no daemon there; ValueError: the model or the arguments do not fit; KvgateError: the daemon's.
    """
    return Attachment(
        model,
        socket,
        gate=gate,
        scorer=scorer,
        name=name,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        staging_bytes=staging_bytes,
        stage=stage,
    )
