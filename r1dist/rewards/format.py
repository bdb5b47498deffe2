"""Does the completion think inside its tags and answer inside its tags, and nothing else?"""

from ..data.tags import TAGS


def has_format(completion: str) -> bool:
    """True for `<think>...</think><answer>...</answer>` with each tag exactly once and neither part empty."""
    pieces, rest = [], completion
    for tag in TAGS:
        piece, found, rest = rest.partition(tag)
        if not found or completion.count(tag) != 1:
            return False
        pieces.append(piece.strip())
    before, thought, between, answer = pieces
    return bool(thought and answer) and not (before or between or rest.strip())


def format_reward(completion: str, row: dict) -> float:
    """1 if `has_format`, else 0.

    Range {0, 1}. Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2, "format rewards".
    """
    return float(has_format(completion))


def soft_format(completion: str, row: dict) -> float:
    """1 if a thought and, after it, an answer stand in their tags, neither of them empty; else 0.

    Text around and between the two is let pass, and so is what follows. Range {0, 1}. Source: ours, for models
    that the strict format would pay nothing at first.
    """
    thought, closed, rest = completion.partition("<think>")[2].partition("</think>")
    answer, ended, _ = rest.partition("<answer>")[2].partition("</answer>")
    return float(bool(thought.strip() and closed and answer.strip() and ended))


def tag_count(completion: str, row: dict) -> float:
    """The number of the four tags that are there exactly once, divided by 4. Their order does not matter.

    Range {0, 0.25, 0.5, 0.75, 1}. Source: the idea is open-r1's `tag_count_reward`.
    """
    return sum(completion.count(tag) == 1 for tag in TAGS) / len(TAGS)
