"""A radix tree over tokens: finds stored sequences that share the longest prefix, or text, with a given one.

Each edge holds several tokens (D. R. Morrison, PATRICIA, JACM 1968).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

V = TypeVar("V")

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""The text of a token that stands for a byte."""


@dataclass
class _Node(Generic[V]):
    """A node, with the tokens on the edge from its parent, and its children by their first token."""

    edge: tuple[int, ...] = ()
    value: V | None = None
    children: dict[int, _Node[V]] = field(default_factory=dict)


class PrefixTree(Generic[V]):
    """A mapping from token sequences to values that also finds shared prefixes. Values must not be None."""

    def __init__(self) -> None:
        self._root: _Node[V] = _Node()

    def __bool__(self) -> bool:
        """Whether the tree holds a value."""
        return self._root.value is not None or bool(self._root.children)

    def put(self, tokens: Sequence[int], value: V) -> V | None:
        """Stores a value. Returns the value that it replaces, or None."""
        node, rest = self._root, tuple(tokens)
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                child = node.children[rest[0]] = _Node(rest)
            common = shared_length(child.edge, rest)
            if common < len(child.edge):
                # Split the edge after the shared tokens.
                upper = _Node(rest[:common], None, {child.edge[common]: child})
                child.edge, node.children[rest[0]] = child.edge[common:], upper
                child = upper
            node, rest = child, rest[common:]
        before, node.value = node.value, value
        return before

    def get(self, tokens: Sequence[int]) -> V:
        """Returns the value of exactly these tokens. Raises KeyError if there is none."""
        value = self._path(tokens)[-1].value
        assert value is not None
        return value

    def pop(self, tokens: Sequence[int]) -> V:
        """Removes and returns the value of exactly these tokens. Raises KeyError if there is none."""
        path = self._path(tokens)
        value, path[-1].value = path[-1].value, None
        assert value is not None
        # Remove empty leaves, and merge a node left with one child into it.
        while len(path) > 1 and path[-1].value is None and not path[-1].children:
            del path[-2].children[path.pop().edge[0]]
        node = path[-1]
        if len(path) > 1 and node.value is None and len(node.children) == 1:
            [only] = node.children.values()
            only.edge = node.edge + only.edge
            path[-2].children[only.edge[0]] = only
        return value

    def matches(self, tokens: Sequence[int]) -> Iterator[tuple[int, V]]:
        """Yields (length of the shared prefix, value), the longest prefix first.

        Yields all values whose tokens are a prefix of `tokens`, and all that share the longest prefix but
        differ from `tokens` after it or go beyond them. A value that shares no token is not yielded,
        except the one of the empty sequence.
        """
        node, rest, depth = self._root, tuple(tokens), 0
        above: list[tuple[int, V]] = []
        while True:
            if node.value is not None:
                above.append((depth, node.value))
            child = node.children.get(rest[0]) if rest else None
            if child is None:
                # The node itself is in `above`; its children differ from the tokens here.
                below = list(node.children.values())
                break
            common = shared_length(child.edge, rest)
            depth += common
            if common < len(child.edge):
                below = [child]
                break
            node, rest = child, rest[common:]
        while depth and below:
            found = below.pop()
            if found.value is not None:
                yield depth, found.value
            below += found.children.values()
        yield from reversed(above)

    def retokenized(self, tokens: Sequence[int], text_of: Callable[[int], str]) -> list[int]:
        """Returns tokens of the same text that begin with those of a stored sequence, as far as texts agree.

        Both sequences must have a border between tokens where the stored tokens end, so the tokens after it
        stay as they are. Returns the same tokens if no stored ones go further than they do.

        Args:
            text_of: the text of a token. Two sequences are the same text if their joined texts are equal.
        """
        given = tuple(tokens)
        best, begin = 0, given[:0]
        # Nodes to visit, with the tokens before them, the number of given tokens that are matched, and
        # the text by which the stored tokens are ahead of these.
        above: list[tuple[_Node[V], tuple[int, ...], int, str]] = [(self._root, (), 0, "")]
        while above:
            node, before, k, ahead = above.pop()
            i, border, window = 0, (0, 0), 16
            while i < len(node.edge) and k < len(given):
                if not ahead and (same := shared_length(node.edge[i : i + window], given[k : k + window])):
                    # Runs of equal tokens may be long, but are copied to be compared.
                    i, k, window = i + same, k + same, window * 4
                else:
                    window = 16
                    ahead, i = ahead + text_of(node.edge[i]), i + 1
                    while ahead and k < len(given) and ahead.startswith(text := text_of(given[k])):
                        ahead, k = ahead[len(text) :], k + 1
                    if ahead and not (k < len(given) and text_of(given[k]).startswith(ahead)):
                        break
                if not ahead:
                    border = k, i
            else:
                path = before + node.edge
                above += [(child, path, k, ahead) for child in node.children.values()]
            k, i = border
            # Of two that go equally far, the given tokens are taken.
            if k > best or (k == best and before + node.edge[:i] == given[:k]):
                best, begin = k, before + node.edge[:i]
        return [*begin, *given[best:]]

    def _path(self, tokens: Sequence[int]) -> list[_Node[V]]:
        """The nodes from the root to the value of exactly these tokens. Raises KeyError if there is none."""
        path, rest = [self._root], tuple(tokens)
        while rest:
            child = path[-1].children.get(rest[0])
            if child is None or rest[: len(child.edge)] != child.edge:
                break
            path.append(child)
            rest = rest[len(child.edge) :]
        if rest or path[-1].value is None:
            raise KeyError(f"no value is stored for these {len(tokens)} tokens")
        return path


class Tokenizer(Protocol):
    """A tokenizer of Hugging Face's Transformers, or one like it."""

    def decode(self, token_ids: list[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> Any: ...


class Texts:
    """The text of each token of a tokenizer, such that equal joined texts are the same text.

    Special tokens and single bytes are a text of their own, which no other token has: a model that spells a
    special token with letters has not generated it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._own = {
            *getattr(tokenizer, "all_special_ids", ()),
            *getattr(tokenizer, "added_tokens_decoder", ()),
        }
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            try:
                text = self._tokenizer.convert_ids_to_tokens(token)
            except (IndexError, KeyError, OverflowError):
                # A number that stands for a picture.
                text = None
            is_shared = isinstance(text, str) and token not in self._own and not BYTE.fullmatch(text)
            self._known[token] = text if is_shared else f"\0{token}\0"
        return self._known[token]

    def retokenized(self, tokens: Sequence[int], tree: PrefixTree[Any]) -> list[int]:
        """Return tokens of the same text that go on from a stored sequence as far as possible.

        See `PrefixTree.retokenized`.
        """
        given = list(tokens)
        found = tree.retokenized(given, self.__getitem__)
        if found != given:
            begin = shared_length(found, given)
            end = -shared_length(found[:begin:-1], given[:begin:-1]) or None
            decode = self._tokenizer.decode
            if decode(found[begin:end]) != decode(given[begin:end]):
                return given
        return found


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the shared prefix of two sequences of one type."""
    shared, end = 0, min(len(one), len(other))
    # Halves are compared as slices, which is much faster than token by token.
    while shared < end:
        middle = (shared + end + 1) // 2
        if one[shared:middle] == other[shared:middle]:
            shared = middle
        else:
            end = middle - 1
    return shared
