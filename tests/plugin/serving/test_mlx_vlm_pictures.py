"""Chats about pictures with mlx-vlm's server over HTTP, on a small random Qwen2-VL with a real processor."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm.models import qwen2_vl
from PIL import Image

from tests.plugin.configurations.build import randomize
from tests.plugin.serving.mlx_vlm_clients import VisionClient, served

MARKS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|>{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PATCH = 4
SYSTEM = "You are a careful assistant and look at every picture before you say anything about it."
OTHER_SYSTEM = "You are a hasty assistant."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model, a tokenizer with the tokens of pictures, and the settings of a processor."""
    folder = tmp_path_factory.mktemp("models") / "vision"
    extended = copy.deepcopy(tokenizer)
    extended.add_special_tokens({"additional_special_tokens": MARKS})
    start, image, video = extended.convert_tokens_to_ids(MARKS)
    extended.chat_template = TEMPLATE
    extended.save_pretrained(folder)
    outer = {"vocab_size": len(extended), "model_type": "qwen2_vl"}
    text = outer | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start}
    config = text | ids | {"vision_config": vision, "eos_token_id": [2]}
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"patch_size": PATCH, "min_pixels": 256, "max_pixels": 1024, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    model = qwen2_vl.Model(
        qwen2_vl.ModelConfig(
            text_config=qwen2_vl.TextConfig.from_dict(text),
            vision_config=qwen2_vl.VisionConfig.from_dict(vision),
            **outer,
            **ids,
        )
    )
    randomize(model, 0)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def picture(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def begun(seed: int, system: str = SYSTEM) -> list[Any]:
    question = [picture(seed), {"type": "text", "text": "What do you see here?"}]
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def turn(messages: list[Any], answer: Any, question: str) -> list[Any]:
    reply: str = answer.body["choices"][0]["message"]["content"]
    return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": question}]


def ask(client: VisionClient, messages: list[Any]) -> tuple[Any, int, int]:
    """An answer, and the numbers of tokens of its prompt and of those that were not computed."""
    answer = client.converse(messages, model=client.model)
    assert answer.status == 200, answer.body
    usage = answer.body["usage"]
    return (
        answer,
        usage["prompt_tokens"],
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def text_of(answer: Any) -> Any:
    return answer.body["choices"][0]["message"]


@pytest.fixture(scope="module")
def afresh(folder: Path) -> dict[Any, Any]:
    """The answers of a server that stores nothing."""
    found: dict[Any, Any] = {}
    with served(folder) as client:
        for name, seed, system in (("one", 0, SYSTEM), ("other", 1, SYSTEM), ("edited", 0, OTHER_SYSTEM)):
            messages = begun(seed, system)
            found[name], *_ = ask(client, messages)
            found[name, "more"], *_ = ask(client, turn(messages, found[name], "And what else?"))
    return found


@pytest.fixture(scope="module")
def client(folder: Path, afresh: dict[Any, Any]) -> Iterator[VisionClient]:
    with served(folder, apc=True) as client:
        yield client


def test_a_chat_about_a_picture(client: VisionClient, afresh: dict[Any, Any]) -> None:
    """The second question computes its own tokens only. What comes after another picture, or after other
    text before the picture, is computed again.
    """
    messages = begun(0)
    first, length, cached = ask(client, messages)
    assert (text_of(first), cached) == (text_of(afresh["one"]), 0)
    second, longer, cached = ask(client, turn(messages, first, "And what else?"))
    assert text_of(second) == text_of(afresh["one", "more"])
    assert length <= cached < longer

    before = ask_before_picture(client)
    other, same_length, cached = ask(client, begun(1))
    assert text_of(other) == text_of(afresh["other"]) != text_of(first)
    assert same_length == length and cached <= before

    edited, shorter, cached = ask(client, begun(0, OTHER_SYSTEM))
    assert text_of(edited) == text_of(afresh["edited"])
    assert shorter < length and cached < before
    again, _, cached = ask(client, turn(begun(0, OTHER_SYSTEM), edited, "And what else?"))
    assert text_of(again) == text_of(afresh["edited", "more"])
    assert cached >= shorter


def ask_before_picture(client: VisionClient) -> int:
    """The number of tokens before the picture."""
    _, length, _ = ask(client, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "x"}])
    return length
