"""What can be set, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from examples.chat.settings import Settings


def test_there_and_back() -> None:
    settings = Settings(capacity=None, window=128, bits=8, temperature=0.0, seed=7, min_p=0.05)
    assert Settings.of(asdict(settings)) == settings
    assert Settings.of({"unknown": 3}) == Settings()


def test_replies_are_the_likeliest_unless_told() -> None:
    assert Settings().temperature == 0
    assert Settings.of({"temperature": 0.7}).temperature == 0.7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 63),
        ("window", 15),
        ("sinks", -1),
        ("bits", 7),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("max_tokens", 0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.9),
        ("seed", -1),
        ("seed", 0.5),
        ("memory", 15),
        ("memory", None),
        ("capacity", "many"),
        ("capacity", True),
        ("capacity", 100.5),
    ],
)
def test_out_of_bounds(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        Settings.of({name: value})


@pytest.mark.parametrize("saved", [None, [], "x"])
def test_no_settings(saved: Any) -> None:
    with pytest.raises(ValueError, match="object"):
        Settings.of(saved)


def test_what_the_caches_depend_on() -> None:
    assert Settings(temperature=0.1).caches == Settings(temperature=0.2, sinks=0).caches
    assert Settings(window=64, sinks=0).caches != Settings(window=64, sinks=4).caches
