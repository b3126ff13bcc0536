"""Runs that two texts have in common, beside the best that any choice of runs can keep."""

from __future__ import annotations

from random import Random

import pytest

from mlx_kvcache.alignment import Run, common_runs


def changed(random: Random, text: list[int], changes: int, longest: int, vocabulary: int) -> list[int]:
    for _ in range(changes):
        begin, n = random.randrange(len(text) + 1), random.randint(1, longest)
        new = [random.randrange(vocabulary) for _ in range(random.choice([0, n]))]
        text = text[:begin] + new + text[begin + random.choice([0, n]) :]
    return text


def most_kept(before: list[int], after: list[int], min_run: int) -> int:
    """The most tokens that runs of this length can keep in order, by trying all."""
    rows = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
    best = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
    for i in reversed(range(len(before))):
        for j in reversed(range(len(after))):
            rows[i][j] = rows[i + 1][j + 1] + 1 if before[i] == after[j] else 0
            lengths = range(min_run, rows[i][j] + 1)
            best[i][j] = max(best[i + 1][j], best[i][j + 1], *(n + best[i + n][j + n] for n in lengths), 0)
    return best[0][0]


def assert_rise(before: list[int], after: list[int], runs: list[Run], min_run: int) -> None:
    ends = (0, 0)
    for run in runs:
        begin, place, n = run
        assert begin >= ends[0] and place >= ends[1] and (n >= min_run or run.is_prefix)
        assert before[begin : begin + n] == after[place : place + n]
        ends = begin + n, place + n


@pytest.mark.parametrize("vocabulary", [2, 5, 1000])
def test_beside_the_best(vocabulary: int) -> None:
    """Runs are equal, in order and long enough; of texts without repetitions they are all there are."""
    kept, best = 0, 0
    for seed in range(150):
        random = Random(seed)
        before = [random.randrange(vocabulary) for _ in range(random.randrange(40))]
        after = changed(random, before, random.randrange(4), 8, vocabulary)
        min_run = random.choice([1, 2, 4, 6])
        runs = common_runs(before, after, min_run)
        assert_rise(before, after, runs, min_run)
        kept += sum(run.length for run in runs if run.length >= min_run)
        best += most_kept(before, after, min_run)
    assert kept == best if vocabulary == 1000 else 0.93 * best <= kept <= best


def test_long_texts_with_many_changes() -> None:
    random = Random(1)
    before = [random.randrange(50000) for _ in range(20_000)]
    after = changed(random, before, 20, 200, 50000)
    runs = common_runs(before, after, 64)
    assert_rise(before, after, runs, 64)
    kept = sum(run.length for run in runs)
    assert len(after) - kept <= 20 * (200 + 64) and len(runs) <= 21


def test_repeated_texts() -> None:
    line = [1, 2, 3, 4]
    assert common_runs(line * 500, [*line * 200, 9, *line * 250], 64) == [(0, 0, 800), (1000, 801, 1000)]
    assert common_runs([1] * 100, [1] * 70 + [2] * 100, 64) == [(0, 0, 70)]
    table = [token for row in range(50) for token in (row % 7, 8, 9)] * 4
    runs = common_runs(table, [5, *table[30:300], 6, *table[400:]], 20)
    assert_rise(table, [5, *table[30:300], 6, *table[400:]], runs, 20)
    assert sum(run.length for run in runs) >= 400


def test_order_is_kept() -> None:
    """Of two blocks that change places, one is kept: the longer."""
    one, other = list(range(100)), list(range(100, 300))
    assert common_runs([0, *one, *other], [1, *other, *one], 64) == [(101, 1, 200)]


def test_short_runs_and_empty_texts() -> None:
    assert common_runs([], [], 1) == common_runs([1], [], 1) == common_runs([], [1], 1) == []
    assert common_runs([1, 2, 3, 4], [1, 9, 3, 4], 3) == [(0, 0, 1)]
    assert common_runs([1, 2, 3, 4], [1, 9, 3, 4], 2) == [(0, 0, 1), (2, 2, 2)]
    assert common_runs([1, 2], [1, 2], 64) == [(0, 0, 2)]


def test_numbers_of_any_size() -> None:
    """The keys of pictures stand among tokens, and may have more bits than NumPy's integers."""
    random = Random(2)
    before = [random.choice([-1, 0, 1]) * 2 ** random.randrange(200) for _ in range(300)]
    after = [*before[:9], 2**90, *before[14:]]
    assert common_runs(before, after, 8) == [Run(0, 0, 9), Run(14, 10, 286)]
