"""Shapes of the models that the paper used, so that a plan needs neither weights nor a network.

The Bridge of their recipes has an inner width of 3/16 of the model's: 2.79 / 3.54 / 5.02 % new parameters, the paper's
band of 2.8 to 5.1 % with its smallest model at the lower end and its largest at the upper. A fixed inner width of 512
gives 4.96 / 2.70 / 3.34 %, below that band for 7B. The paper states the band, not heads and sizes.
"""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

QWEN_1_5B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
QWEN_7B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
LLAMA_8B = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"

_SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    QWEN_1_5B: (
        Qwen2Config,
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
    ),
    QWEN_7B: (
        Qwen2Config,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    LLAMA_8B: (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
}


def preset_config(path: str) -> PreTrainedConfig | None:
    """The configuration of a model that has a preset, else None."""
    if path not in _SHAPES:
        return None
    cls, shape = _SHAPES[path]
    return cls(**shape, max_position_embeddings=131072, tie_word_embeddings=False)
