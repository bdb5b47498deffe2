"""Rewards by a trained model: how helpful the summary is, how safe the whole response.

Source: DeepSeek-R1 (arXiv 2501.12948), section 2.3.4: helpfulness is judged on the final summary alone, so that
the reasoning is left in peace; safety on the whole response, reasoning included.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..adapters import CONFIG, load_model, path_with
from ..data.templates import Template
from ..errors import UserError
from .math.accuracy import final_answer

SCORED_TOKENS = 16384
"""Most tokens of a forward, padding included. A longer reply is alone in its own."""


def judged_part(name: str, completion: str) -> str:
    """What the reward model `name` reads of a completion."""
    return final_answer(completion).strip() if name == "helpfulness" else completion


def conversation_ids(template: Template, problem: str, reply: str) -> list[int]:
    """The token ids of a question and its reply, as reward models are trained on and asked with."""
    return template.prompt_ids(template.prompt(problem)) + template.reply_ids(reply)


def check_folder(folder: str, field: str) -> None:
    """Raises `UserError`, which names `field`, if `folder` holds no reward model."""
    if not any((Path(folder) / file).is_file() for file in ("config.json", CONFIG)):
        raise UserError(f"{field}: {folder} holds no reward model; launch/reward_model.py makes one.")


def batches(lengths: list[int]) -> Iterator[list[int]]:
    """The places of rows of these lengths in batches of at most `SCORED_TOKENS`, of like length together."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[place] > SCORED_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class ModelReward:
    """Scores by the reward model in `folder`.

    `helpfulness`: the model's logit, any real number; only differences mean something (Bradley-Terry).
    `safety`: the probability that the response is safe, in (0, 1).

    Its weights are in `dtype`, the head, whose differences decide, in float32.

    Raises `UserError` if the folder holds no such model.
    """

    def __init__(self, name: str, folder: str, dtype: str = "float32"):
        check_folder(folder, f"rewards.{name}.model")
        self.name = name
        self.tokenizer = AutoTokenizer.from_pretrained(path_with("tokenizer_config.json", folder))
        self.template = Template(self.tokenizer, "chat", folder)
        pad = self.tokenizer.pad_token_id  # adapters leave it to be set, with the number of labels
        self.model = load_model(folder, "SEQ_CLS", num_labels=1, pad_token_id=pad, dtype=getattr(torch, dtype)).eval()
        self.model.score.float().register_forward_pre_hook(lambda head, inputs: (inputs[0].float(),))
        if torch.cuda.is_available():
            self.model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")

    @torch.no_grad()
    def __call__(self, texts: list[str], rows: list[dict]) -> list[float]:
        ids = [
            conversation_ids(self.template, row["problem"], judged_part(self.name, text))
            for text, row in zip(texts, rows, strict=True)
        ]
        scores = [0.0] * len(ids)
        for places in batches([len(each) for each in ids]):
            batch = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in places]}, padding_side="right", return_tensors="pt"
            )
            logits = self.model(**batch.to(self.model.device)).logits[:, 0].float()
            values = logits.sigmoid() if self.name == "safety" else logits
            for place, value in zip(places, values.tolist(), strict=True):
                scores[place] = value
        return scores
