"""Tests a model on this package's caches when a cache is made, before it is used.

A model that needs something of a cache that this package does not provide fails here, not in the
middle of a text. The test builds the graph of a few tokens without evaluating it, so it costs only
Python's time. When a batch first needs it, the module also compares logits to find out how the model
can compute batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..caches.recurrent import Arrays
from ..cells.visibility import Chunk
from ..errors import NotSupportedError
from ..quantization import CENTERED, Centers, centers_of
from ..storage.buffers import Form
from .entries.keyvalue import stored
from .entries.nested import entries_of
from .forward.batch_rows import Rows
from .forward.forward import newest
from .forward.token_rows import TokenRows
from .hosts.host import logits_of, name_of
from .hosts.layout import Leaf
from .hosts.mixers import Mixers, find
from .hosts.observe import PerModel
from .pool.conversation import Conversation, Limits
from .pool.pool import Batching, Pool
from .rope.probe import beyond
from .rope.rebase import Head

LENGTHS = (5, 2)
"""Lengths in tokens of the rows that are tested."""
TRIED = (3, 5, 6, 8)
"""Positions at which states are computed again."""
REWIND = 6
"""How many tokens the caches of the trial can drop."""
BY_COLUMN = frozenset({"minimax_m3_vl", "longcat_flash_sparse"})
"""Models that select keys by column index, which padding changes, once there are many."""
SAME = 0.05
"""Largest difference of equal states, as a fraction of their root mean square; allows for 16 bits."""
NOISE = 0.1
"""Largest difference of equal logits, as a fraction of their standard deviation; allows for 16 bits."""
EXACT = 0.01
"""The same in 32 bits."""
BLOCK = 512
"""The number of tokens in a block of a text on which centers are measured."""
FIRST = 4
"""How many of the oldest tokens' keys and values are left out then."""


class _Findings:
    """Answers about a model, by question, version of its weights, number of ranks and what was given."""

    def __init__(self) -> None:
        # Held while the model runs, so that it is tested once. Other models have other locks.
        self.lock = threading.RLock()
        self.answers: dict[tuple[Any, ...], Any] = {}


_findings = PerModel(_Findings)


def try_out(pool: Pool) -> None:
    """Find out what the model writes, for `pool.forms`.

    Raises:
        NotSupportedError: the model cannot run on these caches.
    """
    pool.forms, pool.mirrored = _answer(pool, "forms")
    pool.ask = _answer


def _answer(pool: Pool, question: str, *given: Any) -> Any:
    """Answer a question about the pool's model, once for each version, in a pool made for the test."""
    model, version = pool.living_model, pool.version
    findings, key = _findings.of(model), (question, version, pool.ranks.size, *given)
    with findings.lock:
        if key not in findings.answers:
            scratch = Pool(model, pool.layout, [REWIND] * len(pool.caches), None, pool.ranks, version)
            scratch.ask = _answer
            if question != "forms":
                scratch.forms = pool.forms
            # Forms and calls are known without computing anything.
            scratch.is_scratch = question in ("forms", "mixers")
            if question not in ("batching", "mixes"):
                # The others come before it is known how to note inputs.
                scratch.__dict__["mixers"] = {}
            found = _QUESTIONS[question](scratch, *given)
            version.after_call(model)
            if not scratch.is_scratch:
                # Ranks have other heads, or other layers, and so other centers.
                pool.ranks.agree(f"go on with {question}: {'' if question == 'centers' else found}")
            answers = {known: answer for known, answer in findings.answers.items() if known[1] is version}
            findings.answers = answers | {key: found}
        return findings.answers[key]


def _written(pool: Pool) -> tuple[dict[int, Form | None], set[int]]:
    rows = _rows(pool)
    cache, module = entries_of(rows), pool.architecture
    written: set[int] = set()
    for n in (2, 1):
        try:
            pool.living_model(mx.zeros((1, n), mx.int32), cache=cache)
        except Exception as error:
            where = (
                "these caches" if _runs_without(pool.living_model) else "this device, with or without a cache"
            )
            raise NotSupportedError(f"{module} does not run on {where}: {error!r}") from error
        written |= {index for index, is_written in enumerate(rows.written_last) if is_written}
        pool.forms = dict.fromkeys(written)
    leaves = (pool.leaves[index] for index in sorted(written))
    forms = {leaf.index: _form(pool, leaf) if leaf.rule else None for leaf in leaves}
    return forms, pool.mirrored


def _runs_without(model: nn.Module) -> bool:
    """Whether a model can be called without a cache."""
    try:
        model(mx.zeros((1, 2), mx.int32))
    except Exception:  # noqa: BLE001  # this package's caches did not cause it
        return False
    return True


def _form(pool: Pool, leaf: Leaf) -> Form:
    """Return the form of a leaf's keys and values."""
    return pool.keyed(leaf)._store.layers[leaf.index].form


def _batching(pool: Pool) -> Batching:
    """Compare the logits of two rows of unequal length in one input with those of each alone."""
    leads = _leads(pool)
    alone = [_rows(pool, lead) for lead in leads]
    text = mx.arange(1, max(LENGTHS) + 1)[None]
    expected = mx.concatenate(
        [
            _logits(rows, text[:, :length], mx.array([[length]]))
            for rows, length in zip(alone, LENGTHS, strict=True)
        ]
    )
    block = mx.broadcast_to(text, (len(LENGTHS), text.shape[1]))
    ways: tuple[Batching, ...] = ("ragged", "gathered")
    for way in ways:
        if way == "gathered" and name_of(pool.architecture) in BY_COLUMN:
            continue
        together = _rows(pool, *leads)
        together.padding = together.padding.prepared(None, LENGTHS, None)
        pool.__dict__["batching"] = way
        try:
            found = _logits(together, block, mx.array(LENGTHS)[:, None])
            noise = EXACT if found.dtype == mx.float32 else NOISE
            if found.shape == expected.shape and _difference(found, expected) <= noise:
                return way
        except Exception:  # noqa: BLE001, S112  # the model does not support such rows
            continue
        finally:
            del pool.__dict__["batching"]
    return "apart"


def _mixes(pool: Pool) -> bool:
    """Compare two prompts that run as one-token rows, first blocks and then their last two tokens."""
    if pool.layout.is_recurrent or pool.batching != "ragged":
        return False
    texts = [list(range(1, length + 3)) for length in LENGTHS]
    leads = _leads(pool)
    alone = [_rows(pool, lead) for lead in leads]
    expected = mx.concatenate([_run(rows, text)[:, -1] for rows, text in zip(alone, texts, strict=True)])
    conversations = _rows(pool, *leads).conversations
    steps = [
        [text[:length] for text, length in zip(texts, LENGTHS, strict=True)],
        [text[-2:] for text in texts],
    ]
    try:
        for parts in steps:
            cache = entries_of(TokenRows(pool, conversations, [len(part) for part in parts]))
            logits = logits_of(
                pool.living_model, mx.array([[token] for part in parts for token in part]), cache
            )
            mx.eval(logits)
    except Exception:  # noqa: BLE001  # the model does not support such rows
        return False
    found = mx.stack([logits[1, -1], logits[3, -1]])
    return _difference(found, expected) <= NOISE


def _has_states(pool: Pool) -> bool:
    """Whether a rank has recurrent layers."""
    return not pool.ranks.least(int(not pool.layout.is_recurrent))


def _mixers(pool: Pool) -> dict[int, Mixers]:
    """Find the modules that compute the states of recurrent layers, if they are known for all layers."""
    cache = entries_of(_rows(pool))
    found = find(pool.living_model, lambda n: pool.living_model(mx.zeros((1, n), mx.int32), cache=cache))
    needed = {leaf.index for leaf in pool.leaves if leaf.rule is None and leaf.index in pool.forms}
    return found if found.keys() >= needed else {}


def _refusal(pool: Pool) -> str:
    """Return why recurrent states cannot be computed again, or an empty text."""
    mixers = pool.ask(pool, "mixers")
    if not pool.ranks.least(int(bool(mixers) or not pool.layout.is_recurrent)):
        return "the modules that compute recurrent states are not found"
    try:
        refusals = "; ".join(_refusals(pool, mixers))
    except Exception as error:
        if not pool.ranks.is_alone:
            raise
        refusals = f"computing recurrent states again fails: {error!r}"
    shared = pool.ranks.share("compare why states cannot be computed again", refusals)
    return next(filter(None, shared), "")


def _refusals(pool: Pool, mixers: dict[int, Mixers]) -> Iterator[str]:
    """Compare states that are computed again with those of fresh computations; yield what differs.

    A block of seven tokens is divided, and two tokens follow. States inside and after the block are
    computed again, and logits show whether dividing the block has changed them.
    """
    text = list(range(1, 10))
    parts = text[:7], text[7:8], text[8:]
    expected = [_states(pool, _rows(pool), text[:end]) for end in TRIED]
    plain = _rows(pool)
    logits = mx.concatenate([_run(plain, part) for part in parts], axis=1)
    pool.__dict__["mixers"] = pool.watch_mixers(mixers)
    rows = _rows(pool)
    found = mx.concatenate([_run(rows, part) for part in parts], axis=1)
    if not _difference(found, logits) <= NOISE:
        yield "calls of the modules that compute recurrent states cannot be divided"
    for end, states in zip(reversed(TRIED), reversed(expected), strict=True):
        if not rows.can_resume(end):
            yield f"the states at token {end} of {len(text)} are not known"
            return
        with rows.edit(f"rewind to {end}"):
            rows.conversation.rewind_to(end)
        for leaf, arrays in states.items():
            own = newest(rows.conversation, pool.leaves[leaf])
            if not all(_alike(*pair) for pair in zip(own, arrays, strict=True)):
                name = pool.leaves[leaf].name
                yield f"the states of layer {name} depend on more than the calls of its modules"


def _centers(pool: Pool, text: tuple[int, ...]) -> Centers:
    """Measure the mean keys and values of a text's tokens."""
    vocabulary, rows = _run(_rows(pool), [0]).shape[-1], _rows(pool)
    if max(text) >= vocabulary:
        raise ValueError(f"kv_text contains the token {max(text)}, but the model has {vocabulary} tokens")
    for begin in range(0, len(text), BLOCK):
        _run(rows, list(text[begin : begin + BLOCK]))
    means = {}
    for leaf in pool.leaves:
        form = pool.forms.get(leaf.index)
        if leaf.rule and form and max(form.key_dim, form.value_dim) <= CENTERED:
            keys, values = stored(rows.conversation, leaf)
            means[leaf.index] = _mean(keys), _mean(values)
    return centers_of(means)


def _mean(array: mx.array) -> np.ndarray:
    """Return the mean of all tokens but the first ones, whose keys are unlike others' in many models."""
    first = min(FIRST, array.shape[2] // 2)
    return np.array(array[0, :, first:].astype(mx.float32).mean(axis=1))


def _run(rows: Rows, tokens: mx.array | list[int]) -> mx.array:
    """Return the logits (B, n, vocabulary) of tokens (B, n), or of a list of tokens of one row."""
    inputs = tokens if isinstance(tokens, mx.array) else mx.array([tokens])
    logits = logits_of(rows.pool.living_model, inputs, entries_of(rows))
    # Evaluated one by one: pipeline ranks would order the collectives of two calls differently.
    mx.eval(logits)
    return logits


def _states(pool: Pool, rows: Rows, tokens: list[int]) -> dict[int, Arrays]:
    """Return the states of all recurrent layers after some tokens that run as one block."""
    _run(rows, tokens)
    return {leaf.index: newest(rows.conversation, leaf) for leaf in pool.leaves if leaf.rule is None}


def _alike(a: mx.array | None, b: mx.array | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    apart, size = (mx.sqrt(mx.square(array).mean()) for array in (a - b, b))
    return bool((apart <= SAME * size).item())


_QUESTIONS: dict[str, Callable[..., Any]] = {
    "forms": _written,
    "batching": _batching,
    "mixes": _mixes,
    "has_states": _has_states,
    "mixers": _mixers,
    "refusal": _refusal,
    "centers": _centers,
}


def _logits(rows: Rows, block: mx.array, token: mx.array) -> mx.array:
    """Return the logits of one token after a block."""
    _run(rows, block)
    rows.padding = rows.padding.finalized()
    return _run(rows, token)[:, -1]


def _leads(pool: Pool) -> list[int]:
    """Offsets at which the rows of a batch begin: far apart if the output depends on more than distances.

    Otherwise a model that computes all rows as if they were at the first one's position would not show.
    """
    scheme, leads = pool.scheme, [0] * len(LENGTHS)
    has_chunks = any(isinstance(rule, Chunk) for rule in pool.layout.rules)
    # The borders of chunks depend on the offset.
    if not scheme.ahead and not scheme.refusal and not has_chunks:
        leads[-1] = max(beyond(pool.living_model), default=0)
    return leads


def _rows(pool: Pool, *leads: int) -> Rows:
    """Rows of empty conversations whose offsets begin at these numbers."""
    conversations = [Conversation(pool, Limits()) for _ in leads or (0,)]
    for conversation, lead in zip(conversations, leads, strict=False):
        conversation.head = Head(lead)
    return Rows(pool, conversations, is_batch=len(leads) > 1)


def _difference(a: mx.array, b: mx.array) -> float:
    """Return the RMS difference divided by the standard deviation of b."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    ratio: float = (mx.sqrt(mx.square(a - b).mean()) / mx.sqrt(mx.var(b))).tolist()  # type: ignore[assignment]
    return ratio
