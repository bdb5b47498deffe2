"""cons@n: whether the answer that most samples of a problem agree on is right."""

from dataclasses import dataclass, field

from ..rewards.math.accuracy import final_answer
from ..rewards.pool import Pool


@dataclass
class _Vote:
    """The samples of one problem. Each answer is a class of samples whose answers are equal."""

    answers: list[str]
    """Of the samples that give one."""
    scores: list[float]
    open: list[int]
    """Places of samples that are in no class yet."""
    classes: list[list[int]] = field(default_factory=list)

    def share_right(self) -> float:
        """Of the largest classes, the share that is right: the chance if one of them is drawn. 0 without an answer."""
        most = max(map(len, self.classes), default=0)
        first = [self.scores[members[0]] for members in self.classes if len(members) == most]
        return sum(first) / len(first) if first else 0.0


def consensus(problems: list[list[dict]], pool: Pool) -> list[float]:
    """For each problem, given as its samples of a journal (`text`, `finished`, `accuracy`): 1 if the majority's answer
    is right, 0 if not, between them where several answers have as many samples.

    Two answers are the same if the verifier takes one as right where the other is the gold answer; those that it
    cannot take as a gold answer, if their texts are. Samples that were cut off, or give no answer, have no vote.
    """
    votes = [_vote(samples) for samples in problems]
    while unfinished := [vote for vote in votes if vote.open]:
        texts, rows = [], []
        for vote in unfinished:
            first = vote.answers[vote.open[0]]
            texts += [vote.answers[place] for place in vote.open]
            rows += [{"answer": first, "entry": None}] * len(vote.open)
        same = iter(pool.scores("accuracy", texts, rows))
        for vote in unfinished:
            first = vote.answers[vote.open[0]]
            equal = [place for place in vote.open if next(same) == 1 or vote.answers[place] == first]
            vote.classes.append(equal)
            vote.open = [place for place in vote.open if place not in equal]
    return [vote.share_right() for vote in votes]


def _vote(samples: list[dict]) -> _Vote:
    given = [(final_answer(s["text"]).strip(), s["accuracy"]) for s in samples if s["finished"]]
    given = [(answer, score) for answer, score in given if answer]
    return _Vote([answer for answer, _ in given], [score for _, score in given], list(range(len(given))))
