"""Describes the contents of a cache file as text.

Supports this package's files, and files of mlx-lm's `save_prompt_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CacheFileError
from .container import Contents, Entry, NotOursError, faults_of, read_arrays, read_contents, read_outline
from .header import short
from .schema import codec_fields, integer, layer_index, listing, mapping

WIDTH = 64
"""The width of a picture in characters."""
FLOAT, PACKED, GONE = "█", "▒", "·"

_ARRAYS = 8
"""The most arrays that are listed for a layer."""


def shown(path: Path, verify: bool = True) -> Iterator[str]:
    """Yield lines of text that describe a file, with a picture of the stored tokens.

    Raises CacheFileError if the file cannot be read, is corrupt, or is not a saved cache. Arrays are only
    read to `verify` them.
    """
    try:
        contents = read_contents(path)
    except NotOursError:
        yield from _shown_of_mlx_lm(path)
        return
    if verify:
        for _ in read_arrays(contents):
            pass
    checked = "all checksums match" if verify else "only the header was verified"
    yield f"{path}: {contents.size:,} bytes, {len(contents.entries)} arrays, {checked}"
    with faults_of(path):
        header = contents.header
        end = integer(header.get("end"), "end")
        stored = "stored" if header.get("has_tokens") is True else "not stored"
        yield f"tokens    {end:,}, token IDs {stored}"
        yield from _table("model", header.get("model"))
        yield from _table("options", header.get("options"))
        for index, cache in enumerate(listing(header.get("caches"), "caches")):
            yield ""
            yield from _cache(mapping(cache, "a cache"), end, f"{index}.", contents.entries)


def check_prompt_cache(contents: Contents) -> None:
    """Raise CacheFileError unless `save_prompt_cache` of mlx-lm 0.31 or 0.32 wrote a safetensors file."""
    if "2.0" not in contents.header:
        raise CacheFileError(
            contents.path,
            "a safetensors file without a prompt cache, such as a model's weights or adapters; expected a "
            "file written by PromptCache.save or by mlx-lm's save_prompt_cache",
        )


def _shown_of_mlx_lm(path: Path) -> Iterator[str]:
    """Describe a file of mlx-lm: the class and arrays of each layer.

    Both versions name arrays by layer. mlx-lm 0.31 writes the layers' numbers under "0.", the user's
    metadata under "1.", and class names under "2.". mlx-lm 0.32 writes the user's metadata under "0.",
    class names under "1.", and an empty "2.0".
    """
    contents = read_outline(path)
    check_prompt_cache(contents)
    metadata, entries = contents.header, contents.entries
    yield (
        f"{path}: {contents.size:,} bytes, {len(entries)} arrays, "
        "written by mlx-lm's save_prompt_cache (no checksums)"
    )
    is_old = bool(metadata["2.0"])
    added, classes = ("1.", "2.") if is_old else ("0.", "1.")
    layers = {n[2:]: value for n, value in metadata.items() if n.startswith(classes) and n[2:].isdecimal()}
    told = (_tokens(contents, layer, str(kind), is_old) for layer, kind in layers.items())
    yield f"tokens    {next((n for n in told if n is not None), 'unknown')}"
    for name, value in metadata.items():
        if name.startswith(added):
            yield f"metadata  {short(name[2:])}: {short(value)}"
    yield ""
    of_layer: dict[str, list[str]] = {}
    for place, entry in sorted(entries.items()):
        if entry.shape:
            of_layer.setdefault(place.partition(".")[0], []).append(f"{entry.dtype} {list(entry.shape)}")
    texts = {}
    for layer, kind in layers.items():
        arrays = of_layer.get(layer, ["no arrays"])[:_ARRAYS]
        texts[layer] = ", ".join([short(kind).replace("'", ""), *arrays])
    with faults_of(path):
        yield from _grouped(texts)


def _tokens(contents: Contents, layer: str, kind: str, is_old: bool) -> str | None:
    """Return the number of tokens in a layer of mlx-lm's file, or None if the layer does not store it."""
    if is_old:
        place = {"RotatingKVCache": f"0.{layer}.2", "QuantizedKVCache": f"0.{layer}.0"}.get(kind)
        keys = contents.entries.get(f"{layer}.0")
        if place:
            return short(contents.header.get(place)).replace("'", "")
        return f"{keys.shape[2]:,}" if kind == "KVCache" and keys and len(keys.shape) == 4 else None
    name = f"{layer}.2"
    offset = contents.entries.get(name)
    if not kind.endswith("KVCache") or offset is None or (offset.dtype, offset.shape) != ("I32", ()):
        return None
    [(_, stored)] = read_arrays(contents, [name], verify=False)
    return f"{int.from_bytes(stored.data.tobytes(), 'little', signed=True):,}"


def _table(title: str, told: Any) -> Iterator[str]:
    for name, value in mapping(told, title).items():
        # "head" describes the re-based keys before a removed range: internal, and long.
        if name != "head" and value is not None:
            yield f"{title:9} {name}: {short(value)}"


def _cache(cache: Mapping[str, Any], end: int, prefix: str, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Describe one cache of the file: its kind, its layers and its stored tokens."""
    size = sum(entry.end - entry.begin for name, entry in entries.items() if name.startswith(prefix))
    sizes = [f"{name} {short(cache[name])}" for name in ("size", "sinks") if cache.get(name)]
    yield f"{short(cache.get('kind'))} {' '.join(sizes)}: {size:,} bytes".replace("'", "").replace(" :", ":")
    for index, child in enumerate(cache.get("children") or ()):
        yield from _cache(mapping(child, "a child"), end, f"{prefix}{index}.", entries)
    if "runs" in cache:
        yield from _layers(mapping(cache.get("layers"), "layers"))
        yield from _runs(listing(cache["runs"], "runs"), end)
    elif "states" in cache:
        states = [mapping(state, "a state") for state in listing(cache["states"], "states")]
        at = [integer(state.get("position"), "position of a state", 1, end) for state in states]
        picture = [GONE] * WIDTH
        for position in at:
            picture[min(WIDTH - 1, position * WIDTH // max(1, end))] = FLOAT
        yield f"  {''.join(picture)}  states after {', '.join(map(str, at))} tokens"


def _layers(layers: Mapping[str, Any]) -> Iterator[str]:
    texts = {}
    for name, layer in layers.items():
        form = mapping(layer, "a layer")
        dims, dtypes, codecs = (listing(form.get(key), key, 2) for key in ("dims", "dtypes", "codecs"))
        slots = [
            f"{what} {short(dim)} wide in {_storage(dtype, codec)}"
            for what, dim, dtype, codec in zip(("keys", "values"), dims, dtypes, codecs, strict=True)
        ]
        texts[name] = f"{short(form.get('heads'))} heads, {', '.join(slots)}"
    yield from _grouped(texts)


def _grouped(texts: Mapping[str, str]) -> Iterator[str]:
    """Describe layers by name, one line for all layers with the same text."""
    layers: dict[str, list[int]] = {}
    for name, text in texts.items():
        layers.setdefault(text, []).append(layer_index(name))
    for text, numbers in layers.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and runs[-1][-1] + 1 == number:
                runs[-1].append(number)
            else:
                runs.append([number])
        spelled = (f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        yield f"  layers {', '.join(spelled)}: {text}"


def _storage(dtype: Any, codec: Any) -> str:
    if codec is None:
        return str(dtype)
    bits, group_size, *more = codec_fields(codec)
    how = "".join(f"transform {short(name)}, " for name in more[:1]) + "centered, " * (len(more) > 1)
    return f"{short(bits)} bits ({how}groups of {short(group_size)}, from {dtype})"


def _runs(runs: list[Any], end: int) -> Iterator[str]:
    picture, told = [GONE] * WIDTH, list[tuple[int, int, str]]()
    for run in runs:
        own = mapping(run, "a run")
        begin = integer(own.get("begin"), "begin of a run", 0, end)
        length = integer(own.get("length"), "length of a run", 1, end - begin)
        is_packed = own.get("packed") is True
        for place in range(begin * WIDTH // end, max(1, -(-(begin + length) * WIDTH // end))):
            picture[place] = PACKED if is_packed else FLOAT
        way = "quantized" if is_packed else "float"
        # Long runs are in chunks.
        first = told.pop()[0] if told and told[-1][1:] == (begin, way) else begin
        told.append((first, begin + length, way))
    text = ", ".join(f"[{begin}, {stop}) {way}" for begin, stop, way in told)
    yield f"  {''.join(picture)}  {text or 'no tokens stored'}"
