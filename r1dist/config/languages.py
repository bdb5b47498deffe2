"""The languages that can be asked for, by the script that they are written in. Imports without torch."""

from itertools import chain
from typing import Literal, TypeAlias

# Where several share a script, the first is what a text counts as as long as nothing says otherwise.
BY_SCRIPT = {
    "Latin": (
        "en", "fr", "de", "es", "it", "pt", "nl", "sv", "da", "fi", "pl", "cs", "ro", "hu", "tr", "vi", "id",
    ),
    "Han": ("zh",),
    "Kana": ("ja",),
    "Hangul": ("ko",),
    "Cyrillic": ("ru", "uk", "bg"),
    "Arabic": ("ar", "fa", "ur"),
    "Greek": ("el",),
    "Hebrew": ("he",),
    "Thai": ("th",),
    "Devanagari": ("hi",),
}  # fmt: skip
SCRIPT = {language: script for script, languages in BY_SCRIPT.items() for language in languages}
Language: TypeAlias = Literal[tuple(chain.from_iterable(BY_SCRIPT.values()))]  # type: ignore[valid-type]
