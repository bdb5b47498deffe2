"""Tokens drawn from scores, those of each sample by a random generator of its own."""

import torch
import torch.nn.functional as F

NOISE_BLOCK = 8192
"""Noise that a generator makes at once, for several positions: its calls, a row's at a time, would cost more."""


class SeededDraw:
    """Draws a token of each row from softmax(scores), row i by a generator of its own; without seeds, the best.

    argmax(p / e) with e ~ Exp(1) is distributed as p (the exponential race). Runs of neighbouring tokens race first,
    then the tokens of the run that won, so a draw takes noise of twice the root of the vocabulary. One uniform number
    searched in the cumulated probabilities would take less, but scores that differ by rounding, as those of another
    batch do, would move the bounds of all tokens, not of those alone whose own scores differ.
    """

    def __init__(self, seeds: list[int] | None, device: torch.device):
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._drawn = 0
        self._noise: torch.Tensor | None = None

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, V] -> the tokens [B], and their logprobs [B]."""
        probabilities = scores.float().softmax(dim=-1)
        tokens = scores.argmax(dim=-1) if self.generators is None else self._race(probabilities)
        return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        if self.generators is not None:
            self.generators = [self.generators[row] for row in rows.tolist()]
            self._noise = self._noise[rows]

    def _race(self, probabilities: torch.Tensor) -> torch.Tensor:
        rows, vocabulary = probabilities.shape
        width = 1 << vocabulary.bit_length() // 2
        if missing := -vocabulary % width:
            probabilities = F.pad(probabilities, (0, missing))
        runs = probabilities.view(rows, -1, width)
        of_runs, of_tokens = self._next_noise(probabilities, runs.size(1) + width).split([runs.size(1), width], dim=1)
        run = (runs.sum(dim=-1) / of_runs).argmax(dim=-1)
        within = runs[torch.arange(rows, device=run.device), run]
        return run * width + (within / of_tokens).argmax(dim=-1)

    def _next_noise(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """Exponential noise [B, count] for the next position. The block depends on V alone, so rows repeat exactly."""
        block = max(1, NOISE_BLOCK // count)
        place = self._drawn % block
        if place == 0:
            self._noise = like.new_empty(len(like), block, count)
            for row, generator in zip(self._noise, self.generators, strict=True):
                row.exponential_(generator=generator)
        self._drawn += 1
        return self._noise[:, place]
