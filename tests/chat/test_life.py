"""Hours of chat. CHAT_TURNS and CHAT_CHECKS make it longer; `make soak-chat` does."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest

from examples.chat.settings import Settings

from .life import Life

TURNS = int(os.environ.get("CHAT_TURNS", "25"))
CHECKS = int(os.environ.get("CHAT_CHECKS", "5"))
ALLOWED = ("and the capacity is", "only a reply that was cut", "a conversation needs", "there is nothing")
"""What may be refused: the whole book, and what is not there."""


@pytest.mark.parametrize("seed", [1])
def test_hours_of_chat(flat: Path, tmp_path: Path, seed: int) -> None:
    settings = Settings(capacity=200, temperature=0.8, max_tokens=12, memory=16)
    life = Life(tmp_path, flat, seed, settings)
    checked, memory = 0, []
    for turn in range(TURNS):
        life.turn()
        if turn * CHECKS // TURNS != (turn + 1) * CHECKS // TURNS:
            checked += life.check()
            memory.append(mx.get_active_memory())
    life.close()
    unexpected = [why for why in life.failures if not any(text in why for text in ALLOWED)]
    assert unexpected == []
    assert checked >= CHECKS // 2
    assert max(life.differences) <= 2e-4
    assert life.most_bytes <= settings.memory * 10**6 * 1.05
    # The model, and no more than the caches may take.
    assert max(memory) <= memory[0] + settings.memory * 10**6 * 1.05
