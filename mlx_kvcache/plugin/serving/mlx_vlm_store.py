"""Serves mlx-vlm's prefix cache (APC) with this package's caches.

mlx-vlm divides the keys and values of a prompt into blocks, or copies whole caches. For an attached model
its coordinator is replaced by `Coordinator`, which stores forks in a `SessionPool`: a conversation is found
by its tokens, its pictures (see `mlx_vlm_media.py`) and mlx-vlm's hash of the tenant and other inputs, and it
resumes at the newest position that all layers support. The manager's budget in bytes is the pool's.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm import apc
from mlx_vlm.generate.ar import BatchGenerator, GenerationBatch, PromptProcessingBatch

from ...errors import CacheError
from ...sessions.prefix_cache import SessionPool
from ...sessions.splicing import Splicing, spliced_salt
from ..cache_options import by_layer, options_of
from ..forward.batch_rows import Rows
from ..hosts.observe import is_cache
from ..pool.pool import Pool
from ..prompt_cache import PromptCache
from . import mlx_vlm_batch
from .mlx_vlm_batch import empty_rows, fresh, rows_of
from .mlx_vlm_media import Request, Salt, forget, placeholders, request_of
from .mlx_vlm_splice import order_of, reorder, splicing_of
from .sessions import make_session_pool

APCCoordinator = apc.APCCoordinator
APCManager = apc.APCManager

FOLDER = "mlx_kvcache"
"""The folder inside mlx-vlm's own in which conversations are kept."""

_UNSLICED = (
    "attention_mask_4d",
    "cross_attention_mask",
    "cross_attention_states",
    "decoder_inputs_embeds",
    "deepstack_visual_embeds",
    "full_text_row_masked_out_mask",
    "visual_pos_masks",
)
"""Inputs of a language model that cannot be cut where a prompt is resumed before a picture."""

_stores: weakref.WeakKeyDictionary[Any, list[tuple[Pool, SessionPool]]] = weakref.WeakKeyDictionary()
"""For each manager, a pool of sessions for each pool of cells."""


def coordinator(manager: Any, model: Any) -> Any:
    """Replaces `APCCoordinator`: makes this package's for an attached model."""
    rows = None if manager is None else empty_rows(getattr(model, "language_model", model))
    if rows is None:
        return APCCoordinator(manager, model)
    made = Coordinator(manager, model)
    # Each rank would evict different conversations.
    made.enabled = rows.pool.ranks.is_alone
    return made


class Coordinator(apc.APCCoordinator):  # type: ignore[misc]
    """Looks up and stores the prefixes of an attached model's prompts."""

    # Of mlx-vlm's two strategies, this one stores what is computed without cutting prompts into steps.
    strategy = legacy_mode = "block"
    enabled = True

    def prepare_prefill(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the pool evicts conversations when others grow."""

    def observe_cache(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the pool knows the size of all caches."""

    def lookup(
        self,
        token_ids: Sequence[int],
        *,
        extra_hash: int,
        suffix_is_text_only: Callable[[int], bool],
        options: Mapping[str, Any] | None = None,
        splicing: Splicing | None = None,
        **_: Any,
    ) -> dict[str, Any] | None:
        """The longest stored prefix of a prompt, as a fork to continue; None if there is none.

        With `splicing`, the fork may also wait for tokens after a change of the prompt. Then "order" has the
        positions of the prompt's tokens, those to compute last.

        Args:
            extra_hash: mlx-vlm's hash of the request, which may be a `Salt`.
            suffix_is_text_only: whether the prompt may be resumed at a position.
            options: the generator's options for quantization, which hold from the first token on; None if
                the caller quantizes later.
        """
        salt, key, request = self._key_of(token_ids, extra_hash)
        if not key:
            return None
        for made in self._empty(options, request):
            store = self._store_of(made._rows)
            made.close()
            # Pictures have other tokens in the key.
            ways = splicing if splicing and key == list(token_ids) else Splicing(0, 0.0)
            session = store.open(key, salt, splice=ways.min_run, recompute=ways.recompute)
            if session.departure:
                logging.info("Reused %s of %s tokens: %s", session.reused, len(key), session.departure)
            cache, point = session.cache, session.reused
            order = order_of(session) if session.salt != salt else None
            inside = request.before(point) if request and not order else point
            if inside < point:
                point = cache.resume_point(inside)
                cache.rewind_to(point)
            # Recurrent layers of an empty cache may be told where to leave a checkpoint.
            is_text = bool(order) or suffix_is_text_only(point)
            is_text |= request is not None and request.is_text(point)
            if is_text and (point or cache.pool.layout.is_recurrent):
                self._count(**({"hits": 1, "matched_tokens": point} if point else {"misses": 1}))
                return {
                    "matched_blocks": [],
                    "warm_cache": cache,
                    "prefix_len": point,
                    "extra_hash": extra_hash,
                    "full_input_ids": list(token_ids),
                    "order": order,
                }
            cache.close()
        self._count(misses=1)
        return None

    def merge_rows(
        self,
        picks: Sequence[dict[str, Any] | None],
        prefix_lens: Sequence[int],
        *,
        kv_quant_config: dict[str, Any] | None = None,
    ) -> tuple[list[Any] | None, int]:
        """The caches of a batch whose rows go on from what `lookup` found, or begin empty."""
        options = kv_quant_config or {}
        caches = [pick["warm_cache"] if pick else self._empty(_named(options))[0] for pick in picks]
        self._count(restored_tokens=sum(prefix_lens))
        batch = caches[0] if len(caches) == 1 else mlx_vlm_batch.merged(*caches)
        return batch, max(prefix_lens)

    def materialize_single(self, hit: dict[str, Any], **_: Any) -> list[Any]:
        """The cache that `lookup` found."""
        self._count(restored_tokens=hit["prefix_len"])
        cache: list[Any] = hit["warm_cache"]
        return cache

    def release_hit(self, hit: dict[str, Any] | None) -> None:
        """Close a cache that is not used."""
        if hit is not None:
            hit["warm_cache"].close()

    def commit(
        self,
        prompt_cache: Sequence[Any],
        token_ids: Sequence[int],
        *,
        batch_idx: int | None = None,
        extra_hash: int = 0,
        **_: Any,
    ) -> bool:
        """Store a fork of a conversation, or of a row of a batch. Returns whether it is stored.

        Args:
            token_ids: the tokens of the prompt, and of the reply if the cache holds it.
        """
        rows = rows_of(prompt_cache)
        if rows is None:
            return False
        salt: Hashable
        salt, key = self._key_of(token_ids, extra_hash)[:2]
        try:
            fork = PromptCache(rows.extracted(batch_idx or 0))
            if fork.position > len(key):
                fork.rewind_to(fork.resume_point(len(key)))
            position = fork.position
            if fork._conversation.text is not None:
                salt = spliced_salt(salt)
            if fork.gaps or not self._store_of(rows).store(key[:position], fork, salt):
                return False
        except (CacheError, ValueError) as error:
            # The reply goes on without it.
            logging.warning("a conversation is not stored: %s", error)
            return False
        self._count(stores=1, stored_tokens=position)
        return True

    def store_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        """Does nothing: `commit` stores the checkpoints of recurrent layers, too."""
        return False

    def _key_of(
        self, tokens: Sequence[int], extra_hash: int
    ) -> tuple[tuple[int, int], list[int], Request | None]:
        """The salt of a conversation, its key, and the request if it is known."""
        if isinstance(extra_hash, Salt):
            request = extra_hash.request
            keys = request.keys(tokens)
            if keys is not None:
                return (extra_hash.text, request.salt), keys, request
        # Pictures are in the hash, but nothing tells whether all of them are.
        request = request_of(tokens, {}, placeholders(self.model))
        return (int(extra_hash), 0), list(request.key), None

    def _empty(self, options: Mapping[str, Any] | None, request: Request | None = None) -> list[PromptCache]:
        """Empty caches like those that the caller may go on with, the preferred one first."""
        language_model = getattr(self.model, "language_model", self.model)
        made: Any = fresh(language_model)
        if not is_cache(made):
            # The model has been detached meanwhile.
            return []
        if options is not None:
            mlx_vlm_batch.quantize(made._rows, **{"kv_bits": None, **options})
            return [PromptCache(made._rows)]
        asked = request.options if request else {}
        if asked.get("kv_bits") is None:
            return [made]
        packed: Any = fresh(language_model)
        whole = {"kv_group_size": 64, **asked, "quantized_kv_start": 0}
        mlx_vlm_batch.maybe_quantize_kv_cache(packed, **whole)
        return [packed, made]

    def _store_of(self, rows: Rows) -> SessionPool:
        """The pool of sessions for caches like these, which is made on first use."""
        stores = _stores.setdefault(self.manager, [])
        found = next((store for pool, store in stores if pool is rows.pool), None)
        if found is None:
            options = options_of(rows.conversations[0])
            if "kv_bits" in options:
                options["kv_bits"] = by_layer(options["kv_bits"])
            disk = self.manager.disk
            found = make_session_pool(
                rows.pool.living_model,
                max_bytes=self.manager.memory_max_bytes,
                folder=disk and disk.dir / FOLDER,
                folder_bytes=(disk and disk.max_bytes) or 1 << 62,
                **options,
            )
            stores.append((rows.pool, found))
        return found

    def _count(self, **counts: int) -> None:
        """Add to the manager's statistics."""
        with self.manager.lock:
            for name, count in counts.items():
                setattr(self.manager.stats, name, getattr(self.manager.stats, name) + count)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-vlm's description of a quantization as options of its functions."""
    return {"kv_quant_scheme" if name == "scheme" else f"kv_{name}": value for name, value in config.items()}


original_extra_hash = BatchGenerator._apc_extra_hash
original_pick = BatchGenerator._apc_pick_for


def extra_hash(self: Any, prompt_kwargs: dict[str, Any]) -> int:
    """Replaces `BatchGenerator._apc_extra_hash`, which would make a plain number of a `Salt`."""
    known = (prompt_kwargs or {}).get("_apc_semantic_hash")
    if isinstance(known, Salt):
        return known
    # The inputs were not prepared by this thread.
    forget()
    found: int = original_extra_hash(self, prompt_kwargs)
    return found


def pick_for(self: Any, sequence: tuple[Any, ...]) -> dict[str, Any] | None:
    """Replaces `BatchGenerator._apc_pick_for`: a prompt may also be resumed before its pictures.

    Their embeddings are computed already, and are cut together with the tokens.
    """
    if not isinstance(getattr(self, "apc", None), Coordinator):
        theirs: dict[str, Any] | None = original_pick(self, sequence)
        return theirs
    tokens, inputs = sequence[1], sequence[3] or {}
    if len(tokens) < 2:
        return None
    is_cut = not any(inputs.get(name) is not None for name in _UNSLICED)
    # Without them, the model would compute positions from the part of the prompt that it is given.
    is_cut &= inputs.get("position_ids") is not None or not hasattr(self.model, "_position_ids")
    found: dict[str, Any] | None = self.apc.lookup(
        tokens,
        extra_hash=self._apc_extra_hash(inputs),
        suffix_is_text_only=lambda point: is_cut,
        options=mlx_vlm_batch.asked(self),
        splicing=splicing_of(self, len(tokens), inputs),
    )
    if found and found["order"]:
        reorder(tokens, inputs, found["order"])
    return found


original_generate = PromptProcessingBatch.generate
original_remove = PromptProcessingBatch.remove
original_step = GenerationBatch._step
original_extend = GenerationBatch.extend
original_filter = GenerationBatch.filter


@dataclass
class _Row:
    """A row of a batch under way: its tokens in the cache, and how they are stored."""

    coordinator: Coordinator
    tokens: list[int]
    extra_hash: int


_rows: weakref.WeakKeyDictionary[Any, dict[int, _Row]] = weakref.WeakKeyDictionary()
"""For each batch, its rows by mlx-vlm's number for them."""


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `PromptProcessingBatch.generate`: also notes which tokens the rows begin with."""
    noted = {
        uid: _Row(self._apc_coordinator, list(about["full_input_ids"]), about["extra_hash"])
        for uid, about in zip(self.uids, self._apc_meta, strict=False)
        if isinstance(self._apc_coordinator, Coordinator)
    }
    batch = original_generate(self, *args, **kwargs)
    if isinstance(batch, GenerationBatch):
        _rows[batch] = noted
    return batch


def remove(self: Any, uid: int) -> None:
    """Replaces `PromptProcessingBatch.remove`: also stores what was read of a prompt that is cancelled."""
    index = self.uids.index(uid)
    about = self._apc_meta[index] if self._apc_meta else None
    if about is not None and isinstance(self._apc_coordinator, Coordinator):
        tokens, extra = about["full_input_ids"], about["extra_hash"]
        self._apc_coordinator.commit(self.prompt_cache, tokens, batch_idx=index, extra_hash=extra)
    original_remove(self, uid)


def step(self: Any) -> tuple[Any, ...]:
    """Replaces `GenerationBatch._step`: also notes the tokens that the rows have taken in."""
    found: tuple[Any, ...] = original_step(self)
    noted = _rows.get(self)
    if noted:
        for uid, token in zip(self.uids, found[0], strict=True):
            if uid in noted:
                noted[uid].tokens.append(token)
    return found


def extend(self: Any, other: Any) -> None:
    """Replaces `GenerationBatch.extend`: also takes over what is noted of the rows."""
    original_extend(self, other)
    _rows.setdefault(self, {}).update(_rows.pop(other, {}))


def filter_rows(self: Any, keep: list[int]) -> None:
    """Replaces `GenerationBatch.filter`: also stores the conversations that leave, with their replies."""
    noted = _rows.get(self, {})
    for index, uid in enumerate(self.uids):
        row = noted.pop(uid, None) if index not in keep else None
        if row is not None:
            row.coordinator.commit(self.prompt_cache, row.tokens, batch_idx=index, extra_hash=row.extra_hash)
    original_filter(self, keep)


original_clear = APCManager.clear
original_close = APCManager.close
original_snapshot = APCManager.stats_snapshot


def clear(self: Any) -> None:
    """Replaces `APCManager.clear`: also drops the stored conversations."""
    original_clear(self)
    for _, store in _stores.get(self, ()):
        store.clear()


def close(self: Any) -> None:
    """Replaces `APCManager.close`: also writes the stored conversations to the folder, if there is one."""
    for _, store in _stores.pop(self, ()):
        store.close()
    original_close(self)


def stats_snapshot(self: Any) -> dict[str, Any]:
    """Replaces `APCManager.stats_snapshot`: also counts the stored conversations."""
    found: dict[str, Any] = original_snapshot(self)
    stores = [store for _, store in _stores.get(self, ())]
    found["resident_bytes"] += sum(store.nbytes for store in stores)
    found["stored_conversations"] = sum(len(store) for store in stores)
    found["evictions"] += sum(store.counts.evicted for store in stores)
    return found


original_classify = apc.classify_layer_for_apc


def classify_layer(entry: Any) -> Any:
    """Replaces `classify_layer_for_apc`: every layer of this package can be stored."""
    if is_cache([entry]):
        return apc.LayerSupport(type_name=type(entry).__name__, status="empty_ok", capability="checkpoint")
    return original_classify(entry)
