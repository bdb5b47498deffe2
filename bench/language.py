"""How surely a problem's language is told, by its number of words, and how fast: `python bench/language.py`.

The sentences of bench/sentences.tsv, 40 in each language, cut to their first words (Chinese: characters). What is
printed are the tables of docs/rewards.md.
"""

import time
from collections import defaultdict
from pathlib import Path

from r1dist.rewards.language import language_share, problem_language

WORDS = (1, 2, 4, 8, 16)
ROUNDS = 25


def main() -> None:
    sentences = defaultdict(list)
    for line in Path(__file__).with_name("sentences.tsv").read_text(encoding="utf-8").splitlines():
        language, sentence = line.split("\t")
        sentences[language].append(sentence)
    print(f"| words | {' | '.join(map(str, WORDS))} |")
    print("|---" * (len(WORDS) + 1) + "|")
    for language, texts in sentences.items():
        right = [sum(problem_language(cut(text, language, n)) == language for text in texts) for n in WORDS]
        print(f"| `{language}` | {' | '.join(f'{count / len(texts):.0%}' for count in right)} |")
    print()
    for language, texts in sentences.items():
        begin = time.perf_counter()
        shares = [language_share(text, language) for text in texts * ROUNDS]
        speed = len(shares) / (time.perf_counter() - begin)
        print(f"`{language}`: {speed:,.0f} texts per second, mean share {sum(shares) / len(shares):.3f}")


def cut(sentence: str, language: str, words: int) -> str:
    return sentence[:words] if language == "zh" else " ".join(sentence.split()[:words])


if __name__ == "__main__":
    main()
