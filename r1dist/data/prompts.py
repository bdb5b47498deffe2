"""The datasets that the trainers and the evaluation are given."""

import functools
import logging

from datasets import Dataset
from jinja2 import TemplateError

from ..config import Data, Prompting, Source
from ..errors import UserError
from ..shipped import located
from .decontaminate import decontaminate
from .mapping import kept, mapped
from .sources import load_conversations, load_problems
from .templates import Template

logger = logging.getLogger(__name__)


def prompt_dataset(
    data: Data,
    template: Template,
    context: int,
    completion: int,
    prompting: Prompting | None = None,
    seed: int = 0,
    contaminated: list[dict] | None = None,
) -> Dataset:
    """Rows with `prompt`, `prompt_id`, `prompt_ids`, `prompt_length` (tokens), and `load_problems`' columns.

    A prompt that leaves less than `completion` of the model's `context` tokens is dropped and counted. Of
    `prompting`, the examples and the instruction stand in the prompt. `seed` is that of the mixture, where sources
    have weights, which are shares of the rows before any is dropped for its length. What `data.decontaminate` drops
    before that is added to `contaminated`.
    """
    clean = functools.partial(_decontaminated, data, contaminated)
    rows = load_problems(data.sources, seed, data.stopping_strategy, clean)
    examples = load_examples(prompting) if prompting else []
    instruction = f"\n{prompting.instruction}" if prompting and prompting.instruction else ""

    def convert(row: dict, index: int) -> dict:
        earlier = [(exchange["question"], exchange["reply"]) for exchange in row["earlier"]]
        prompt = template.prompt(row["problem"] + instruction, row["system"], [*examples, *earlier])
        ids, refusal = _prompt_ids(template, prompt)
        made = {"prompt": prompt, "prompt_id": index, "prompt_ids": ids, "prompt_length": len(ids)}
        return {**made, "refusal": refusal}

    rows = _usable(mapped(rows, convert, with_indices=True))
    if examples and not template.holds(rows[0]["prompt"], [completion for _, completion in examples]):
        raise UserError(
            f"prompting.examples: the chat template of {template.model} drops a part of earlier replies, so that the "
            "examples would not be shown whole.\nUse `data.template: r1_zero`, or `prompting.instruction`."
        )
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
    source = Source(path=located(prompting.examples), problem="problem", completion="completion")
    rows = load_conversations([source])
    if len(rows) < prompting.shots:
        raise UserError(f"prompting.examples: {prompting.examples} holds {len(rows)}; `shots` is {prompting.shots}.")
    return [(row["messages"][-1]["content"], row["completion"]) for row in rows.select(range(prompting.shots))]


def completion_dataset(
    data: Data, template: Template, max_length: int | None, seed: int = 0, contaminated: list[dict] | None = None
) -> Dataset:
    """Rows with `input_ids`, their number `length`, and `completion_mask` (1 on the reply and what ends it).

    A row of more than `max_length` tokens is dropped and counted, since packing would cut it in two; so is one that
    the chat template refuses. Raises `UserError` if none is left, or if the template keeps replies from thinking.
    `seed` is that of the mixture, as in `prompt_dataset`, and `contaminated` grows as there.
    """
    clean = functools.partial(_decontaminated, data, contaminated)
    rows = load_conversations(data.sources, seed, data.stopping_strategy, clean)
    if any("<think>" in completion for completion in rows["completion"]):
        template.require_thoughts("data.sources: there are replies that think")

    def convert(row: dict) -> dict:
        if template.name == "r1_zero":
            prompt = template.prompt(next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user"))
        else:
            prompt = template.messages(row["messages"])
        ids, refusal = _prompt_ids(template, prompt)
        reply = template.reply_ids(row["completion"])
        return {
            "input_ids": ids + reply,
            "completion_mask": [0] * len(ids) + [1] * len(reply),
            "length": len(ids) + len(reply),
            "refusal": refusal,
        }

    usable = _usable(mapped(rows, convert, remove_columns=rows.column_names))
    fitting = usable if max_length is None else kept(usable, lambda row: row["length"] <= max_length)
    dropped = len(usable) - len(fitting)
    if dropped:
        logger.warning("dropped %d of %d rows: longer than max_length = %d tokens", dropped, len(usable), max_length)
    if not len(fitting):
        raise UserError(f"data.sources: none of the {len(usable)} rows fits into max_length = {max_length} tokens.")
    return fitting


def _decontaminated(data: Data, contaminated: list[dict] | None, parts: list[Dataset]) -> list[Dataset]:
    """The rows of each source that `data.decontaminate` leaves."""
    if data.decontaminate is None:
        return parts
    parts, found = decontaminate(parts, data.decontaminate)
    if contaminated is not None:
        contaminated += found
    return parts


def _prompt_ids(template: Template, prompt: str | list[dict]) -> tuple[list[int], str | None]:
    """The prompt's token ids, and why the chat template refuses it, if it does."""
    try:
        return template.prompt_ids(prompt), None
    except TemplateError as error:
        return [], str(error)


def _usable(rows: Dataset) -> Dataset:
    """The rows without a `refusal`; the others are counted. Raises `UserError` if none is left."""
    refusals = [refusal for refusal in rows["refusal"] if refusal is not None]
    if len(refusals) == len(rows):
        raise UserError(f"data.sources: the chat template refuses all of the {len(rows)} rows: {refusals[0]}")
    if refusals:
        logger.warning("left out %d of %d rows: the chat template says: %s", len(refusals), len(rows), refusals[0])
        rows = rows.select([place for place, refusal in enumerate(rows["refusal"]) if refusal is None])
    return rows.remove_columns("refusal")
