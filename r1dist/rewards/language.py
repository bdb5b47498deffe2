"""Which language is thought in? Script decides where it can; py3langid where languages share a script.

Not handled: a foreign phrase of a few words in a window of `WINDOW` words of the same script; languages that are
not in `r1dist.languages`, which count as the nearest of those that are, or as none.
"""

import copy
import functools
from collections import Counter
from typing import Literal

import regex
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from ..config.languages import BY_SCRIPT, SCRIPT
from .thinking import thinking_of

# Where no spaces are written between words, each character is one. A single Latin or Greek letter is a formula's
# symbol rather than a word.
WORD = regex.compile(
    r"""(?P<Latin>\p{Latin}+(?:['’]\p{Latin}+)+ | \p{Latin}{2,}) | (?P<Greek>\p{Greek}{2,})
    | (?P<Han>\p{Han}) | (?P<Kana>[\p{Hiragana}\p{Katakana}]) | (?P<Thai>\p{Thai})
    | (?P<Hangul>\p{Hangul}+) | (?P<Cyrillic>\p{Cyrillic}+) | (?P<Hebrew>\p{Hebrew}+)
    | (?P<Arabic>[\p{Arabic}&&[\p{L}\p{M}]]+) | (?P<Devanagari>[\p{Devanagari}&&[\p{L}\p{M}]]+)
    | (?P<other>[\p{L}--[\p{Latin}\p{Greek}\p{Common}]]+)""",
    regex.VERBOSE | regex.VERSION1,
)
TAG = regex.compile(r"</?(?:think|answer)>")
# An opener is searched for its end only up to the next one: else, where none is closed, the time would grow with the
# square of the text. Two backslashes are a line break, also before a bracket.
LATEX = regex.compile(
    r"""\\\\ | \$\$[^$]*+(?:\$(?!\$)[^$]*+)*+\$\$ | \$[^$\n]*+\$
    | \\\( (?:[^\\]|\\[^()])*+ \\\) | \\\[ (?:[^\\]|\\[^\[\]])*+ \\\] | \\[a-zA-Z]+""",
    regex.VERBOSE | regex.DOTALL,
)
CODE = regex.compile(r"```.*?```|`[^`\n]*+`", regex.DOTALL)
Target = Literal["prompt", *SCRIPT]  # type: ignore[valid-type]
"""The language to think in; `prompt`: that of the row's problem."""
WINDOW = 8
# Below it, the identifier is not trusted to contradict what is expected. docs/rewards.md has the measurement.
SURE = 0.7
# Japanese is written in Kana and Han; a text with less Kana than this share of both is Chinese.
KANA_SHARE = 0.1


def language(completion: str, row: dict, target: Target = "prompt") -> float | None:
    """`language_share` of what is thought; 0 if nothing is, as far as the thinking got if it was cut off.

    Words in `target` in the thinking / words in the thinking. Range [0, 1]; None for a thought without a word. With
    "prompt" as `target` it is the language of the row's `problem`. Source: DeepSeek-R1 (arXiv 2501.12948), section
    2.3.2: "the proportion of target language words in the CoT".
    """
    thought = thinking_of(completion)
    if not thought.strip():
        return 0.0
    return language_share(thought, problem_language(row.get("problem", "")) if target == "prompt" else target)


def language_share(text: str, target: str) -> float | None:
    """The share of words in `target` (ISO 639-1, of `config.languages`); None if there is no word.

    Range [0, 1]. Tags, LaTeX, code, numbers and single Latin letters are no words. Words of a script that several
    languages share are judged `WINDOW` at a time, and count as `target` unless another is `SURE`ly meant.
    """
    words = _words(text)
    if not words:
        return None
    script = SCRIPT[target]
    own = [word for written, word in words if written == script]
    if len(BY_SCRIPT[script]) == 1:
        return len(own) / len(words)
    windows = [own[i : i + WINDOW] for i in range(0, len(own), WINDOW)]
    # Too few words to judge are judged with those before them.
    if len(windows) > 1 and len(windows[-1]) < WINDOW:
        windows[-2:] = [windows[-2] + windows[-1]]
    return sum(len(window) for window in windows if _language_of(window, target) == target) / len(words)


@functools.lru_cache(maxsize=4096)
def problem_language(problem: str) -> str:
    """The language of most words of `problem`: for short Latin text, and without a word, English."""
    words = _words(problem)
    known = Counter(script for script, _ in words if script in BY_SCRIPT)
    if not known:
        return "en"
    script = known.most_common(1)[0][0]
    return _language_of([word for written, word in words if written == script], BY_SCRIPT[script][0])


def _words(text: str) -> list[tuple[str | None, str]]:
    """Scripts and words of `text`. Han counts as Kana in a Japanese text."""
    for ignored in (CODE, LATEX, TAG):
        text = ignored.sub(" ", text)
    words = [(found.lastgroup, found.group()) for found in WORD.finditer(text)]
    scripts = Counter(script for script, _ in words)
    if scripts["Kana"] > KANA_SHARE * (scripts["Kana"] + scripts["Han"]):
        words = [("Kana" if script == "Han" else script, word) for script, word in words]
    return words


def _language_of(words: list[str], expected: str) -> str:
    """The language of words in one script: `expected`, unless the identifier is sure of another."""
    script = SCRIPT[expected]
    if len(BY_SCRIPT[script]) == 1:
        return expected
    found, confidence = _identifier(script).classify(" ".join(words))
    return found if confidence >= SURE else expected


@functools.cache
def _identifier(script: str) -> LanguageIdentifier:
    identifier = copy.copy(_model())
    # With fewer to choose from, short text is identified more reliably.
    identifier.set_languages(BY_SCRIPT[script])
    return identifier


@functools.cache
def _model() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
