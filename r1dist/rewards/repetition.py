"""Does a text go in circles?"""

import re

from pydantic import PositiveInt

# A word, one Han character, or one sign: chains of formulas repeat words, but hardly ever the signs between them.
PIECE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+|[^\w\s]")


def repetition_share(text: str, n: int) -> float:
    """The share of the text's n-grams that stood in it before, 0 for a text of fewer than n pieces.

    Range [0, 1). Source: the n-gram penalty of "Demystifying Long Chain-of-Thought" (arXiv 2502.03373),
    section 4.2, as a share rather than a penalty for each token.
    """
    pieces = PIECE.findall(text)
    grams = list(zip(*(pieces[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition(completion: str, row: dict, ngram: PositiveInt = 3) -> float:
    """-`repetition_share` of n-grams of `ngram` pieces: words, Han characters and signs, not the model's tokens.

    Range (-1, 0]. Source: as `repetition_share`.
    """
    return -repetition_share(completion, ngram)
