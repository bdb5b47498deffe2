"""Does the reasoning go step by step, to be seen at its marks?"""

import re

# Marks with nothing between them are one step: "1. First, ..." is no more reasoning than "1. ...". A number needs
# the blank after its point, or every line that begins with 3.14 would be a step.
MARK = r"(?i:\bstep) \d+:|(?:^|(?<=<think>))[ \t]*(?:\d+\.|[-*•])(?=\s)|\b(?:First|Second|Next|Finally)\b,?"
STEP = re.compile(rf"(?:(?:{MARK})\s*)+", re.MULTILINE)
ENOUGH = 3


def reasoning_steps(completion: str, row: dict) -> float:
    """min(1, n / 3) for n marks of a step: `Step 1:`, `1.` or a bullet at the head of a line, First, Second,
    Next, Finally.

    Range {0, 1/3, 2/3, 1}. Source: the `reasoning_steps` reward of open-r1; the words count with a capital only.
    """
    return min(1.0, len(STEP.findall(completion)) / ENOUGH)
