"""Questions with choices: which is right, and the order in which they are shown."""

import random
from typing import Any

CHOICES = "ABCDEFGHJ"
"""Without `I`, which is a word: the letters that the reward `accuracy` reads as a choice."""


def right_choice(texts: list[str], answer: Any) -> int | None:
    """The place of the right one among `texts`: a number is the place, from 0, a text the choice itself or its letter.

    None for an `answer` that names none, or two that are the same.
    """
    if isinstance(answer, int):
        return answer if 0 <= answer < len(texts) else None
    text = str(answer).strip()
    if text in texts:
        return texts.index(text) if texts.count(text) == 1 else None
    place = CHOICES.find(text.strip("().").upper()) if len(text.strip("().")) == 1 else -1
    return place if 0 <= place < len(texts) else None


def choice_question(problem: str, texts: list[str], right: int, seed: int) -> tuple[str, str]:
    """`problem` with its choices, shuffled by `seed` and the question, and the letter of the right one."""
    order = list(range(len(texts)))
    random.Random(f"{seed}:{problem}").shuffle(order)
    listed = "\n".join(f"{letter}. {texts[place]}" for letter, place in zip(CHOICES, order, strict=False))
    return f"{problem}\n\n{listed}\n\nAnswer with the letter of the right choice.", CHOICES[order.index(right)]
