"""The shapes of models, without their weights."""

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from ..config import Model
from ..models import load_model_config

# The published shapes of the models in configs/recipes, so that a plan needs no hub.
QWEN_HALF_BILLION = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
QWEN_7_BILLION = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
QWEN_1_5_BILLION = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
SMOLLM_135_MILLION = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
KNOWN_SHAPES: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-0.5B": QWEN_HALF_BILLION,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN_HALF_BILLION,
    "Qwen/Qwen2.5-1.5B": QWEN_1_5_BILLION,
    "Qwen/Qwen2.5-7B": QWEN_7_BILLION,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7_BILLION,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM_135_MILLION,
}


def model_shape(model: Model) -> PretrainedConfig:
    """The architecture of `model`. Raises `UserError` if it is neither known nor can be loaded."""
    return KNOWN_SHAPES.get(model.path) or load_model_config(model)
