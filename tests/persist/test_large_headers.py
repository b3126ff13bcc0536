"""Heads that would take long to parse are refused before they are parsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import CacheFileError, CausalCache
from mlx_kvcache.persist import load
from mlx_kvcache.persist.container import Stored, read_contents, write

from .samples import stored
from .test_damage import metadata, with_fields, with_text

MB = 1 << 20

MANY = "commas, brackets and quotation marks; the limit is 500,000"
DEEP = r"nested [\d,]+ levels deep; the limit is 64"


def of(part: str, n: int = 4 * MB) -> str:
    """A list of the same part over and over."""
    return "[" + ",".join([part] * (n // (len(part) + 1))) + "]"


TEXTS: dict[str, tuple[str, str]] = {
    "lists": (of("[]"), MANY),
    "objects": (of("{}"), MANY),
    "lists in lists": (of("[[[[]]]]"), MANY),
    "numbers": (of("1"), MANY),
    "strings": (of('""'), MANY),
    "keys": ("{" + ",".join(f'"{i:x}":1' for i in range(600_000)) + "}", MANY),
    "deep lists": ("[" * 65, DEEP),
    "very deep lists": ("[" * 400_000, DEEP),
    "deep objects": ('{"a":' * 65, DEEP),
    "deep behind a bracket in a string": ('["]]]]",' + "[" * 65, DEEP),
    "deep behind a string with an escaped end": ('["\\\\","\\"]]]]",' + "[" * 65, DEEP),
    "quotation marks": ('"' * 2_000_000, MANY),
    "too long": (of("1" * 1000, 17 * MB), "corrupt file: header length is"),
}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what the parser of JSON is given."""
    sizes: list[int] = []

    def loads(text: str, **options: Any) -> Any:
        sizes.append(len(text))
        return parse(text, **options)

    parse = json.loads
    monkeypatch.setattr(json, "loads", loads)
    return sizes


def readers(path: Path) -> list[Callable[[], object]]:
    cache = CausalCache()
    cache.init(mx.float32, capacity=8)
    found: list[Callable[[], object]] = [lambda: load(path, cache, 0)]
    if find_spec("mlx_lm"):
        from mlx_kvcache.plugin import PromptCache
        from tests.plugin.tiny import tiny_llama

        model = tiny_llama(num_hidden_layers=1)
        found.append(lambda: PromptCache.load(path, model))
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_a_head_that_is_too_much_is_not_parsed(name: str, path: Path, parsed: list[int]) -> None:
    """Whether it is ours, or of another writer."""
    text, message = TEXTS[name]
    path.write_bytes(with_text(path.read_bytes(), b'{"a":' + text.encode() + b"}"))
    for read in readers(path):
        with pytest.raises(CacheFileError, match=message):
            read()
    assert parsed == []


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("place", ["header", "checksums"])
def test_nor_is_json_inside_it(name: str, place: str, path: Path, parsed: list[int]) -> None:
    text, message = TEXTS[name]
    path.write_bytes(with_fields(path.read_bytes(), metadata(place, text)))
    parsed.clear()
    for read in readers(path):
        with pytest.raises(CacheFileError, match=message):
            read()
    assert all(size < 1000 or size > len(text) for size in parsed)


def test_the_largest_head_that_is_read(tmp_path: Path) -> None:
    """Tens of thousands of arrays; and none is written that could not be read."""
    array = stored("U8", 1)
    arrays = {f"0.0.{i}.keys.scales": array for i in range(15_000)}
    write(tmp_path / "a", {"text": "[" * 1000}, arrays)
    assert len(read_contents(tmp_path / "a").entries) == len(arrays)
    more: dict[str, Stored] = {str(i): array for i in range(40_000)}
    with pytest.raises(CacheFileError, match=r"the header has .* commas"):
        write(tmp_path / "a", {}, more)
    deep: Any = []
    for _ in range(64):
        deep = [deep]
    with pytest.raises(CacheFileError, match="metadata field 'header' is nested 66 levels deep"):
        write(tmp_path / "a", {"deep": deep}, {})
    assert len(read_contents(tmp_path / "a").entries) == len(arrays)
