"""The datasets that the trainers and the evaluation are given."""

import logging

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import Data, Prompting, Source
from ..errors import UserError
from .mapping import kept, mapped
from .sources import load_conversations, load_problems
from .templates import check_chat_template, make_prompt, prompt_ids

logger = logging.getLogger(__name__)


def prompt_dataset(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    model_path: str,
    context: int,
    completion: int,
    prompting: Prompting | None = None,
) -> Dataset:
    """Rows with `prompt`, `prompt_id`, `prompt_ids`, `prompt_length` (tokens), and `load_problems`' columns.

    A prompt that leaves less than `completion` of the model's `context` tokens is dropped and counted. Of
    `prompting`, the examples and the instruction stand in the prompt.
    """
    check_chat_template(tokenizer, data.template, model_path)
    rows = load_problems(data.sources)
    examples = load_examples(prompting) if prompting else []
    instruction = f"\n{prompting.instruction}" if prompting and prompting.instruction else ""

    def convert(row: dict, index: int) -> dict:
        earlier = [(exchange["question"], exchange["reply"]) for exchange in row["earlier"]]
        prompt = make_prompt(data.template, row["problem"] + instruction, row["system"], [*examples, *earlier])
        ids = prompt_ids(tokenizer, prompt)
        return {"prompt": prompt, "prompt_id": index, "prompt_ids": ids, "prompt_length": len(ids)}

    rows = mapped(rows, convert, with_indices=True, remove_columns=["system"])
    fitting = kept(rows, lambda row: row["prompt_length"] + completion <= context)
    dropped = len(rows) - len(fitting)
    if dropped:
        logger.warning(
            "dropped %d of %d prompts: longer than the %d tokens that %d of completion leave of the model's %d",
            dropped, len(rows), context - completion, completion, context,
        )  # fmt: skip
    if not len(fitting):
        raise UserError(
            f"data.sources: none of the {len(rows)} prompts fits: the model holds {context} tokens and "
            f"the completion may take {completion}. Shorten the completion."
        )
    return fitting


def load_examples(prompting: Prompting) -> list[tuple[str, str]]:
    """(problem, completion) of the examples that `prompting` shows; raises `UserError` if they are too few."""
    if prompting.examples is None:
        return []
    source = Source(path=prompting.examples, problem="problem", completion="completion")
    rows = load_conversations([source])
    if len(rows) < prompting.shots:
        raise UserError(f"prompting.examples: {prompting.examples} holds {len(rows)}; `shots` is {prompting.shots}.")
    return [(row["messages"][-1]["content"], row["completion"]) for row in rows.select(range(prompting.shots))]


def completion_dataset(
    data: Data, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int | None
) -> Dataset:
    """Rows with `prompt` and `completion` as TRL's SFTTrainer takes them, and `length` (tokens).

    A row of more than `max_length` tokens is dropped and counted: packing would cut it in two.
    """
    check_chat_template(tokenizer, data.template, model_path)
    rows = load_conversations(data.sources)

    def convert(row: dict) -> dict:
        if data.template == "r1_zero":
            question = next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user")
            prompt = make_prompt("r1_zero", question)
            completion = f" {row['completion']}"
            length = len(tokenizer(prompt + completion)["input_ids"]) + 1  # TRL ends the row with the EOS token
        else:
            prompt = row["messages"]
            if data.template == "r1_zero_chat":
                prompt = make_prompt(data.template, "")[:1] + [m for m in prompt if m["role"] != "system"]
            completion = [{"role": "assistant", "content": row["completion"]}]
            length = len(tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"])
        return {"prompt": prompt, "completion": completion, "length": length}

    rows = mapped(rows, convert, remove_columns=rows.column_names)
    fitting = rows if max_length is None else kept(rows, lambda row: row["length"] <= max_length)
    dropped = len(rows) - len(fitting)
    if dropped:
        logger.warning("dropped %d of %d rows: longer than max_length = %d tokens", dropped, len(rows), max_length)
    if not len(fitting):
        raise UserError(f"data.sources: none of the {len(rows)} rows fits into max_length = {max_length} tokens.")
    return fitting
