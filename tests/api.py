"""What is public, as text: every name of the public modules with its signature.

`python -m tests.api` writes tests/api.txt anew, after a change that is meant.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = ("mlx_kvcache", "mlx_kvcache.persist", "mlx_kvcache.plugin", "mlx_kvcache.sessions")
RECORD = Path(__file__).with_name("api.txt")
_OWN = "mlx_kvcache"


def lines() -> Iterator[str]:
    """One for each name, and one for each member of a class, below the name of its module."""
    for name in MODULES:
        module = importlib.import_module(name)
        yield f"# {name}"
        for public in sorted(module.__all__):
            yield from _lines_of(public, getattr(module, public))


def _lines_of(name: str, thing: Any) -> Iterator[str]:
    if not isinstance(thing, type):
        yield f"{name}{_signature(thing)}" if callable(thing) else f"{name}: {type(thing).__name__}"
        return
    bases = ", ".join(base.__name__ for base in thing.__mro__[1:-1] if _is_public(base))
    yield f"class {name}{f' <- {bases}' if bases else ''}"
    is_made_here = any("__init__" in vars(base) or "__new__" in vars(base) for base in _own_bases(thing))
    if is_made_here and not getattr(thing, "_is_protocol", False):
        yield f"  {name}{_signature(thing)}"
    for member in sorted(set(_members(thing))):
        yield f"  .{member}{_member(thing, member)}"


def _is_public(base: type) -> bool:
    return base.__module__ == "builtins" or (
        base.__module__.startswith(_OWN) and hasattr(importlib.import_module(_OWN), base.__name__)
    )


def _own_bases(own: type) -> Iterator[type]:
    return (base for base in own.__mro__ if base.__module__.startswith(_OWN))


def _members(own: type) -> Iterator[str]:
    """Public names that this package defines in a class, inherited ones and annotated ones included."""
    for base in _own_bases(own):
        for name in (*vars(base), *getattr(base, "__annotations__", ())):
            if not name.startswith("_") or name in {"__enter__", "__len__", "__iter__"}:
                yield name


def _member(own: type, name: str) -> str:
    member = inspect.getattr_static(own, name, None)
    if isinstance(member, (classmethod, staticmethod)):
        return f"{_signature(member.__func__)} [{type(member).__name__}]"
    if inspect.isfunction(member):
        return _signature(member)
    if isinstance(member, property):
        assert member.fget
        returned = _text(inspect.signature(member.fget).return_annotation)
        return f": {returned} [property{', can be set' if member.fset else ''}]"
    annotations = map(inspect.get_annotations, own.__mro__)
    return next((f": {_text(found[name])}" for found in annotations if name in found), "")


def _signature(thing: Any) -> str:
    """As it is written, however this Python shows it."""
    found = inspect.signature(thing)
    parts: list[str] = []
    may_be_by_place = True
    for parameter in found.parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and may_be_by_place:
            parts.append("*")
        may_be_by_place = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        parts.append(_parameter(parameter))
    returned = "" if isinstance(thing, type) else f" -> {_text(found.return_annotation)}"
    return f"({', '.join(parts)}){returned}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        text = ("*" if parameter.kind == parameter.VAR_POSITIONAL else "**") + text
    if parameter.annotation is not parameter.empty:
        text += f": {_text(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default(parameter.default)}"
    return text


def _default(value: Any) -> str:
    """Functions by name: their repr has an address."""
    if value is Ellipsis:
        return "..."
    return str(value.__name__) if inspect.isfunction(value) else repr(value)


def _text(annotation: Any) -> str:
    """An annotation as it is in the source."""
    if isinstance(annotation, str):
        return annotation
    return str(getattr(annotation, "__forward_arg__", None) or getattr(annotation, "__name__", annotation))


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m tests.api", description=f"Writes {RECORD.name} anew."
    ).parse_args()
    RECORD.write_text("\n".join(lines()) + "\n", encoding="utf-8")
