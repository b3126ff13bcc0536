"""Separates what a model thinks before it answers from its answer."""

from __future__ import annotations

from typing import Any, NamedTuple


class Marks(NamedTuple):
    """The texts before and after the thinking, which a reply begins with."""

    begin: str
    end: str


MARKS = (
    Marks("<think>", "</think>"),
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""The marks of models that are not loaded now, or of which mlx-lm's tokenizer knows no marks."""

TURN = "<|end|><|start|>assistant"
"""What gpt-oss writes between its thinking and the mark of its answer."""


def marks_of(tokenizer: Any) -> tuple[Marks, ...]:
    """The marks to look for with a model, first those that mlx-lm's tokenizer knows."""
    own = (Marks(tokenizer.think_start, tokenizer.think_end),) if tokenizer.has_thinking else ()
    return (*own, *MARKS)


def parted(text: str, marks: tuple[Marks, ...] = MARKS) -> tuple[str, str]:
    """The thinking at the beginning of a reply, and the answer; no answer if the thinking has not ended."""
    begun = text.lstrip()
    for begin, end in marks:
        # A reply that begins with the end mark has no thinking.
        if begun.startswith((begin, end)):
            thought, _, answer = begun.removeprefix(begin).partition(end)
            return thought.removesuffix(TURN).strip(), answer.lstrip()
    return "", text


def may_begin(text: str, marks: tuple[Marks, ...] = MARKS) -> bool:
    """Whether a reply that begins with this text may turn out to begin with a mark."""
    return any(mark.startswith(text.strip()) for pair in marks for mark in pair)


def begun_by(prompt: str, marks: tuple[Marks, ...] = MARKS) -> str:
    """The mark at the end of a prompt that begins the thinking of the reply, with the space after it."""
    end = prompt.rstrip()
    begin = next((begin for begin, _ in marks if end.endswith(begin)), "")
    return prompt[len(end) - len(begin) :] if begin else ""
