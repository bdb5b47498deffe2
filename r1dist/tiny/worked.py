"""Tiny problems with a worked completion: what the SFT recipe of the tiny model learns from."""

from .problems import Problem, as_row, distinct


def rows(count: int, seed: int, split: str) -> list[dict]:
    """Distinct problems as rows, each with its `completion`."""
    return [{**as_row(problem), "completion": completion(problem)} for problem in distinct(count, seed, split)]


def completion(problem: Problem) -> str:
    """The worked chain, one English sentence a step, inside the tags."""
    chain = " ".join(f"{before}{operation} ends in {after}." for before, operation, after in problem.steps)
    return f"<think>{chain}</think>\n<answer>{problem.answer}</answer>"
