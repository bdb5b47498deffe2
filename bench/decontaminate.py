"""Seconds that decontamination takes for 800,000 training rows: `python bench/decontaminate.py [--rows 800000]`.

Rows are GSM8K's training questions, again and again with other numbers; they are compared with all test problems of
GSM8K, MATH-500, SVAMP and MAWPS, on one core. The data lies beside the checkout (shared/data), or in `--data`. The
time includes that for reading the test problems, and is proportional to the rows where there are fewer. Prints JSON as
its last line.
"""

import argparse
import json
import logging
import random
import re
import time
from pathlib import Path

from datasets import Dataset
from result import aim, show, significant

from r1dist.config import Decontaminate, Source
from r1dist.data.decontaminate import decontaminate, words

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TESTS = {
    "gsm8k/test": "question",
    "math500/test": "problem",
    "svamp/test": ["Body", "Question"],
    "mawps/singleop": "input",
    "mawps/addsub": "input",
    "mawps/multiarith": "input",
}
ROWS = 800_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    rows = training_rows(options.data / "gsm8k" / "train.jsonl", options.rows)
    against = [Source(path=str(options.data / f"{name}.jsonl"), problem=column) for name, column in TESTS.items()]
    began = time.perf_counter()
    _, dropped = decontaminate([rows], Decontaminate(against=against))
    seconds = time.perf_counter() - began
    first = rows[:1000]["problem"]
    show(
        "decontaminate",
        {"seconds_800k": aim(seconds * ROWS / options.rows, 300, "lower")},
        rows=options.rows,
        seconds=significant(seconds),
        words_per_row=significant(sum(len(words(text)) for text in first) / len(first)),
        dropped=len(dropped),
    )


def training_rows(path: Path, count: int) -> Dataset:
    """`count` rows as `load_problems` gives them, the first ones as they are in the file."""
    rng = random.Random(0)
    questions = [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]
    problems = [
        questions[place] if place < len(questions) else other_numbers(questions[place % len(questions)], rng)
        for place in range(count)
    ]
    return Dataset.from_dict({"problem": problems, "earlier": [[]] * count, "source": ["train"] * count})


def other_numbers(text: str, rng: random.Random) -> str:
    return re.sub(r"\d+", lambda _: str(rng.randint(2, 999)), text)


if __name__ == "__main__":
    main()
