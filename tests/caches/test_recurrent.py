"""States that can only be kept, against a list of what they were after each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CacheError, CausalOptions, NotSupportedError, RecurrentCache
from mlx_kvcache.caches.recurrent import Arrays


def made(**options: Any) -> RecurrentCache:
    cache = RecurrentCache(**options)
    cache.init(mx.float32, max_batch=64)
    return cache


def array(state: Arrays) -> mx.array:
    """The first array of a state."""
    assert state[0] is not None
    return state[0]


def numbers(state: Arrays) -> tuple[int, ...]:
    return tuple(int(part.item()) for part in state)  # type: ignore[union-attr, arg-type]


def after(state: Arrays | None, tokens: Sequence[int]) -> tuple[int, int]:
    """A recurrence whose every state is different: (sum of i * token, count)."""
    total, count = numbers(state) if state else (0, 0)
    for token in tokens:
        count += 1
        total += count * token
    return total, count


def feed(
    cache: RecurrentCache,
    tokens: Sequence[int],
    sequence: int = 0,
    checkpoints: bool = False,
    layers: Iterable[int] = (0, 1),
) -> Arrays:
    """One batch of one sequence; returns the state it began with."""
    cache.start_forward(Batch.run(sequence, cache.end(sequence), len(tokens)))
    begin = cache.end(sequence) - len(tokens)
    for layer in layers:
        handle = cache.layer(layer)
        state = handle.get()
        for at in cache.wanted() if checkpoints else ():
            handle.put(*map(mx.array, after(state, tokens[: at - begin])), at=at)
        handle.put(*map(mx.array, after(state, tokens)))
    return state


def newest(cache: RecurrentCache, sequence: int = 0, layer: int = 0) -> tuple[int, ...]:
    cache.start_forward(Batch([cache.end(sequence)], [sequence]))
    state = numbers(cache.layer(layer).get())
    cache._pass = None
    return state


@pytest.mark.parametrize("seed", range(8))
def test_states_are_those_of_the_tokens(seed: int) -> None:
    random = Random(seed)
    cache = made(interval=5, max_checkpoints=4)
    said: dict[int, list[int]] = {}
    for _ in range(300):
        sequence = random.randrange(3)
        tokens = said.setdefault(sequence, [])
        call = random.random()
        if call < 0.6:
            new = [random.randrange(100) for _ in range(random.choice([1, 1, 1, 7, 23]))]
            state = feed(cache, new, sequence, checkpoints=random.random() < 0.5)
            assert after(state, []) == after((), tokens)
            tokens += new
            if random.random() < 0.2:
                with pytest.raises(KeyError), cache.forward(Batch.run(sequence, len(tokens), 2)):
                    cache.put(mx.array(0), mx.array(0))
                    raise KeyError
        elif call < 0.85:
            position = random.randint(0, len(tokens) + 1)
            point = cache.prepare_restore(sequence, position)
            assert (point is None) == (not tokens)
            point = point or 0
            assert point == max(p for p in range(position + 1) if cache.can_resume(sequence, p))
            if cache.can_resume(sequence, position):
                cache.remove(sequence, position)
                del tokens[position:]
            elif position < len(tokens):
                with pytest.raises(NotSupportedError, match=f"no state at position {position}"):
                    cache.remove(sequence, position)
                cache.remove(sequence, point)
                del tokens[point:]
        else:
            other = (sequence + 1) % 3
            length = random.randint(0, len(tokens))
            before = cache.nbytes
            cache.copy_prefix(sequence, other, length)
            assert cache.nbytes <= before
            said[other] = tokens[:length]
            if not cache.can_resume(other, length):
                with pytest.raises(NotSupportedError, match=f"cannot go on at position {length}"):
                    cache.start_forward(Batch([length], [other]))
                point = cache.prepare_restore(other, length) or 0
                cache.remove(other, point)
                del said[other][point:]
        cache.check()
        assert [cache.end(s) for s in said] == [len(tokens) for tokens in said.values()]


def test_checkpoints_inside_a_block_and_while_decoding() -> None:
    cache = made(interval=10)
    feed(cache, range(35), checkpoints=True)
    assert [p for p in range(36) if cache.can_resume(0, p)] == [0, 10, 20, 30, 35]
    for token in range(20):
        feed(cache, [token])
    assert [p for p in range(56) if cache.can_resume(0, p)] == [0, 10, 20, 30, 35, 40, 50, 55]
    assert cache.prepare_restore(0, 49) == 40
    assert cache.prepare_restore(0, 9) == 0
    assert cache.prepare_restore(7, 9) is None
    with pytest.raises(ValueError, match="position must be 0 or more, got -1"):
        cache.prepare_restore(0, -1)
    cache.remove(0, 30)
    assert newest(cache) == after((), range(30))


def test_checkpoints_are_at_multiples_of_the_interval() -> None:
    cache = made(interval=10)
    feed(cache, range(7))
    cache.start_forward(Batch.run(0, 7, 24))
    assert cache.wanted() == (10, 20, 30)


def test_a_restored_sequence_goes_back_as_far() -> None:
    cache = made(interval=10)
    feed(cache, range(35), checkpoints=True)
    cache._plan_restore(4, cache._snapshot(0)).commit()
    for sequence in (0, 4):
        assert [p for p in range(36) if cache.can_resume(sequence, p)] == [0, 10, 20, 30, 35]
    cache.remove(4, 20)
    assert newest(cache, 4) == after((), range(20))
    cache.copy_prefix(0, 5, 30)
    assert [p for p in range(36) if cache.can_resume(5, p)] == [0, 10, 20, 30]


def test_a_state_of_other_arrays_is_not_restored() -> None:
    cache, other = made(), made()
    feed(cache, range(3))
    other.start_forward(Batch([0], [0]))
    other.put(mx.ones(5))
    with pytest.raises(ValueError, match=r"the state of layer 0 has .*, before it had"):
        other._plan_restore(1, cache._snapshot(0))
    assert (other.end(0), other.end(1)) == (1, 0)


@pytest.mark.parametrize("wrong", [{"end": 0}, {"states": {0: {}}}, {"states": {4: {}}}])
def test_check_finds_what_cannot_be(wrong: dict[str, Any]) -> None:
    cache = made()
    feed(cache, range(3))
    cache.check()
    cache._streams[0] = cache._streams[0]._replace(**wrong)
    with pytest.raises(AssertionError):
        cache.check()


def test_bytes_of_a_layer() -> None:
    cache = made()
    feed(cache, range(3))
    assert cache.layer_nbytes(0, 0) == cache.layer_nbytes(1, 0) == 8
    assert (cache.layer_nbytes(2, 0), cache.layer_nbytes(0, 7)) == (0, 0)


def test_bounds() -> None:
    by_number = made(interval=1, max_checkpoints=6)
    by_bytes = made(interval=1, max_checkpoints=100, max_bytes=6 * 16)
    none = made(interval=1, max_checkpoints=0)
    for token in range(200):
        for cache in (by_number, by_bytes, none):
            feed(cache, [token])
    for cache in (by_number, by_bytes):
        kept = [p for p in range(1, 200) if cache.can_resume(0, p)]
        assert len(kept) == 6
        # Finer towards the end: at least half of them in the last quarter.
        assert len([p for p in kept if p > 150]) >= 3
        assert cache.nbytes == 7 * 16
    assert [p for p in range(201) if none.can_resume(0, p)] == [0, 200]


def test_a_state_with_nothing_in_it() -> None:
    cache = made()
    cache.start_forward(Batch([0], [0]))
    assert cache.get() == ()
    cache.put(None, mx.ones(3))
    cache.copy_prefix(0, 1, 1)
    cache.start_forward(Batch([1], [1]))
    first, second = cache.get()
    assert first is None
    assert second is not None
    assert second.shape == (3,)
    cache.put(mx.ones(2), mx.ones(3))
    cache.put(mx.ones(5), mx.ones(3))
    with pytest.raises(ValueError, match=r"the state of layer 0 has \(axes, dtype\) \(\(2, "):
        cache.put(mx.ones((5, 1)), mx.ones(3))
    for arrays in ([mx.ones(2)], [mx.ones(2)] * 3):
        with pytest.raises(ValueError, match=r"the state of layer 0 has .*, before it had"):
            cache.put(*arrays)


def test_batches_of_several_sequences_name_one() -> None:
    cache = made()
    cache.start_forward(Batch([0, 0], [3, 8]))
    with pytest.raises(CacheError, match=r"sequence=None names none of the batch's 2 sequences: \[3, 8\]"):
        cache.get()
    cache.put(mx.ones(1), sequence=3)
    cache.put(mx.zeros(1), sequence=8)
    with pytest.raises(CacheError, match="sequence=4"):
        cache.layer(0).put(mx.ones(1), sequence=4)
    for at in (0, 2):
        told = f"at={at} is outside the batch, which extends sequence 3 from 0 to 1 tokens: at must be 1 to 1"
        with pytest.raises(ValueError, match=told):
            cache.put(mx.ones(1), sequence=3, at=at)
    assert mx.array_equal(array(cache.get(sequence=8)), mx.zeros(1))


def test_what_a_recurrence_cannot_do() -> None:
    cache = made()
    feed(cache, range(9))
    with pytest.raises(NotSupportedError, match=r"\[2, 4\) from sequence 0 of length 9"):
        cache.remove(0, 2, 4)
    with pytest.raises(NotSupportedError, match="mask"):
        cache.set_causal(CausalOptions())
    cache.remove(0, 3, 3)
    cache.remove(5, 0, 1)
    assert newest(cache) == after((), range(9))
    cache.remove(0, 0, 20)
    assert cache.end(0) == 0
    wrong: list[dict[str, Any]] = [{"interval": 0}, {"max_checkpoints": -1}, {"max_bytes": -1}]
    for options in wrong:
        with pytest.raises(ValueError, match="must be"):
            made(**options)


def test_a_checkpoint_of_some_layers_is_none() -> None:
    cache = made()
    cache.start_forward(Batch.run(0, 0, 8))
    for layer in (0, 1):
        cache.layer(layer).put(mx.ones(1))
    cache.layer(0).put(mx.ones(1), at=4)
    assert not cache.can_resume(0, 4)
    cache.layer(1).put(mx.ones(1), at=4)
    assert cache.can_resume(0, 4)


def test_reserving_stores_nothing() -> None:
    cache = made()
    cache.start_forward(Batch([0], [0]), reserve=True)
    assert cache.get() == ()
    assert cache.wanted() == ()
    cache.put(mx.ones((2, 3)), None)
    assert mx.array_equal(array(cache.get()), mx.zeros((2, 3)))
    assert cache.get()[1] is None
    assert (cache.nbytes, cache.end(0)) == (0, 0)


def test_graphs_do_not_grow() -> None:
    """500 steps of which only the state is evaluated."""
    cache = made(interval=64)
    sizes = []
    for _ in range(500):
        cache.start_forward(Batch([cache.end(0)], [0]))
        state = cache.get()
        new = array(state) * 0.5 + 1 if state else mx.zeros(8)
        cache.put(new)
        mx.eval(cache.get())
        sizes.append(mx.get_active_memory())
    assert sizes[-1] - sizes[100] <= 64 * 1024
