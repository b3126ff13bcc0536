"""Language models of mlx-vlm with random weights from the configurations."""

from __future__ import annotations

import copy
import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from tests.plugin.configurations.build import randomize
from tests.plugin.configurations.common import VOCABULARY, Configuration, module_of
from tests.plugin.configurations.vlm_tables import VLM_CONFIGURATIONS
from tests.plugin.configurations.wide import widened

# What language models read of the configuration of the vision model around them.
_AROUND: Configuration = {
    "image_token_id": VOCABULARY - 1,
    "video_token_id": VOCABULARY - 2,
    "vision_start_token_id": VOCABULARY - 3,
    "image_cls_token_id": VOCABULARY - 4,
    "img_end_id": VOCABULARY - 5,
    "vision_config": SimpleNamespace(
        spatial_merge_size=2, temporal_patch_size=1, spatial_patch_size=4, channel_size=3
    ),
}


def build_language_model(name: str, seed: int = 0, is_wide: bool = False) -> nn.Module:
    """The language model of a configuration, or of it with heads of 32, with random float32 weights."""
    package = f"mlx_vlm.models.{module_of(name)}"
    language = importlib.import_module(f"{package}.language")
    if name == "deepseek_v41":  # rounds to eight bits, where tiny differences become large ones
        importlib.import_module(f"{package}.fakequant").DISABLE = True
    # Some models write into the dictionaries that they are given.
    configuration = copy.deepcopy(VLM_CONFIGURATIONS[name])
    config = importlib.import_module(f"{package}.config")
    own = widened(configuration) if is_wide else configuration
    model: nn.Module = language.LanguageModel(*_arguments(language.LanguageModel, config, own))
    if name == "jina_vlm":  # whose `Model` adds the head
        model.lm_head = nn.Linear(model.config.hidden_size, VOCABULARY, bias=False)
    randomize(model, seed)
    model.eval()
    return model


def _arguments(model_class: Any, config: Any, configuration: Configuration) -> list[Any]:
    """A `TextConfig` or `ModelConfig`, and the one around it where the class takes both."""
    parameters = [name for name in inspect.signature(model_class).parameters if name != "tokenizer"]
    if "text_config" not in configuration:
        return [config.ModelConfig.from_dict(configuration)] * len(parameters)
    text = config.TextConfig.from_dict(configuration["text_config"])
    outer = SimpleNamespace(text_config=text, **_AROUND)
    if inspect.get_annotations(model_class.__init__).get(parameters[0]) is config.ModelConfig:
        return [outer]
    return [text, outer][: len(parameters)]
