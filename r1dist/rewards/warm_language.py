"""Imported by the fork server of the pool: the model that tells languages apart takes a second to load."""

from .language import language

language("<think>a second of loading</think>", {}, "en")
