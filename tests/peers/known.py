"""Tests of mlx-lm that pass on its own caches and cannot pass on this package's, and why."""

from __future__ import annotations

KNOWN: dict[str, str] = {
    "test_evaluate.py::TestMLXLM::test_loglikelihood_rolling_mixed_lengths_is_independent_of_batch_size": (
        "the test's model is a plain class without parameters or layers, for which attach raises TypeError."
    ),
    "test_generate.py::TestGenerate::test_batch_max_kv_size_none_creates_regular_cache": (
        "the test asks for an instance of mlx-lm's own KVCache."
    ),
    "test_generate.py::TestGenerate::test_batch_max_kv_size_creates_rotating_cache": (
        "of mlx-lm 0.31: the test asks for an instance of its own RotatingKVCache; here it is a capacity."
    ),
    "test_models.py::TestModels::test_deepseek_v41": (
        "the model caches in a class of its own, LayerCache, which is not supported: attach raises "
        "NotSupportedError."
    ),
    "test_server.py::TestServerKVCacheQuantization::test_completion_quantizes_the_cache": (
        "the test asks for an instance of mlx-lm's own QuantizedKVCache."
    ),
}
"""Reasons by test: `file::class::name`. A fault of this package is mended, not listed."""

TOO_LARGE = frozenset(
    f"test_models.py::TestModels::test_{name}"
    for name in ("cohere", "cohere2", "gpt_neox", "gptj", "phi3", "qwen")
)
"""Tests that the attached run leaves out. They make models of up to 35 billion random weights and never
compute them. A call on these caches starts to compute what it stores, because other threads may use it."""
KNOWN |= dict.fromkeys(TOO_LARGE, "the model needs more memory than most machines have; see TOO_LARGE.")
