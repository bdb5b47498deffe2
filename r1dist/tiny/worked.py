"""Tiny problems with a worked completion: what the SFT recipe of the tiny model learns from."""

from .problems import Problem, generate


def rows(count: int, seed: int, split: str) -> list[dict]:
    """`generate`'s rows with `completion`: the chain in English, inside the tags."""
    return [{**row, "completion": completion(row["problem"])} for row in generate(count, seed, split)]


def completion(question: str) -> str:
    """The chain of a question, one English sentence a step, inside the tags."""
    start, operations = question.removeprefix("Start with ").split(":")[0].split(", then ")
    problem = Problem(int(start), tuple(operations.split()))
    chain = " ".join(f"{before}{operation} ends in {after}." for before, operation, after in problem.steps)
    return f"<think>{chain}</think>\n<answer>{problem.answer}</answer>"
