"""Imported by the fork server of the pool: the first answer costs fifty times the next, and workers begin after it."""

from .math.accuracy import accuracy

accuracy("<answer>\\frac{x^2+1}{2}</answer>", {"answer": "$0.5 + x^2/2$"})
