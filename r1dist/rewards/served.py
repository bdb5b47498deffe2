"""Reward models that a vLLM server holds (`--runner pooling`), instead of each training process."""

import math
from typing import Any

import torch
from transformers import AutoTokenizer

from ..adapters import path_with
from ..data.templates import Template
from .model import check_folder, conversation_ids, judged_part
from .server import Endpoint, Refused, ServerDown, ServerReward


class ServedModel(ServerReward):
    """`ModelReward`'s scores, by the server at `url` that serves the reward model in `folder`.

    The folder's tokenizer makes the token ids, which are the same as in process. The server gives the logit.

    Raises `UserError` if the folder holds no such model, and for an address that is none. Nothing is asked yet.
    """

    def __init__(self, name: str, folder: str, url: str, api_key_env: str | None):
        super().__init__(name, self.ask)
        check_folder(folder, f"rewards.{name}.model")
        self.endpoint = Endpoint(name, url, api_key_env)
        tokenizer = AutoTokenizer.from_pretrained(path_with("tokenizer_config.json", folder))
        self.template = Template(tokenizer, "chat", folder)

    async def ask(self, completion: str, row: dict) -> float:
        """The score of one completion. Raises `ServerDown`, `Refused`."""
        ids = conversation_ids(self.template, row["problem"], judged_part(self.name, completion))
        while len(ids) > 1 and ids[-1] == self.template.tokenizer.pad_token_id:
            ids.pop()  # transformers reads the score at the last token that does not pad
        body = {"input": [ids], "use_activation": False}
        logit = _logit(await self.endpoint.post("/classify", body), f"{self.endpoint.url}/classify")
        return torch.tensor(logit).sigmoid().item() if self.name == "safety" else logit


def _logit(answer: Any, where: str) -> float:
    try:
        (item,) = answer["data"]
        values = [float(value) for value in item["probs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerDown(f"{where} gives no score: {answer!r:.200}") from error
    if len(values) != 1:
        raise Refused(f"{where} gives {len(values)} scores: its model is no reward model, which has one logit")
    if not math.isfinite(values[0]):
        raise ServerDown(f"{where} gives {values[0]}")
    return values[0]
