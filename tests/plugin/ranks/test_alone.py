"""What needs no second rank: files and groups of a single one, and what ranks say in words."""

from __future__ import annotations

import pickle
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kvcache import CacheFileError, RanksDisagreeError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from mlx_kvcache.plugin.ranks import ALONE, RECORD, by_rank, decoded, encoded, ranks_of, told_tokens
from tests.plugin.tiny import tiny_llama


def test_a_group_of_one_compares_nothing(tmp_path: Path) -> None:
    group, model = mx.distributed.init(), tiny_llama()
    assert group.size() == 1 and ranks_of(group) is ALONE
    cache = make_prompt_cache(model, group=group)
    assert cache.pool is make_prompt_cache(model).pool
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    path = tmp_path / "chat.safetensors"
    cache.save(path)
    assert PromptCache.load(path, model, group=group).position == 3


def test_what_is_no_group() -> None:
    with pytest.raises(TypeError, match="group must be returned by"):
        make_prompt_cache(tiny_llama(), group=2)  # type: ignore[arg-type]


def test_a_rank_s_file_is_for_that_rank(tmp_path: Path) -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    prepared = cache._prepared(None, None)
    path = tmp_path / "chat.rank1of4.safetensors"
    prepared.header["options"]["ranks"] = {"rank": 1, "size": 4, "save": "0"}
    prepared.write(path)
    with pytest.raises(CacheFileError, match="belongs to rank 1 of 4, but this is rank 0 of 1"):
        PromptCache.load(path, model)
    prepared.header["options"]["ranks"] = [1, 4]
    prepared.write(path)
    with pytest.raises(CacheFileError, match="option ranks"):
        PromptCache.load(path, model)


def test_a_record_holds_what_fits() -> None:
    record = bytes(encoded("é" * 1000, "fed\0more", "why"))
    assert len(record) == RECORD
    told, other = decoded(record), decoded(bytes(encoded("é" * 999, "fed\0more", "why")))
    assert told.about == other.about == "é" * 200
    assert told.keys[0] != other.keys[0] and told.keys[1] == other.keys[1]
    assert (told.fed, told.fault) == ("fed more", "why")


def test_ranks_that_say_the_same_are_named_together() -> None:
    assert (
        by_rank(["a", "a", "b", "a"], "is about to")
        == "ranks 0, 1 and 3 are about to a; rank 2 is about to b"
    )
    assert by_rank(["", "x", "x"], "was fed") == "rank 0 was fed nothing; ranks 1 and 2 were fed x"
    assert by_rank(["x", "x"], "was fed") == "each rank was fed x, which differs in the part not shown"


def test_all_tokens_are_in_what_is_told() -> None:
    first, second = mx.arange(100), mx.concatenate([mx.arange(99), mx.array([7])])
    assert told_tokens(first) != told_tokens(second)
    assert told_tokens(first).startswith("[0, 1, 2, 3, 4, 5, 6, 7, ...] of 100 tokens")
    assert told_tokens(mx.array([[3, 4]])) == "[3, 4]"


def test_the_error_survives_a_pickle() -> None:
    told = RanksDisagreeError("ranks disagree", ("a", "b"))
    error = pickle.loads(pickle.dumps(told))  # noqa: S301
    assert (str(error), error.told) == ("ranks disagree", ("a", "b"))
