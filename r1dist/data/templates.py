"""How a question becomes a prompt."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import UserError

# DeepSeek-R1, table 1: the template of R1-Zero.
INSTRUCTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)


def make_prompt(
    template: str,
    problem: str,
    system: str | None = None,
    examples: Sequence[tuple[str, str]] = (),
) -> str | list[dict]:
    """The prompt for one question: text for `r1_zero`, a list of messages for the chat templates.

    `examples` (problem, completion) come before it, as if they had been asked and answered.
    """
    if template == "r1_zero":
        shown = "".join(f" User: {asked}. Assistant: {answered}" for asked, answered in examples)
        return f"{INSTRUCTION}{shown} User: {problem}. Assistant:"
    if template == "r1_zero_chat":
        system = INSTRUCTION
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": problem}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """The token ids that the model is given for `prompt`, as TRL's trainer computes them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, template: str, model_path: str) -> None:
    """Refuse a chat template of a tokenizer that has none."""
    if template != "r1_zero" and tokenizer.chat_template is None:
        raise UserError(
            f"data.template `{template}` needs a chat template, and the tokenizer of {model_path} has none.\n"
            "Use `data.template: r1_zero`, or a tokenizer with a template in `model.tokenizer`."
        )
