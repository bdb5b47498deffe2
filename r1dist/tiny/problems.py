"""Generated arithmetic: short chains of sums and products, of which the last digit is asked.

"Start with 7, then *3 +4 *9: what is the last digit?" is worked from left to right. Only last digits
matter, so each step is one of 120 small facts, yet the answer to the whole chain cannot be guessed: every
operation permutes the ten digits, and a chain skipped over is right one time in ten.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Only 3, 7 and 9 (and 1) have inverses modulo 10: a factor of 5 or an even one would make answers guessable.
OPERATIONS = tuple(f"+{n}" for n in range(1, 10)) + ("*3", "*7", "*9")
LENGTHS = (3, 4, 5, 6, 7, 8, 9)
TEST_SHARE = 10  # one question in ten belongs to the test split


def split_of(question: str, share: int) -> str:
    """ "test" for one in `share` of all questions, by a hash of the question: no seed can mix the two."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] % share == 0 else "train"


@dataclass(frozen=True)
class Problem:
    """A chain: a first digit and operations such as "*3" or "+4", applied from left to right."""

    start: int
    operations: tuple[str, ...]

    @property
    def statement(self) -> str:
        return f"Start with {self.start}, then {' '.join(self.operations)}"

    @property
    def question(self) -> str:
        return f"{self.statement}: what is the last digit?"

    @property
    def steps(self) -> list[tuple[int, str, int]]:
        """(digit before, operation, last digit after), one for each operation."""
        digit, steps = self.start, []
        for operation in self.operations:
            operand = int(operation[1:])
            after = (digit * operand if operation[0] == "*" else digit + operand) % 10
            steps.append((digit, operation, after))
            digit = after
        return steps

    @property
    def answer(self) -> str:
        return str(self.steps[-1][2])

    @property
    def split(self) -> str:
        return split_of(self.question, TEST_SHARE)


def draw(rng: random.Random, lengths: Sequence[int], split: str, weights: Sequence[float] | None = None) -> Problem:
    """Draw one problem of `split` whose number of operations comes from `lengths` (uniform without `weights`)."""
    while True:
        count = rng.choices(lengths, weights)[0]
        problem = Problem(rng.randrange(10), tuple(rng.choices(OPERATIONS, k=count)))
        if problem.split == split:
            return problem


def distinct(count: int, seed: int, split: str, lengths: Sequence[int] = LENGTHS) -> list[Problem]:
    """`count` different problems of `split`."""
    rng = random.Random(f"{split}:{seed}")
    chosen: dict[str, Problem] = {}
    while len(chosen) < count:
        problem = draw(rng, lengths, split)
        chosen.setdefault(problem.question, problem)
    return list(chosen.values())


def as_row(problem: Problem) -> dict:
    """The columns `problem`, `answer` and `operations` (their number)."""
    return {"problem": problem.question, "answer": problem.answer, "operations": len(problem.operations)}


def generate(count: int, seed: int, split: str, lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """`distinct` problems as rows."""
    return [as_row(problem) for problem in distinct(count, seed, split, lengths)]
