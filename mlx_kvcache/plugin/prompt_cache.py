"""Prompt caches for models of mlx-lm and mlx-vlm: `make_prompt_cache` and `PromptCache`.

A `PromptCache` is the cache list that a host passes to its model, with methods to rewind, edit, fork, save
and load the conversation in it. A fork shares the keys and values of its origin in a pool of cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import mlx.core as mx
import mlx.nn as nn

from ..arguments import share, size_of, token_ids, whole
from ..caches.interface import Recurrent, checked_recurrent
from ..errors import CacheError, NotSupportedError
from ..persist.files import Base, Prepared
from ..quantization import RECENT, Transform
from .cache_options import KvBits, KvFloat, Storage, check_options, new_conversation, with_checked_options
from .entries.nested import entries_of
from .files import alone, loaded, prepared, save_for_mlx_lm, write
from .forward.batch_rows import Rows
from .hosts.host import name_of
from .pool.conversation import Conversation, Limits, Overflow
from .pool.pool import Pool
from .pool.splice import Splice, plan_splice, splice
from .ranks import ranks_of, told_tokens


class PromptCache(list[Any]):
    """The cache of one conversation, which can be rewound, edited, forked and saved.

    mlx-lm and mlx-vlm take it as `prompt_cache`. It is a list with one entry for each entry of the model's
    own cache. Positions count tokens from 0. A call that raises changes nothing, but tokens that
    `overflow="shift"` removed to make room stay removed.

    Attributes:
        tokens: the tokens that were saved with a loaded cache, or None.
        is_verified: False if the cache was loaded without comparing checksums.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(entries_of(rows))
        self._rows = rows
        self.tokens: list[int] | None = None
        self.is_verified = True

    @property
    def pool(self) -> Pool:
        """The pool that stores this cache and its forks; `pool.nbytes` is the number of bytes allocated."""
        return self._rows.pool

    @property
    def sequence(self) -> int:
        """The number by which `holdings` lists this cache. A pool never uses a number twice."""
        return self._conversation.sequence

    @property
    def position(self) -> int:
        """The number of tokens in the cache."""
        return self._rows.positions[0]

    @property
    def capacity(self) -> int | None:
        """The maximum number of tokens; None for no limit."""
        return self._conversation.limits.capacity

    @property
    def gaps(self) -> int:
        """How often `remove` or a shift took out tokens that were followed by others; 0 after `load`.

        The keys and values after a gap were computed while the removed tokens were visible, so they differ
        from those of a fresh prefill of the remaining tokens.
        """
        return self._conversation.gaps

    @property
    def nbytes(self) -> int:
        """Bytes that this cache holds. Counts what it shares with forks in full."""
        return sum(entry.nbytes for entry in entries_of(self._rows))

    def can_resume(self, position: int) -> bool:
        """Returns whether `rewind_to(position)` is possible."""
        (position,) = whole(None, position=position)
        return 0 <= position <= self.position and self._rows.can_resume(position)

    def resume_point(self, position: int) -> int:
        """Returns the newest position, at most `position`, that the cache can rewind to.

        Raises:
            ValueError, TypeError: position is below 0, or not a whole number.
        """
        (position,) = whole(position=position)
        return self._rows.resume_point(min(position, self.position))

    def rewind(self, n: int) -> None:
        """Drops the newest n tokens.

        Raises:
            ValueError, TypeError: n is not in 0 <= n <= position, or not a whole number.
            NotSupportedError: a window no longer holds the tokens before, or a recurrent layer neither holds
                its state there nor can compute it. `resume_point` returns a position that is possible.
        """
        (n,) = whole(None, n=n)
        if not 0 <= n <= self.position:
            raise ValueError(f"cannot rewind {n} tokens: the cache holds {self.position}")
        self.rewind_to(self.position - n)

    def rewind_to(self, position: int) -> None:
        """Drops the tokens from `position` on. Raises as `rewind`."""
        (position,) = whole(None, position=position)
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to position {position}: expected 0 to {self.position}")
        with self._rows.edit(f"rewind to {position}"):
            self._conversation.rewind_to(position)

    def mark(self, position: int) -> bool:
        """Marks a position at which later conversations may branch off, such as the end of a system prompt.

        Recurrent layers keep a checkpoint there, before others, so that `rewind_to` can go back to it. The
        position may be one that is yet to come: a block that crosses it leaves a checkpoint there. Other
        layers do not use marks; a sliding window may no longer hold what the position needs.

        Args:
            position: the number of tokens before the mark.

        Returns:
            Whether the cache holds a checkpoint there, or will hold one.

        Raises:
            ValueError: position is below 0.
            TypeError: position is not a whole number.
        """
        (position,) = whole(position=position)
        return self._rows.mark(position)

    def remove(self, begin: int, end: int | None = None, recurrent: Recurrent = "refuse") -> None:
        """Removes the tokens [begin, end). Later tokens move down and their keys are re-based.

        Args:
            begin: the first position to remove.
            end: the position after the last one to remove; None removes all tokens from `begin` on.
            recurrent: what happens to the states of recurrent layers, which contain the tokens if others
                follow. "keep" leaves them as they are: attention forgets the tokens, the states do not.
                "replay" computes the states again without the tokens; it needs them among the newest
                `rewind` tokens. "refuse" raises NotSupportedError. Other models ignore it.

        Raises:
            ValueError: begin and end are not in 0 <= begin <= end <= position, or recurrent is unknown.
            TypeError: begin or end is not a whole number.
            NotSupportedError: the model's keys cannot be re-based, its recurrent states cannot be changed in
                this way, a part of a picture would stay, or a window would no longer hold tokens that the
                next token sees.
        """
        checked_recurrent(recurrent)
        position = self.position
        begin, stop = whole(None, begin=begin, end=position if end is None else end)
        if not 0 <= begin <= stop <= position:
            raise ValueError(
                f"cannot remove tokens [{begin}, {stop}): expected 0 <= begin <= end <= {position}"
            )
        if begin == stop:
            return
        if stop == position:
            self.rewind_to(begin)
        else:
            with self._rows.edit(f"remove [{begin}, {stop})"):
                self._conversation.remove(begin, stop, recurrent)

    def splice(
        self, before: Sequence[int], after: Sequence[int], min_run: int = 64, recompute: float = 0.0
    ) -> Splice:
        """Lets the cache go on to other tokens, and keeps what both have in common, wherever it moved.

        Use it where a prompt changes before its end: text was removed, inserted or replaced. The cache goes
        back to the common prefix. Every run of at least `min_run` equal tokens after it, in the same order,
        is kept and joins as soon as the tokens before it are computed, with its keys re-based. So pass `rest`
        of the result to the model, or to any tool of the host, as if nothing else were missing:

        ```python
        splice = cache.splice(old_tokens, new_tokens)
        model(mx.array([splice.rest]), cache=cache)  # afterwards, the cache holds all of new_tokens
        ```

        At any time, the cache holds the first `position` tokens of `after`. What was computed after text that
        is gone still knows that text, so logits differ slightly from those of a fresh computation.

        A fork waits for the same runs, and a cache that goes back still does. `end_splice` forgets them, and
        so does another splice.

        Args:
            before: the tokens that the cache holds.
            after: the tokens to go on to. At least one of them is left to compute.
            min_run: the least length of a run to keep after the common prefix.
            recompute: how much of each such run to compute again, from its first token on: 0.0 to 1.0.

        Returns:
            What is kept, and what is to be computed. If the model's keys cannot be moved, only the prefix
            is kept, and `refusal` says why.

        Raises:
            ValueError: `before` is not as long as the cache, `after` is empty, min_run is below 1, or
                recompute is outside of 0.0 to 1.0.
            TypeError: the tokens are not sequences of whole numbers.
            CacheFullError: `after` exceeds the capacity.
        """
        before, after = token_ids(before, "before"), token_ids(after, "after")
        (min_run,) = whole(1, min_run=min_run)
        if len(before) != self.position:
            raise ValueError(f"before has {len(before)} tokens, but the cache holds {self.position}")
        if not after:
            raise ValueError("after has 0 tokens: at least 1 token is needed")
        share(recompute=recompute)
        about = f"splice {len(before)} tokens to {len(after)}"
        if not self.pool.ranks.is_alone:
            about += f", {min_run=}, {recompute=}, {told_tokens(before)} to {told_tokens(after)}"
        with self._rows.edit(about):
            planned = plan_splice(self._conversation, before, after, min_run, recompute)
            splice(self._conversation, after, planned)
            return planned

    def end_splice(self) -> None:
        """Forgets what has not joined yet. The cache keeps its tokens, and any others may come next."""
        with self._rows.edit("end the splice", is_sure=True):
            self._conversation.waiting = ()

    def fork(self) -> PromptCache:
        """Returns an independent cache with the same tokens. Shares keys and values; copies no array."""
        return PromptCache(self._rows.fork())

    def save(
        self,
        path: str | PathLike[str],
        tokens: Sequence[int] | None = None,
        tokenizer: Any = None,
        format: Literal["mlx_kvcache", "mlx-lm"] = "mlx_kvcache",  # noqa: A002
    ) -> None:
        """Saves the cache to a file. An existing file is replaced only once the new one is complete.

        Each rank of a group writes its own file, such as `chat.rank0of2.safetensors` for the path
        `chat.safetensors`. Either all of them are replaced or none.

        Args:
            path: the file to write.
            tokens: the token ids in the cache; a loaded cache has them as `tokens`.
            tokenizer: the tokenizer of these tokens. Its fingerprint is saved and `load` compares it.
            format: "mlx-lm" writes a file for `load_prompt_cache` of mlx-lm. It is not quantized and has no
                checksums, no tokens, no checkpoints, and only those window tokens that mlx-lm keeps.

        Raises:
            CacheFileError: the file cannot be written; an existing file is unchanged.
            ValueError: the number of tokens differs from `position`, or the format is unknown.
            TypeError: tokens is not a sequence of whole numbers.
            NotSupportedError: format is "mlx-lm", and the cache belongs to a rank of a group, or has chunks,
                for which mlx-lm 0.31 has no form.
        """
        if format not in ("mlx_kvcache", "mlx-lm"):
            raise ValueError(f'format must be "mlx_kvcache" or "mlx-lm", got {format!r}')
        tokens = None if tokens is None else token_ids(tokens)
        ranks = self.pool.ranks
        if format == "mlx-lm":
            if not ranks.is_alone:
                raise NotSupportedError(
                    'format="mlx-lm" has no place for a rank: a cache of several ranks needs '
                    'format="mlx_kvcache"'
                )
            if tokens is not None and len(tokens) != self.position:
                raise ValueError(f"got {len(tokens)} tokens for a cache that holds {self.position}")
            with self._rows.edit("save"):
                save_for_mlx_lm(Path(path), self)
        elif ranks.is_alone:
            self._prepared(tokens, tokenizer).write(path)
        else:
            write(ranks, Path(path), lambda: self._prepared(tokens, tokenizer))

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: nn.Module,
        tokenizer: Any = None,
        verify: bool = True,
        **options: Any,
    ) -> PromptCache:
        """Loads a cache from a file written by `save` or by `save_prompt_cache` of mlx-lm.

        The whole file is read into memory. Any thread can use the cache.

        Args:
            path: the file; with a `group`, the path that was given to `save`.
            model: the model that the cache was computed with.
            tokenizer: if given, a file that was saved with another tokenizer is refused.
            verify: compare all checksums. If False, corrupt arrays go unnoticed.
            options: options of `make_prompt_cache` that replace the saved ones. With a `group` each rank
                loads its own file, and all files must come from the same `save`.

        Raises:
            CacheFileError: the file cannot be read, is corrupt, or belongs to another model.
            CacheFullError: the file holds more tokens than the capacity.
            TypeError, ValueError, NotSupportedError: as `make_prompt_cache`.
        """
        check_options(options, "PromptCache.load", ("tokenizer", "verify"))
        rows, opened = loaded(Path(path), model, tokenizer, verify, options)
        cache = cls(rows)
        if opened:
            cache.tokens, cache.is_verified = opened.tokens, opened.is_verified
        return cache

    def close(self) -> None:
        """Frees the memory that no fork shares. Any later use raises CacheError."""
        conversation = self._conversation
        with conversation.pool.ranks.together(f"close conversation {conversation.name}"):
            conversation.pool.ranks.ready()
            self._rows.leave()
            conversation.close()

    def __repr__(self) -> str:
        name = name_of(self.pool.architecture)
        try:
            held = f"{self.position} tokens, capacity={self.capacity}, {size_of(self.nbytes)}"
        except CacheError:
            held = "closed"
        return f"PromptCache({held}, {name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        return self.fork()

    def __iadd__(self, other: Iterable[Any]) -> list[Any]:  # type: ignore[override,misc]
        """Returns a plain list: mlx-lm appends the cache of a draft model, which is another conversation."""
        return [*self, *other]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise NotSupportedError("a prompt cache cannot be pickled; use save and PromptCache.load")

    def _prepared(self, tokens: Sequence[int] | None, tokenizer: Any, base: Base | None = None) -> Prepared:
        """Copies the data that `save` writes into memory outside of MLX."""
        with self._rows.edit("copy"):
            return prepared(self._conversation, tokens, tokenizer, base)

    @property
    def _conversation(self) -> Conversation:
        return self._rows.conversation


@with_checked_options
def make_prompt_cache(
    model: nn.Module,
    capacity: int | None = None,
    overflow: Overflow = "error",
    rewind: int = 64,
    sinks: int = 0,
    checkpoints: int = 16,
    checkpoint_bytes: int | None = 1 << 30,
    kv_bits: KvBits = None,
    kv_group_size: int = 64,
    kv_float: KvFloat = (),
    quantize_after: int = 0,
    group: mx.distributed.Group | None = None,
    kv_transform: Transform = "hadamard",
    kv_text: Sequence[int] = (),
    kv_recent: int = RECENT,
) -> PromptCache:
    """Makes a prompt cache for a model, with one entry for each entry of the model's own cache.

    Args:
        model: a model of mlx-lm or mlx-vlm. Of a whole vision model, the language model inside it is meant.
        capacity: the maximum number of tokens; None for no limit.
        overflow: what to do when the cache is full. "error" raises CacheFullError before anything is
            computed; "shift" keeps the first `sinks` tokens and removes the older half of the others.
        rewind: how many of the newest tokens sliding windows, chunks and recurrent layers can always drop,
            one by one. Full attention can drop any number. Further back, recurrent layers go to checkpoints
            only (see `PromptCache.resume_point`).
        sinks: how many of the first tokens "shift" never removes. The model sets the sinks of its windows.
        checkpoints: the maximum number of older states that recurrent layers keep for this conversation.
        checkpoint_bytes: the maximum number of bytes of such states in all caches that are made with the same
            options; None for no limit. Those of the caches that were used longest ago are dropped first,
            but never those that `rewind` needs.
        kv_bits: quantize keys and values to 8, 6, 5, 4, 3 or 2 bits. A pair sets keys and values apart,
            where None leaves one in float. A function of the layer index returns one of these for each
            layer. None keeps the model's precision.
        kv_group_size: how many features share a scale and a bias: 32, 64 or 128. Head dimensions must be
            multiples of it.
        kv_float: layers that are not quantized: indices, or "last".
        quantize_after: quantize once the cache holds more tokens than this.
        group: the group of processes that the model is sharded over, as `mx.distributed.init()` returns it.
            All ranks make the same calls, and compare each one before they change anything. Layer indices
            refer to each rank's own cache list. None, or a group of one, compares nothing.
        kv_transform: "hadamard" transforms keys and values of fewer than 8 bits before they are quantized,
            which lowers the loss; "none" quantizes them as they are.
        kv_text: tokens of a text like those to come, and about as long. The model reads it once, and
            transformed keys and values are centered on their means over this text, which lowers the loss
            further.
        kv_recent: how many of the newest tokens have a copy in float, which attention reads instead, if a
            width is below 8. The tokens of one call of the model see each other in float, too. With 0, all
            tokens are read quantized, and outputs do not depend on how a text is divided into calls.

    Raises:
        TypeError: model is not a model of mlx-lm or mlx-vlm, or an option does not exist.
        ValueError: an option is out of range, "shift" comes without a capacity, sinks come without "shift",
            or a head dimension is not a multiple of kv_group_size.
        NotSupportedError: the model has an unknown kind of layer or needs something of its cache that this
            one does not have; or "shift" on a model whose keys cannot be re-based.
        RanksDisagreeError: ranks of the group passed different options, or one of them failed. Later, methods
            that change the cache and calls of the model raise it when ranks are about to do different things.
    """
    limits = Limits(capacity, overflow, sinks, rewind, checkpoints, checkpoint_bytes)
    storage = Storage(kv_bits, kv_group_size, kv_float, quantize_after, kv_transform, kv_text, kv_recent)
    return PromptCache(alone(new_conversation(model, limits, storage, ranks_of(group))))
