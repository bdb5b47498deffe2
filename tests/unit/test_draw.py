"""Draws: exact for rare tokens, too, never a token of probability 0, each row by its own generator."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from r1dist.generation.draw import NOISE_BLOCK, SeededDraw

CPU = torch.device("cpu")


def tokens_of(scores: torch.Tensor, positions: int, first_seed: int = 0) -> torch.Tensor:
    """[rows, positions], of a draw with the same [V] scores for each row and position."""
    rows = 500
    draw = SeededDraw([first_seed + row for row in range(rows)], CPU)
    return torch.stack([draw(scores.expand(rows, -1))[0] for _ in range(positions)], dim=1)


@pytest.mark.parametrize("vocabulary", [2, 7, 363, 4096])
def test_each_token_is_drawn_as_often_as_it_is_probable(vocabulary):
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    drawn = tokens_of(scores, 40).flatten()
    expected = scores.softmax(-1) * len(drawn)
    counts = drawn.bincount(minlength=vocabulary)
    assert len(counts) == vocabulary
    often = expected > 5
    squares = (counts - expected)[often].square() / expected[often]
    # A sum of as many squares: its mean is their number, its variance twice that.
    assert squares.sum() < often.sum() + 5 * (2 * often.sum()).sqrt()


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_are_probable():
    """49,000 tokens that have 1 % of the probability together, behind one that has the rest."""
    vocabulary, positions = 49_152, 40
    scores = torch.zeros(vocabulary)
    scores[0] = torch.tensor(99.0 * (vocabulary - 1)).log()
    rare = tokens_of(scores, positions)
    rare = rare[rare > 0]
    expected = 500 * positions * 0.01
    assert abs(len(rare) - expected) < 4 * expected**0.5
    # Over all of the vocabulary, each quarter alike: a sum rounded as it grows would leave out its end.
    quarters = (rare * 4 // vocabulary).bincount(minlength=4)
    assert (quarters - len(rare) / 4).abs().max() < 4 * (len(rare) / 4) ** 0.5


def test_a_token_of_probability_0_is_never_drawn():
    scores = torch.zeros(1, 1000)
    scores[0, :500] = torch.arange(500) / 100
    for warper, most in ((TopKLogitsWarper(3), 3), (TopPLogitsWarper(0.2), 200)):
        left = warper(None, scores.clone())[0]
        drawn = tokens_of(left, 20)
        assert left[drawn].isfinite().all() and 1 < len(drawn.unique()) <= most


def test_a_row_repeats_in_any_batch_and_after_others_have_left():
    positions = 2 * NOISE_BLOCK // 64
    scores = torch.randn(positions, 4, 500, generator=torch.Generator().manual_seed(2))
    whole, parts = SeededDraw([5, 6, 7, 8], CPU), SeededDraw([6, 8], CPU)
    alone = torch.stack([parts(step[[1, 3]])[0] for step in scores])
    drawn = [whole(step)[0][[1, 3]] for step in scores[:3]]
    whole.keep(torch.tensor([1, 3]))
    drawn += [whole(step[[1, 3]])[0] for step in scores[3:]]
    assert torch.equal(torch.stack(drawn), alone)
    assert not torch.equal(alone[:, 0], alone[:, 1])


def test_rounding_of_scores_changes_no_draw():
    """As scores of another batch differ: a bound in cumulated probabilities would move for each token."""
    scores = torch.randn(500, 49_152, generator=torch.Generator().manual_seed(3))
    off = scores * (1 + 1e-6 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(4)))
    one, other = SeededDraw(list(range(500)), CPU), SeededDraw(list(range(500)), CPU)
    for _ in range(4):
        assert torch.equal(one(scores)[0], other(off)[0])


def test_logprobs_are_of_the_tokens_and_the_best_has_no_seed():
    scores = 3 * torch.randn(6, 700, generator=torch.Generator().manual_seed(5))
    for seeds in (None, list(range(6))):
        tokens, logprobs = SeededDraw(seeds, CPU)(scores)
        torch.testing.assert_close(logprobs, scores.log_softmax(-1)[torch.arange(6), tokens])
        assert torch.equal(tokens, scores.argmax(-1)) == (seeds is None)
