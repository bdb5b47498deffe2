"""The tiny tokenizer: Qwen2's own byte-level BPE with a vocabulary of a few hundred tokens.

A `qwen2` checkpoint is always loaded with Qwen2's tokenizer class, so the tokenizer is built as that class:
the 256 bytes, the merges that the corpus pays for, and ChatML's three special tokens.
"""

import itertools
import json

from corpus import END_OF_TEXT, FIRST_HABITS, IM_END, IM_START, documents
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(seed: int, rows: int, vocab_size: int) -> Qwen2Tokenizer:
    """Train the merges on `rows` corpus rows; the special tokens come on top of `vocab_size`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=rows // 60,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    special = (IM_START, IM_END, END_OF_TEXT)
    texts = itertools.islice(documents(seed, FIRST_HABITS), rows)
    learner.train_from_iterator((_without(special, text) for text in texts), trainer)
    learned = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=IM_END,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
    )


def _without(special: tuple[str, ...], text: str) -> str:
    for token in special:
        text = text.replace(token, " ")
    return text
