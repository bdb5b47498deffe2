"""R1-Zero's prompt, as text. Imports no torch."""

from collections.abc import Sequence

# DeepSeek-R1, table 1: the template of R1-Zero.
INSTRUCTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)


def r1_zero_prompt(problem: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    """The text that the template `r1_zero` makes of a problem."""
    shown = "".join(f" User: {asked}. Assistant: {answered}" for asked, answered in examples)
    return f"{INSTRUCTION}{shown} User: {problem}. Assistant:"
