"""Recurrences that go back to any of their newest tokens: their inputs are kept, and run through again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CausalCache, NotSupportedError, RecurrentCache, WrapperCache
from mlx_kvcache.caches.recurrent import Arrays
from mlx_kvcache.persist import load, save
from tests.caches.data import coded
from tests.caches.test_recurrent import after, array, numbers
from tests.kinds import add_offsets


def ids(tokens: mx.array) -> list[int]:
    return [int(token.item()) for token in tokens.reshape(-1)]  # type: ignore[arg-type]


def replay(layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
    (tokens,) = inputs
    return tuple(map(mx.array, after(arrays, ids(tokens))))


def made(**options: Any) -> RecurrentCache:
    defaults: dict[str, Any] = {"replay": replay, "rewind": 6, "interval": 5}
    cache = RecurrentCache(**defaults | options)
    cache.init(mx.float32, max_batch=200)
    return cache


def feed(
    cache: RecurrentCache,
    tokens: Sequence[int],
    sequence: int = 0,
    m: int | None = None,
    wanted: bool = True,
    layers: Sequence[int] = (0, 1),
) -> None:
    """One batch of one sequence, of which the inputs of the last m tokens are given."""
    tokens, begin = list(tokens), cache.end(sequence)
    with cache.forward(Batch.run(sequence, begin, len(tokens))):
        for layer in layers:
            handle = cache.layer(layer)
            state = handle.get()
            for at in cache.wanted() if wanted else ():
                handle.put(*map(mx.array, after(state, tokens[: at - begin])), at=at)
            given = [mx.array([tokens])[:, -(m or len(tokens)) :]] if m != 0 else None
            handle.put(*map(mx.array, after(state, tokens)), inputs=given)


def newest(cache: RecurrentCache, sequence: int = 0, layer: int = 0) -> tuple[int, ...]:
    return numbers(cache.newest(layer, sequence))


def resumable(cache: RecurrentCache, sequence: int = 0) -> list[int]:
    return [p for p in range(cache.end(sequence) + 1) if cache.can_resume(sequence, p)]


def test_goes_back_to_each_of_the_newest_tokens() -> None:
    cache = made()
    feed(cache, range(20))
    for token in range(20, 33):
        feed(cache, [token])
    assert set(range(27, 34)) <= {*resumable(cache)}
    for position in (29, 28):
        cache.remove(0, position)
        assert newest(cache) == newest(cache, layer=1) == after((), range(position))
    feed(cache, [1, 2])
    cache.copy_prefix(0, 1, 29)
    assert newest(cache, 1) == after((), [*range(28), 1])


def test_one_call_for_each_layer() -> None:
    calls = []

    def counted(layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
        calls.append((layer, inputs[0].shape))
        return replay(layer, arrays, inputs)

    cache = made(replay=counted, interval=8)
    for token in range(7):
        feed(cache, [token])
    cache.remove(0, 5)
    assert calls == [(0, (1, 5)), (1, (1, 5))]
    assert newest(cache) == after((), range(5))


def test_the_end_of_a_long_block_is_enough() -> None:
    cache = made()
    cache.start_forward(Batch.run(0, 0, 50))
    assert 44 in cache.wanted()
    cache = made()
    feed(cache, range(50), m=6)
    assert set(range(44, 51)) <= {*resumable(cache)}
    cache.remove(0, 47)
    assert newest(cache) == after((), range(47))


def test_the_inputs_of_a_long_block_are_copied() -> None:
    cache = made()
    block = mx.ones((2, 100, 256))
    mx.eval(block)
    cache.start_forward(Batch.run(0, 0, 100))
    cache.put(mx.ones(1), inputs=[block[:, -6:]], row=1)
    assert cache.nbytes == cache.layer_nbytes(0, 0) == 4 + 6 * 256 * 4
    before = mx.get_active_memory()
    del block
    cache.start_forward(Batch.run(0, 100, 1))
    mx.synchronize()
    assert mx.get_active_memory() <= before - 150 * 1024


def test_rows_of_several_sequences_share_their_inputs() -> None:
    cache = made()
    batch = mx.array([[0, 0, 7], [4, 5, 6]])
    cache.start_forward(Batch([0, 0, 1, 2], [3, 8, 8, 8]))
    cache.put(*map(mx.array, after((), [7])), sequence=3, inputs=[batch[:, -1:]])
    cache.put(*map(mx.array, after((), [4, 5, 6])), sequence=8, inputs=[batch], row=1)
    cache.remove(8, 2)
    assert newest(cache, 8) == after((), [4, 5])
    shared = made()
    shared.start_forward(Batch([0, 0], [0, 1]))
    column = mx.array([[1], [2]])
    for sequence in (0, 1):
        shared.put(
            *map(mx.array, after((), [sequence + 1])), sequence=sequence, inputs=[column], row=sequence
        )
    assert shared.nbytes == 4 * 4 + column.nbytes


def test_inputs_must_be_known_for_all_layers() -> None:
    cache = made(interval=100)
    feed(cache, [1, 2, 3])
    with cache.forward(Batch.run(0, 3, 2)):
        cache.layer(0).put(*map(mx.array, after((), [1, 2, 3, 4, 5])), inputs=[mx.array([[4, 5]])])
    assert resumable(cache) == [0, 1, 2, 3, 5]
    assert cache.prepare_restore(0, 4) == 3
    # What is put again without inputs has none.
    with cache.forward(Batch.run(0, 5, 2)):
        for layer in (0, 1):
            cache.layer(layer).put(mx.array(0), mx.array(0), inputs=[mx.array([[4, 5]])])
        assert cache.can_resume(0, 6)
        cache.layer(0).put(mx.array(0), mx.array(0))
        assert not cache.can_resume(0, 6)


def test_an_error_of_replay_changes_nothing() -> None:
    def broken(layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
        if layer:
            raise KeyError
        return replay(layer, arrays, inputs)

    cache = made(replay=broken, interval=100)
    feed(cache, range(5))
    before = dict(cache._streams)
    calls: list[Callable[[], object]] = [
        lambda: cache.remove(0, 3),
        lambda: cache.copy_prefix(0, 1, 3),
        lambda: cache.mark(0, 3),
        lambda: cache.remove(0, 3, 4, recurrent="keep"),
        lambda: cache.remove(0, 3, 4, recurrent="replay"),
    ]
    for call in calls:
        with pytest.raises(KeyError):
            call()
        assert cache._streams == before
    cache._replay = lambda layer, arrays, inputs: (mx.ones(3),)
    with pytest.raises(ValueError, match=r"the state of layer 0 has \(axes, dtype\)"):
        cache.remove(0, 3)
    assert cache._streams == before


def test_decoding_does_not_grow() -> None:
    cache = made(rewind=20, interval=16, max_checkpoints=3, max_bytes=0)
    weights = mx.ones((8, 8)) * 0.01

    def run(layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
        state = arrays[0] if arrays else None
        for index in range(inputs[0].shape[1]):
            new = inputs[0][:, index]
            state = new if state is None else state @ weights + new
        return (state,)

    cache._replay = run
    sizes, memory = [], []
    for token in range(2000):
        with cache.forward(Batch.run(0, token, 1)):
            x = mx.full((1, 1, 8), float(token)) + 1
            for layer in range(3):
                cache.layer(layer).put(*run(layer, cache.layer(layer).get(), (x,)), inputs=(x,))
        mx.eval(cache.get())
        sizes.append(cache.nbytes)
        memory.append(mx.get_active_memory())
        stream = cache._streams[0]
        assert token + 1 - (stream.inputs[0].begin if stream.inputs else token) <= 20 + 16 + 1
        assert len(stream.states) <= 2 + 36 // 16 + 1
    assert max(sizes[200:]) == max(sizes[100:200])
    assert max(memory[200:]) <= max(memory[100:200]) + 64 * 1024
    expected = cache.newest(0, 0)
    cache.copy_prefix(0, 1, 1985)
    for token in range(1985, 2000):
        x = mx.full((1, 1, 8), float(token)) + 1
        with cache.forward(Batch.run(1, token, 1)):
            for layer in range(3):
                cache.layer(layer).put(*run(layer, cache.layer(layer).get(), (x,)))
    assert mx.allclose(array(cache.newest(0, 1)), array(expected))


def test_decoding_in_blocks_that_ignore_what_is_wanted_does_not_grow() -> None:
    cache = made(rewind=20, interval=16, max_checkpoints=0)
    for token in range(0, 600, 3):
        feed(cache, range(token, token + 3), wanted=False)
        stream = cache._streams[0]
        assert stream.end - (stream.inputs[0].begin if stream.inputs else 0) <= 20 + 16 + 2 * 3
        assert len(stream.states) <= 2 + (20 + 16) // 10 + 1
        assert set(range(max(0, stream.end - 20), stream.end + 1)) <= {*resumable(cache)}


def test_wrong_inputs() -> None:
    cache = made()
    feed(cache, [1, 2])
    cache.start_forward(Batch.run(0, 2, 2))
    state = [mx.array(0), mx.array(0)]
    one, before = mx.zeros((2, 2)), dict(cache._streams)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "layer 0 has 2 arrays as inputs, expected 1, as before", {"inputs": [one, one]}),
        (ValueError, "layer 5 has 0 arrays as inputs, expected 1 or more", {"layer": 5, "inputs": []}),
        (ValueError, r"are \[\(2, 3\)\].* same m, from 1 to 2, .* 2 tokens", {"inputs": [mx.zeros((2, 3))]}),
        (ValueError, r"are \[\(2, 0\)\]", {"inputs": [mx.zeros((2, 0))]}),
        (ValueError, r"are \[\(2,\)\]", {"inputs": [mx.zeros(2)]}),
        (ValueError, r"are \[\(1, 1\), \(1, 2\)\]", {"layer": 5, "inputs": (one[:1, :1], one[:1])}),
        (
            ValueError,
            r"row=2 of the inputs of layer 0 does not exist.* \[\(2, 2\)\]",
            {"inputs": [one], "row": 2},
        ),
        (ValueError, "row must be 0 or more, got -1", {"inputs": [one], "row": -1}),
        (ValueError, "without at=3|with at=3", {"inputs": [one], "at": 3}),
        (TypeError, "layer 0 must be a list or tuple of arrays, got mlx.core.array", {"inputs": one}),
        (TypeError, r"layer 0 must be .* arrays, got \['int', 'NoneType'\]", {"inputs": [3, None]}),
    ]
    for error, message, given in wrong:
        with pytest.raises(error, match=message):
            cache.layer(given.pop("layer", 0)).put(*state, **given)
        assert cache._streams == before


def test_rewind_needs_replay() -> None:
    with pytest.raises(
        ValueError, match="rewind=3 needs a function that computes states again: give replay="
    ):
        RecurrentCache(rewind=3)
    for options in ({"rewind": -1}, {"budget": -1}):
        with pytest.raises(ValueError, match="must be 0 or more, got -1"):
            RecurrentCache(replay=replay, **options)


def test_without_rewind_no_inputs_are_kept() -> None:
    cache = made(rewind=0)
    feed(cache, range(9))
    assert cache._streams[0].inputs == ()
    assert resumable(cache) == [0, 5, 9]


def test_marks() -> None:
    cache = made(interval=4, max_checkpoints=2)
    assert cache.mark(0, 0)
    assert cache.mark(0, 4)
    assert cache.end(0) == 0
    cache.check()
    feed(cache, [0, 1])
    cache.start_forward(Batch.run(0, 2, 4))
    assert cache.wanted() == (4,)
    cache.remove(0, 2)
    assert not cache._streams[0].marks
    assert cache.mark(0, 3)
    feed(cache, [2])
    for token in range(3, 40):
        feed(cache, [token])
    assert {3} <= {*resumable(cache)}
    assert not cache.mark(0, 22)
    assert cache.mark(0, 36)
    cache.copy_prefix(0, 1, 38)
    for sequence in (0, 1):
        for _ in range(12):
            feed(cache, [1, 1], sequence)
        assert {3, 36} <= {*resumable(cache, sequence)}
    # Only the newest two are marks.
    assert cache.mark(0, 70)
    assert cache._streams[0].marks == (36, 70)
    assert not cache.mark(0, 7)
    assert not made(max_checkpoints=0).mark(0, 3)
    with pytest.raises(ValueError, match="position must be 0 or more, got -2"):
        cache.mark(0, -2)


def test_a_mark_without_room_changes_nothing() -> None:
    cache = made(interval=100, max_checkpoints=9, max_bytes=0)
    feed(cache, range(5))
    before = dict(cache._streams)
    assert not cache.mark(0, 3)
    assert cache._streams == before


def test_marks_of_a_sequence_without_tokens() -> None:
    cache = made()
    assert cache.mark(0, 4)
    assert cache.prepare_restore(0, 3) == 0
    cache.copy_prefix(0, 1, 5)
    assert 1 not in cache._streams
    cache._plan_restore(2, cache._snapshot(0)).commit()
    assert cache._streams[2].marks == (4,)
    with pytest.raises(KeyError), cache.forward(Batch.run(0, 0, 2)):
        raise KeyError
    assert cache._streams[0].marks == (4,)
    cache.remove(0, 0, 0)
    assert cache._streams[0].marks == (4,)
    cache.remove(0, 0)
    assert 0 not in cache._streams


def checkpoints(cache: RecurrentCache, sequence: int) -> list[int]:
    return sorted(cache._streams[sequence].states)


def test_a_budget_for_all_sequences() -> None:
    """A state of two layers has 16 bytes."""
    cache = made(rewind=0, interval=1, budget=6 * 16)
    for sequence in (0, 1):
        for token in range(4):
            feed(cache, [token], sequence)
    assert (checkpoints(cache, 0), checkpoints(cache, 1)) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert cache.mark(0, 1)
    # Sequence 0 was used longest ago, and loses what is not marked first.
    feed(cache, [4], 1)
    assert len(checkpoints(cache, 0)) == 3
    before = dict(cache._streams)
    with pytest.raises(KeyError), cache.forward(Batch.run(1, 5, 1)):
        assert len(checkpoints(cache, 0)) == 2
        raise KeyError
    assert cache._streams == before
    feed(cache, [5], 1)
    assert checkpoints(cache, 0) == [1, 4]
    for token in range(6, 9):
        feed(cache, [token], 1)
    assert checkpoints(cache, 0) == [4]
    assert len(checkpoints(cache, 1)) == 7
    assert cache.can_resume(0, 4)


def test_a_budget_counts_shared_states_once() -> None:
    cache = made(rewind=0, interval=1, budget=4 * 16)
    for token in range(4):
        feed(cache, [token])
    for fork in (1, 2, 3):
        cache.copy_prefix(0, fork, 4)
    feed(cache, [9], 3)
    assert all(checkpoints(cache, sequence) == [1, 2, 3, 4] for sequence in (0, 1, 2))
    feed(cache, [9], 3)
    assert cache.nbytes <= 16 * (4 + 2)


def test_a_budget_leaves_what_going_back_needs() -> None:
    cache = made(interval=4, budget=0)
    for token in range(50):
        feed(cache, [token])
        assert set(range(max(0, token - 5), token + 2)) <= {*resumable(cache)}
    assert len(checkpoints(cache, 0)) <= 4


def test_removing_from_the_middle_is_refused_by_default() -> None:
    cache = made()
    feed(cache, range(9))
    defaults: list[dict[str, Any]] = [{}, {"recurrent": "refuse"}]
    for recurrent in defaults:
        with pytest.raises(NotSupportedError, match=r'unless recurrent="keep" .* or recurrent="replay"'):
            cache.remove(0, 3, 5, **recurrent)
    with pytest.raises(ValueError, match='must be one of "refuse", "keep", "replay", got \'forget\''):
        cache.remove(0, 3, 5, recurrent="forget")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got \\['keep'\\]"):
        CausalCache.remove(made_causal(), 0, 1, recurrent=["keep"])  # type: ignore[arg-type]


def made_causal() -> CausalCache:
    cache = CausalCache()
    cache.init(mx.float32)
    return cache


def test_removing_and_keeping_the_states() -> None:
    cache = made()
    for token in range(20):
        feed(cache, [token])
    cache.remove(0, 16, 18, recurrent="keep")
    assert cache.end(0) == 18
    assert newest(cache) == after((), range(20))
    assert {14, 15, 16, 17, 18} <= {*resumable(cache)}
    cache.copy_prefix(0, 1, 17)
    assert newest(cache, 1) == after((), range(19))
    cache.copy_prefix(0, 1, 16)
    assert newest(cache, 1) == after((), range(18))
    cache.copy_prefix(0, 1, 15)
    assert newest(cache, 1) == after((), range(15))
    feed(cache, [7])
    cache.remove(0, 17)
    assert newest(cache) == after((), range(19))


def test_keeping_the_states_without_replay() -> None:
    cache = made(replay=None, rewind=0)
    feed(cache, range(20))
    cache.remove(0, 3, 7, recurrent="keep")
    assert resumable(cache) == [0, 6, 11, 16]
    assert newest(cache) == after((), range(20))
    cache.remove(0, 0, 6, recurrent="keep")
    assert resumable(cache) == [0, 5, 10]
    cache.remove(0, 5)
    assert newest(cache) == after((), range(15))


def test_removing_and_computing_the_states_again() -> None:
    cache = made()
    for token in range(20):
        feed(cache, [token])
    cache.mark(0, 22)
    cache.remove(0, 15, 17, recurrent="replay")
    told = [*range(15), 17, 18, 19]
    assert newest(cache) == newest(cache, layer=1) == after((), told)
    assert {14, 15, 16, 17, 18} <= {*resumable(cache)}
    assert cache._streams[0].marks == (20,)
    cache.copy_prefix(0, 1, 17)
    assert newest(cache, 1) == after((), told[:17])
    feed(cache, range(50, 70))
    with pytest.raises(
        NotSupportedError,
        match=r'remove \[4, 6\) from sequence 0 of length 38: recurrent="replay" needs a state at 4 and the '
        r"inputs from 6 on, but the newest state before is at 0 and the inputs of \[\(.*\)\] are held",
    ):
        cache.remove(0, 4, 6, recurrent="replay")
    assert cache.end(0) == 38


def test_removing_from_all_children_of_a_wrapper() -> None:
    recurrent = RecurrentCache(4, replay=replay, rewind=8)
    cache = WrapperCache(CausalCache(add_offsets), recurrent)
    cache.init(mx.float32)
    for token in range(12):
        with cache.forward(Batch.run(0, token, 1)):
            cache.put(*coded([token]))
            cache.set_layer_type(1)
            cache.put(*map(mx.array, after(cache.get(), [token])), inputs=[mx.array([[token]])])
    with pytest.raises(NotSupportedError, match='recurrent="keep"'):
        cache.remove(0, 7, 9)
    cache.remove(0, 7, 9, recurrent="replay")
    assert [child.end(0) for child in cache._children] == [10, 10]
    assert numbers(recurrent.newest(0, 0)) == after((), [*range(7), 9, 10, 11])
    cache.remove(0, 7, 9, recurrent="keep")
    assert numbers(recurrent.newest(0, 0)) == after((), [*range(7), 9, 10, 11])


def test_a_loaded_sequence_reads_its_last_token_again(tmp_path: Path) -> None:
    cache = made(interval=100)
    for token in range(30):
        feed(cache, [token])
    save(tmp_path / "saved", cache, 0)
    for options in ({}, {"rewind": 0}, {"max_checkpoints": 0}):
        other = made(**options)
        load(tmp_path / "saved", other, 0)
        is_kept = options != {"rewind": 0} or other._max_checkpoints
        assert (29 in resumable(other)) == bool(is_kept)
        other.remove(0, 29)
        assert newest(other) == after((), range(29))
    assert not cache._streams[0].states.get(29)


def test_a_snapshot_in_memory_keeps_the_inputs() -> None:
    cache, other, none = made(interval=100), made(interval=100), made(rewind=0)
    feed(cache, range(10))
    for target in (other, none):
        target._plan_restore(3, cache._snapshot(0)).commit()
    assert set(range(4, 11)) <= {*resumable(other, 3)}
    assert resumable(none, 3) == [0, 4, 9, 10]
    other.remove(3, 6)
    assert newest(other, 3) == after((), range(6))


def test_layers_of_which_the_first_state_comes_late() -> None:
    """A state lacks them, so no sequence continues from there."""
    cache = made(interval=3)
    feed(cache, range(6), layers=[0])
    feed(cache, range(6, 8))
    assert resumable(cache) == [0, 8]
    cache.copy_prefix(0, 1, 7)
    assert resumable(cache, 1) == [0]


@pytest.mark.parametrize("wrong", [{"marks": (4, 2)}, {"marks": (1, 2, 3, 4, 5, 6)}, {"end": 5}])
def test_check_finds_what_cannot_be(wrong: dict[str, Any]) -> None:
    cache = made(max_checkpoints=5)
    feed(cache, range(6))
    cache.check()
    stream = cache._streams[0]
    cache._streams[0] = stream._replace(states={}, **wrong)
    with pytest.raises(AssertionError):
        cache.check()


def test_reserving_stores_no_inputs() -> None:
    cache = made()
    cache.start_forward(Batch.run(0, 0, 9), reserve=True)
    assert cache.wanted() == (3, 5)
    cache.put(mx.ones(3), inputs=[mx.ones((1, 9))])
    with pytest.raises(ValueError, match="from 1 to 9"):
        cache.put(mx.ones(3), inputs=[mx.ones((1, 10))])
    assert (cache.nbytes, cache.end(0)) == (0, 0)


def test_an_edit_in_the_middle_of_a_pass() -> None:
    """It ends the pass. The layers that were not put have no inputs there."""
    cache = made(interval=100)
    feed(cache, range(4))
    cache.start_forward(Batch.run(0, 4, 3))
    cache.layer(0).put(mx.array(7), mx.array(7), inputs=[mx.array([[4, 5, 6]])])
    cache.copy_prefix(0, 1, 7)
    assert resumable(cache) == resumable(cache, 1) == [0, 1, 2, 3, 4, 7]
    cache.remove(0, 4)
    feed(cache, range(4, 7))
    assert resumable(cache) == [*range(8)]
    assert newest(cache) == after((), range(7))


def test_closing_forgets_the_inputs() -> None:
    cache = made()
    feed(cache, range(4))
    cache.close()
    assert cache.nbytes == 0
    assert not cache._counts


@pytest.mark.parametrize("evaluates", [False, True])
def test_another_thread_goes_on(evaluates: bool) -> None:
    """It cannot compute copies of inputs that the first one has left lazy, but needs them to go back only."""
    cache = made()

    def first() -> None:
        feed(cache, range(20), m=6)
        stream = cache._streams[0]
        mx.eval([state for position in stream.states for state in stream.states[position][0]])
        mx.eval([state for position in stream.states for state in stream.states[position][1]])
        if evaluates:
            mx.eval(stream.written)

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    feed(cache, [20])
    assert newest(cache) == after((), range(21))
    if evaluates:
        cache.remove(0, 17)
        assert newest(cache) == after((), range(17))
