"""Thinking in replies: each way in which models mark it, whole and in parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from examples.chat.thinking import MARKS, TURN, Marks, begun_by, marks_of, may_begin, parted


@pytest.mark.parametrize("marks", MARKS)
def test_thinking_is_parted_from_the_answer(marks: Marks) -> None:
    begin, end = marks
    between = TURN if "channel" in begin else ""
    reply = f"\n{begin}one\ntwo{between}{end}\n\nThree."
    assert parted(reply) == ("one\ntwo", "Three.")
    assert parted(f"{begin}one") == ("one", "")
    assert parted(f"{end}Three.") == ("", "Three.")
    assert parted(f"It writes {begin}so{end}.") == ("", f"It writes {begin}so{end}.")
    for length in range(len(begin)):
        assert may_begin(reply[: 1 + length]), "the mark may be in several tokens"
    assert not may_begin("One") and not may_begin(f"{begin}one")


def test_what_the_tokenizer_knows_comes_first() -> None:
    tokenizer = SimpleNamespace(has_thinking=True, think_start="<ponder>", think_end="</ponder>")
    assert marks_of(tokenizer)[0] == Marks("<ponder>", "</ponder>")
    assert parted("<ponder>a</ponder>b", marks_of(tokenizer)) == ("a", "b")
    assert marks_of(SimpleNamespace(has_thinking=False)) == MARKS


def test_a_template_may_begin_the_thinking() -> None:
    assert begun_by("<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert begun_by("<|im_start|>assistant\n") == ""
    assert begun_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "", "it has ended"
