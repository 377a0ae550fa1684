"""A transformers Cache whose keys and values lie in kvgated's memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvgate import ContextInfo, KvgateError, Policy, RecallResult, Sequence, SequenceInfo

from .rows import EVENT_TOKENS, Row, row_policy
from .scoring import Pending

if TYPE_CHECKING:
    from .attachment import Attachment

Make = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

NO_BEAMS = "beam search needs sequences that share blocks, which this daemon cannot do: use sampling or greedy decoding"


class KvgateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What transformers asks one layer of a cache. The answers are the whole cache's."""

    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: KvgateCache, sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weak, self.is_sliding, self.is_croppable = weakref.ref(cache), sliding, not sliding

    @property
    def _cache(self) -> KvgateCache:
        cache = self._weak()
        if cache is None:
            raise KvgateError(0, "the cache of this layer is gone")
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: memory comes with the daemon's sequences."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands fresh K and V on to the attention function, which appends them."""
        cache = self._cache
        cache.check_step()
        key_states.kvgate_cache = cache  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._cache.free()

    def crop(self, tokens_to_remove: int) -> None:
        raise KvgateError(0, "crop is the whole cache's")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._cache.reorder_cache(beam_idx)


class KvgateCache(Cache):
    """The KV of one batch of sequences in the daemon, made by Attachment.cache(). Free it, or use it in `with`.

    A batch is padded on the left, as generate() does; padding is not stored. columns counts tokens with padding.
    """

    def __init__(
        self,
        attachment: Attachment,
        policy: Policy,
        prefix: list[int] | int,
        max_new_tokens: int,
        lengths: list[int] | None,
    ) -> None:
        self._attachment, self._policy, self._prefix = attachment, policy, prefix
        self._max_new_tokens, self._lengths = max_new_tokens, lengths
        self._rows: list[Row] = []
        self._counts: list[int] = []
        self._pending: Pending | None = None
        self.columns = 0
        self._width = 0  # columns of the step under way; 0: none is
        self._next_event = 0
        self._waiting = 0  # tokens of each sequence whose hidden states wait in _pending
        self._prompt_seen = self._torn = False
        sliding = set(attachment.geometry.window_layers)
        layers = len(attachment.geometry.global_layers) + len(sliding)
        super().__init__(layers=[KvgateLayer(self, i in sliding) for i in range(layers)])

    # ---- what a user sees ----

    @property
    def sequences(self) -> list[Sequence]:
        """The daemon's sequences, one for each of the batch; none before the first step."""
        return [row.sequence for row in self._rows]

    @property
    def batch_size(self) -> int:
        return len(self._rows) or -1

    def info(self) -> list[SequenceInfo]:
        """What the daemon says of each sequence: pairs, blocks, bytes of blocks."""
        self.settle()
        return [row.sequence.query() for row in self._rows]

    def settle(self) -> None:
        """Waits for the evictions under way, and tells the daemon of the tokens written since."""
        for row in self._rows:
            row.finish()
            row.commit()

    def offload(self) -> int:  # type: ignore[override]  # transformers offloads layers of caches of its own
        """Sends the batch to the host's memory, between steps; the bytes that it takes there.

        The next step or restore() brings it back, bit for bit. The sliding layers' KV stays where it is: it is small.
        """
        return sum(row.offload() for row in self._rows)

    def restore(self) -> None:
        """Brings it back, or ends its idleness. RefusedError: there is no room."""
        for row in self._rows:
            row.sequence.restore()

    def idle(self) -> None:
        """Nobody needs the batch for now: the daemon may send it to the host until the next step or restore()."""
        for row in self._rows:
            row.idle()

    def recall(self, *, ratio: float | None = None, budget: int | None = None) -> list[RecallResult]:
        """Brings pairs back that evictions dropped and the host kept, up to a ratio or a budget of tokens per head.

        The cache was made with retain="host". Not between the events of a decode budget, while tokens wait for theirs.
        """
        if self._waiting:
            raise KvgateError(0, "recall: a decode budget is set, and tokens wait for their event")
        return [row.recall(ratio, budget) for row in self._rows]

    def free(self) -> None:
        """Gives all of its memory back to the daemon. The cache can be used again, from the start."""
        rows, self._rows = self._rows, []
        self.columns = self._width = self._next_event = self._waiting = 0
        self._pending, self._prompt_seen, self._torn = None, False, False
        with contextlib.ExitStack() as all_of_them:
            for row in rows:
                all_of_them.callback(row.free)

    def reset(self) -> None:
        self.free()

    def __enter__(self) -> KvgateCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._attachment.collect(self._rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens of each sequence (rejected drafts); not those from before an eviction."""
        tokens = -tokens_to_remove
        if tokens < 0:
            raise ValueError(f"crop({tokens_to_remove}): a negative number of tokens, or 0")
        if not tokens:
            return
        if self._attachment.geometry.window_layers:
            raise KvgateError(0, "crop: this model has sliding layers, whose KV is overwritten")
        for row in self._rows:
            row.finish()
            if row.length - tokens < row.fold:
                raise KvgateError(
                    0,
                    f"crop({tokens_to_remove}): sequence {row.slot} has {row.length} tokens, and the "
                    f"oldest {row.fold} of them went through an eviction",
                )
        for row in self._rows:
            row.truncate(tokens)
        self.columns -= tokens
        if self._pending:
            self._waiting = max(self._waiting - tokens, 0)
            self._pending.cut(self._waiting)
            self._next_event = self._first_event(max(row.length for row in self._rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise KvgateError(0, NO_BEAMS)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.empty(0, dtype=torch.long))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the named sequences of the batch and frees the others."""
        keep = indices.nonzero().flatten().tolist() if indices.dtype == torch.bool else indices.tolist()
        if len(set(keep)) != len(keep):
            self.reorder_cache(indices)  # type: ignore[arg-type]
        if self._waiting:
            raise KvgateError(0, "batch_select_indices: a decode budget is set, and tokens wait for their event")
        dropped = [row for i, row in enumerate(self._rows) if i not in keep]
        self._rows = [self._rows[i] for i in keep]
        with contextlib.ExitStack() as all_of_them:
            for row in dropped:
                all_of_them.callback(row.free)

    # ---- one forward pass ----

    def begin(self, batch: int, width: int, mask: torch.Tensor | None, decodes: bool = True) -> None:
        """Before a forward pass of `width` columns: room for its tokens. mask: [B][columns], None: no padding.

        decodes: steps of one token may go through the GPU's decode kernels.
        """
        self._undo_broken_step()
        if self._torn:
            raise KvgateError(
                0,
                "a forward pass of several tokens broke off and has overwritten KV of the sliding layers: "
                "free() the cache and begin again",
            )
        counts = self._count(batch, width, mask)
        if not self._rows:
            self._create(batch, counts)
        if len(self._rows) != batch:
            raise ValueError(f"a batch of {batch}, the cache holds {len(self._rows)} sequences")
        for row, count in zip(self._rows, counts, strict=True):
            row.finish()
            row.make_room(count)
        self._counts, self._width = counts, width
        stores, first = self._attachment.stores, self._rows[0]
        self._steady = (
            decodes
            and width == 1
            and all(row.length for row in self._rows)
            and all(store.kernels(first) for store in stores)
        )
        for store in stores:
            if self._steady:
                store.plan(self._rows)
            else:
                store.begin(self._rows)

    def belongs_to(self, attachment: Attachment) -> bool:
        """Whether that attachment made it."""
        return self._attachment is attachment

    def check_step(self) -> None:
        """KvgateError unless the attached model is in a forward pass with this cache."""
        if not self._attachment.runs(self):
            raise KvgateError(
                0,
                "attention outside of a forward pass of the attached model: the cache works only with "
                "the model that it was made for, called as a whole, until detach()",
            )

    def _undo_broken_step(self) -> None:
        """A forward pass that raised leaves nothing: its tokens are not counted, and will be written over."""
        width, self._width = self._width, 0
        if not width:
            return
        if self._pending:
            self._pending.cut(self._waiting)
        window = self._attachment.geometry.window
        if window and any(
            count > 1 and row.length and row.length + count > window
            for row, count in zip(self._rows, self._counts, strict=True)
        ):
            self._torn = True

    def _count(self, batch: int, width: int, mask: torch.Tensor | None) -> list[int]:
        """Tokens of each sequence in the newest columns."""
        if mask is None or (width == 1 and self._prompt_seen):
            return [width] * batch
        if mask.shape != (batch, self.columns + width):
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)}, {batch} sequences have {self.columns} columns "
                f"and get {width}"
            )
        mask = mask.bool()
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError("attention_mask: padding has to be on the left (tokenizer.padding_side = 'left')")
        counts: list[int] = mask[:, -width:].sum(1).tolist()
        if self._prompt_seen and min(counts) < width:
            raise ValueError("attention_mask: a batch goes on with as many tokens of each sequence, without padding")
        return counts

    def _create(self, batch: int, counts: list[int]) -> None:
        lengths = self._lengths or counts
        prefix = self._prefixes(batch)
        if len(lengths) != batch:
            raise ValueError(f"a batch of {batch}, the cache was made for {len(lengths)}")
        try:
            for tokens, protected in zip(lengths, prefix, strict=True):
                self._create_row(tokens, protected)
        except BaseException:
            self.free()
            raise
        self._begin_pending()

    def publish(self, tokens: list[int]) -> ContextInfo:
        """For Attachment.publish()."""
        if len(self._rows) != 1:
            raise ValueError(f"publish: the cache holds {len(self._rows)} sequences, not one")
        row = self._rows[0]
        if len(tokens) != row.length:
            raise ValueError(f"publish: {len(tokens)} tokens, the cache holds {row.length}")
        return row.publish(self._attachment.context_keys(row.policy, tokens)[-1])

    def begin_with(self, key: bytes, shared: int, tokens: int) -> None:
        """For Attachment.attach_context(): the one sequence begins with a context of `shared` of `tokens` tokens."""
        policy = row_policy(self._policy, tokens - shared, 0, self._max_new_tokens)
        row = Row(self._attachment.client.attach(key, policy), policy, tokens + self._max_new_tokens, shared=shared)
        self._rows = [row]
        row.length = row.committed = row.reserved = self.columns = shared
        row.fold = row.sequence.state().fold_pos
        self._prompt_seen = not row.in_prompt
        self._begin_pending()
        self._next_event = self._first_event(shared)

    def _prefixes(self, batch: int) -> list[int]:
        prefix = [self._prefix] * batch if isinstance(self._prefix, int) else self._prefix
        if len(prefix) != batch:
            raise ValueError(f"prefix_tokens: {len(prefix)} numbers for a batch of {batch}")
        return prefix

    def _create_row(self, tokens: int, protected: int) -> None:
        policy = row_policy(self._policy, tokens, min(protected, tokens), self._max_new_tokens)
        sequence = self._attachment.client.create(policy)
        self._rows.append(Row(sequence, policy, tokens + self._max_new_tokens))
        self._attachment.make_ring(self._rows[-1])

    def _begin_pending(self) -> None:
        if self._policy.budget:
            self._pending = Pending(len(self._attachment.geometry.global_layers), self._attachment.stage)

    def stage(self, layer: int, hidden: torch.Tensor) -> None:
        """The hidden states that enter a gated layer's attention: [B][T][hidden]."""
        if self._prompt_seen:
            if self._pending:
                self._pending.add(layer, hidden.detach())
        elif self._attachment.scores and (self._policy.ratio < 1 or self._policy.mode == "threshold" or self._pending):
            with self._attachment.timed("stage"):
                for i, (row, count) in enumerate(zip(self._rows, self._counts, strict=True)):
                    if count:
                        self._attachment.stage.prompt(layer, row, hidden[i, -count:])

    def check_window(self, layer: int, window: int | None) -> None:
        """ValueError when the model wants a window of a layer that is kept whole (its config has no layer_types)."""
        store, _ = self._attachment.place(layer)
        layout = store.client.layout
        if window is not None and store.window < 0 and layout is not None and layout.max_tokens > window:
            raise ValueError(
                f"layer {layer}: attention has a window of {window} tokens that config.layer_types does not name, and "
                f"sequences may have {layout.max_tokens}: attach with max_tokens={window} or less"
            )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Appends k and v [B][heads][T][D] and attends with q [B][query heads][T][D] -> [B][T][query heads][D]."""
        store, number = self._attachment.place(layer)
        if self._steady:
            return store.decode(number, self._rows, q, k, v, scale)
        out = q.new_zeros(q.shape).transpose(1, 2).contiguous()
        for i, (row, count) in enumerate(zip(self._rows, self._counts, strict=True)):
            if count:
                own = store.step(number, row, q[i, :, -count:], k[i, :, -count:], v[i, :, -count:], scale)
                out[i, -count:] = own.transpose(0, 1)
        return out

    def end(self) -> None:
        """After a forward pass: counts its tokens, and evicts where the policy says so."""
        store, counts = self._attachment.store, self._counts
        if self._attachment.ring and not self._steady and store.on_gpu:
            self._attachment.ring.ring_end(self._rows, counts)
        if store.on_gpu:
            self._advance(counts)
        for row, count in zip(self._rows, counts, strict=True):
            row.length += count
        self.columns += self._width
        before, self._width = self.columns - self._width, 0
        if self._prompt_seen:
            self._waiting += self.columns - before if self._pending else 0
            self._decode_events()
        else:
            self._prompt_events(counts)

    def _advance(self, counts: list[int]) -> None:
        client, store = self._attachment.client, self._attachment.store
        if len(set(counts)) == 1:
            client.cuda_advance(store.slots(self._rows), len(self._rows), counts[0])
            return
        for row, count in zip(self._rows, counts, strict=True):
            if count:
                client.cuda_advance(store.slots([row]), 1, count)

    # ---- evictions ----

    def _prompt_events(self, counts: list[int]) -> None:
        """Between the chunks of a prompt, and at its end."""
        policy, overlap = self._policy, self._attachment.store.on_gpu
        ended = all(not row.in_prompt for row in self._rows)
        evicts = policy.mode != "off" and (policy.ratio < 1 or policy.mode == "threshold")
        if evicts and self._attachment.scores and (policy.mode != "once" or ended):
            with self._attachment.timed("evict"):
                for row, count in zip(self._rows, counts, strict=True):
                    if count:
                        row.evict("prefill", overlap, min(count, row.prompt - row.length))
        self._prompt_seen = ended
        if ended and self._pending:
            self.settle()
            with self._attachment.timed("evict"):
                for row in self._rows:
                    row.evict("decode", overlap, 1)
            self._next_event = self._first_event(max(row.length for row in self._rows))

    @staticmethod
    def _first_event(length: int) -> int:
        """How many tokens the longest sequence has after the next position p with p mod 128 = 0."""
        return -(-length // EVENT_TOKENS) * EVENT_TOKENS + 1

    def _decode_events(self) -> None:
        """All sequences together, when the longest has passed a position that is a multiple of 128."""
        length = max(row.length for row in self._rows)
        if not self._pending or length < self._next_event:
            return
        tokens, overlap = self._waiting, self._attachment.store.on_gpu
        self._waiting = 0
        with self._attachment.timed("stage"):
            layers = list(self._pending.take())
            for i, row in enumerate(self._rows):
                row.commit()
                self._attachment.stage.decoded(row, row.length - tokens, [rows[i] for rows in layers])
        with self._attachment.timed("evict"):
            for row in self._rows:
                row.evict("decode", overlap, 1)
        self._next_event = self._first_event(length)

    # ---- without a model ----

    @torch.no_grad()
    def fill(self, lengths: list[int], make: Make, chunk: int = 16000) -> None:
        """A prompt whose K, V and hidden states come from make(layer, begin, end) instead of a forward pass.

        make returns k and v [1][heads][T][D] and hidden [1][T][hidden] of tokens begin .. end - 1 of a model's
        layer. Each sequence is created and filled by itself, in chunks, with the policy's evictions, so that
        at no time more than one of them needs room for what it has not evicted yet.
        """
        rows: list[Row] = []
        self._begin_pending()
        try:
            for tokens, protected in zip(lengths, self._prefixes(len(lengths)), strict=True):
                self._rows, self._prompt_seen = [], False
                self._create_row(tokens, protected)
                rows += self._rows
                for begin in range(0, tokens, chunk):
                    self._fill_chunk(self._rows[0], begin, min(begin + chunk, tokens), make)
                self.settle()
        finally:
            self._rows = rows + [row for row in self._rows if row not in rows]
        self.columns, self._next_event = max(lengths), self._first_event(max(lengths))

    def _fill_chunk(self, row: Row, begin: int, end: int, make: Make) -> None:
        self.begin(1, end - begin, None, decodes=False)
        for layer in range(len(self.layers)):
            k, v, hidden = make(layer, begin, end)
            store, number = self._attachment.place(layer)
            if store is self._attachment.store:
                self.stage(number, hidden)
            store.append(number, row, k[0], v[0])
        self.end()
