"""A conversation's cache, and how to make one for a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import mlx.core as mx
import mlx.nn as nn

from ..arguments import size_of, token_ids, whole
from ..errors import CacheError, NotSupportedError
from ..persist.files import Prepared
from .entries.nested import entries_of
from .files import alone, loaded, prepared, save_for_mlx_lm, write
from .forward.rows import Rows
from .options import KvBits, KvFloat, Storage, check_options, new_conversation, with_checked_options
from .pool.conversation import Conversation, Limits, Overflow
from .pool.pool import Pool
from .ranks import ranks_of


class PromptCache(list[Any]):
    """mlx-lm's prompt cache, a list with an object for each entry of the model's own, that can do more.

    Positions count tokens. After any error everything is as it was; but where `overflow="shift"` has
    made room for tokens, they are gone even if the model then raises.

    Attributes:
        tokens: of a loaded cache the tokens that were saved with it, or None.
        is_verified: False where a file was loaded without comparing its checksums.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(entries_of(rows))
        self._rows = rows
        self.tokens: list[int] | None = None
        self.is_verified = True

    @property
    def pool(self) -> Pool:
        """The cells that this cache shares with its forks; `pool.nbytes` is what is allocated."""
        return self._rows.pool

    @property
    def sequence(self) -> int:
        """By which name `holdings` knows this cache; no other of the pool has had it."""
        return self._conversation.sequence

    @property
    def position(self) -> int:
        """How many tokens are in the cache."""
        return self._rows.positions[0]

    @property
    def capacity(self) -> int | None:
        """How many tokens may be in the cache."""
        return self._conversation.limits.capacity

    @property
    def gaps(self) -> int:
        """How often `remove` or a shift has taken out tokens that others followed.

        What comes after a gap was computed with knowledge of what is gone, so such a cache is not
        that of the tokens that are left. `load` begins at 0.
        """
        return self._conversation.gaps

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, what is shared with forks counted in full."""
        return sum(entry.nbytes for entry in entries_of(self._rows))

    def can_resume(self, position: int) -> bool:
        """Whether generation can go on from `position`, the tokens from there on dropped."""
        (position,) = whole(None, position=position)
        return 0 <= position <= self.position and self._rows.can_resume(position)

    def resume_point(self, position: int) -> int:
        """The newest position <= `position` to continue from. Raises ValueError below 0."""
        (position,) = whole(position=position)
        return self._rows.resume_point(min(position, self.position))

    def rewind(self, n: int) -> None:
        """Drop the newest n tokens.

        Raises:
            ValueError: not 0 <= n <= position.
            TypeError: n is no whole number.
            NotSupportedError: what the tokens before those need is not held; see `resume_point`.
        """
        (n,) = whole(None, n=n)
        if not 0 <= n <= self.position:
            raise ValueError(f"cannot rewind {n} of {self.position} tokens")
        self._rewind_to(self.position - n)

    def rewind_to(self, position: int) -> None:
        """Drop the tokens from `position` on. Raises as `rewind`."""
        (position,) = whole(None, position=position)
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind {self.position} tokens to position {position}")
        self._rewind_to(position)

    def remove(self, begin: int, end: int | None = None) -> None:
        """Take out the tokens [begin, end); later ones move down and their keys are re-based.

        Args:
            end: None takes out all tokens from `begin` on. As of `rewind`, what is not there cannot be
                taken out.

        Raises:
            ValueError: not 0 <= begin <= end <= position.
            TypeError: begin or end is no whole number.
            NotSupportedError: the model's position scheme is not understood, it has recurrent
                layers, or what the next token sees would not be held.
        """
        position = self.position
        begin, stop = whole(None, begin=begin, end=position if end is None else end)
        if not 0 <= begin <= stop <= position:
            raise ValueError(f"cannot remove [{begin}, {stop}) of {position} tokens")
        if begin == stop:
            return
        if stop == position:
            self._rewind_to(begin)
        else:
            with self._rows.edit(f"remove [{begin}, {stop})"):
                self._conversation.remove(begin, stop)

    def fork(self) -> PromptCache:
        """A cache with the same tokens that goes its own way. Copies no array."""
        return PromptCache(self._rows.fork())

    def save(
        self,
        path: str | PathLike[str],
        tokens: Sequence[int] | None = None,
        tokenizer: Any = None,
        format: Literal["mlx_kvcache", "mlx-lm"] = "mlx_kvcache",  # noqa: A002
    ) -> None:
        """Save what is held, without slack. The file is there whole or not at all.

        Each rank of a group writes its own, which is named `chat.rank0of2.safetensors` and so on
        where `path` is `chat.safetensors`; all are replaced, or none.

        Args:
            tokens: those in the cache; `load` gives them back.
            tokenizer: notes which one the tokens are of.
            format: "mlx-lm" writes what mlx-lm's `load_prompt_cache` reads: in float, without
                checksums, tokens, checkpoints, and what mlx-lm's windows would not hold.

        Raises:
            CacheFileError: it cannot be written; a file that was there still is.
            ValueError: another number of tokens than are in the cache, or an unknown format.
            TypeError: tokens that are no sequence of whole numbers.
            NotSupportedError: ranks of a group, in mlx-lm's format.
        """
        if format not in ("mlx_kvcache", "mlx-lm"):
            raise ValueError(f'format must be "mlx_kvcache" or "mlx-lm", got {format!r}')
        tokens = None if tokens is None else token_ids(tokens)
        ranks = self.pool.ranks
        if format == "mlx_kvcache":
            if ranks.is_alone:
                self._prepared(tokens, tokenizer).write(path)
            else:
                write(ranks, Path(path), lambda: self._prepared(tokens, tokenizer))
            return
        if not ranks.is_alone:
            raise NotSupportedError('format="mlx-lm" cannot say which of several ranks a file is of')
        if tokens is not None and len(tokens) != self.position:
            raise ValueError(f"{len(tokens)} tokens for a cache that holds {self.position}")
        with self._rows.edit("save"):
            save_for_mlx_lm(Path(path), self)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: nn.Module,
        tokenizer: Any = None,
        verify: bool = True,
        **options: Any,
    ) -> PromptCache:
        """A cache of this model with what is in a file, of `save` or of mlx-lm's `save_prompt_cache`.

        All of it is in memory then, and any thread can use it.

        Args:
            tokenizer: refuses a file that was saved with another one.
            verify: compare all checksums. Otherwise damage in arrays goes unseen, and `is_verified`
                says so.
            options: of `make_prompt_cache`, in the place of those that the cache had. With a `group`
                each rank loads its own file, and all must be of the same save.

        Raises:
            CacheFileError: the file cannot be read, is damaged, or is of another model.
            CacheFullError: it holds more tokens than the capacity.
            TypeError, ValueError, NotSupportedError: as `make_prompt_cache`.
        """
        check_options(options, "PromptCache.load", ("tokenizer", "verify"))
        rows, opened = loaded(Path(path), model, tokenizer, verify, options)
        cache = cls(rows)
        if opened:
            cache.tokens, cache.is_verified = opened.tokens, opened.is_verified
        return cache

    def close(self) -> None:
        """Give the memory back that no fork shares. Further use is a CacheError."""
        conversation = self._conversation
        with conversation.pool.ranks.together(f"close conversation {conversation.name}"):
            conversation.pool.ranks.ready()
            self._rows.leave()
            conversation.close()

    def __repr__(self) -> str:
        module = self.pool.architecture.rpartition(".")[2]
        try:
            held = f"{self.position} tokens, capacity={self.capacity}, {size_of(self.nbytes)}"
        except CacheError:
            held = "closed"
        return f"PromptCache({held}, {module})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        return self.fork()

    def __iadd__(self, other: Iterable[Any]) -> list[Any]:  # type: ignore[override,misc]
        """A plain list: with the layers of a draft model behind it, it is no longer one conversation."""
        return [*self, *other]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise NotSupportedError("a prompt cache cannot be pickled")

    def _prepared(self, tokens: Sequence[int] | None, tokenizer: Any) -> Prepared:
        """What `save` writes, in memory that is not MLX's."""
        with self._rows.edit("copy"):
            return prepared(self._conversation, tokens, tokenizer)

    @property
    def _conversation(self) -> Conversation:
        return self._rows.conversation

    def _rewind_to(self, position: int) -> None:
        with self._rows.edit(f"go back to {position}"):
            self._conversation.rewind_to(position)


@with_checked_options
def make_prompt_cache(
    model: nn.Module,
    capacity: int | None = None,
    overflow: Overflow = "error",
    rewind: int = 64,
    sinks: int = 0,
    kv_bits: KvBits = None,
    kv_group_size: int = 64,
    kv_float: KvFloat = (),
    quantize_after: int = 0,
    group: mx.distributed.Group | None = None,
) -> PromptCache:
    """A prompt cache for an mlx-lm model, which answers every entry of the model's own in kind.

    Args:
        capacity: the most tokens that it holds; None grows without bound.
        overflow: what happens when more come. "error" raises CacheFullError before anything
            is computed; "shift" removes the older half after the first `sinks` tokens.
        rewind: how many newest tokens windows and chunks can always drop. Full attention can
            drop any; recurrences go back to their checkpoints (see `PromptCache.resume_point`).
        sinks: how many first tokens "shift" never removes. How many a window keeps is the model's own.
        kv_bits: store keys and values in 8, 6, 5, 4, 3 or 2 bits; a pair for keys and values, in
            which None keeps one in float; or a function of the layer that returns one of these.
            None stores in the model's own precision.
        kv_group_size: 32, 64 or 128 features share a scale and a bias; heads must be multiples.
        kv_float: layers that stay in float all the same: indices, or "last".
        quantize_after: a cache stays in float until it holds more tokens than this.
        group: the processes that the model is sharded over, as of `mx.distributed.init()`. Each
            makes the same calls; before anything changes they compare what they are about to do.
            Layers are then counted in each rank's own cache list. None, or a group of one, compares
            nothing.

    Raises:
        TypeError: not an mlx-lm model, or an option that there is not.
        ValueError: options out of range, "shift" without a capacity, sinks without "shift", or heads that
            groups do not divide.
        NotSupportedError: a layer of unknown kind, a model that asks more of its caches than
            these give, "shift" on a model whose tokens cannot be moved, sinks on one with
            recurrent layers.
        RanksDisagreeError: ranks of the group give other options, or cannot. So does from then on
            every method that changes the cache, and every call of the model with it, where ranks
            are about to do different things.
    """
    limits = Limits(capacity, overflow, sinks, rewind)
    storage = Storage(kv_bits, kv_group_size, kv_float, quantize_after)
    return PromptCache(alone(new_conversation(model, limits, storage, ranks_of(group))))
