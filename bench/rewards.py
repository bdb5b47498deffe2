"""Answers verified per second by the pool, against math-verify in a plain loop.

`python bench/rewards.py [--rounds 3]` needs GSM8K beside the checkout (shared/data/gsm8k). Prints JSON as its last
line. The ratios alternate within one run; both sides verify the same answers against the same gold ones.

`stuck_limits`: what answers that no check recognises and that never end cost, in limits, beyond 1.2 times the clean
time.
`sandbox_per_core`: trivial programs a second, one after another.
`thread_ms`: processor milliseconds of the trainer's own thread, the most over rewards and hostile texts of 32,768
tokens.

Simplified: a hostile answer costs the loop at most math-verify's own clocks, of as many seconds as the pool's limit.
"""

import argparse
import functools
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify
from result import aim, show, significant
from thread_cost import NAMES, hostile_texts, thread_seconds

from r1dist.config import Verify
from r1dist.data.formats import gold_answer
from r1dist.rewards import VERIFIERS
from r1dist.rewards.code.sandbox import python, require_sandbox, run
from r1dist.rewards.math.accuracy import accuracy
from r1dist.rewards.pool import Pool

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
ANSWERS = 1024
LIMIT = 1
WORKERS = 2
PROGRAMS = 60
STUCK = "<answer>stuck</answer>"
HOSTILE = ("9^{9^{9^9}}", "10!!!!!!!!", "(" * 5000 + "1" + ")" * 5000, "\\binom{10^9}{5*10^8}", "\\int_0^1 x^x dx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from datasets import load_dataset  # here: the workers import this file, too

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would print the hostile answers, whole
    rows = load_dataset(str(GSM8K), split="train").select(range(ANSWERS))
    golds = [gold_answer(row["answer"], "hashes") for row in rows]
    clean = [f"<think>{row['answer']}</think><answer>{gold}</answer>" for row, gold in zip(rows, golds, strict=True)]
    mixed = [
        f"<answer>${HOSTILE[place // 100 % len(HOSTILE)]}$</answer>" if place % 100 == 0 else text
        for place, text in enumerate(clean)
    ]
    seconds: dict[str, list[float]] = {"loop": [], "pool": [], "loop hostile": [], "pool hostile": []}
    stuck = [STUCK if place % 100 == 0 else text for place, text in enumerate(clean)]
    over = []
    for _ in range(options.rounds):
        for name, texts in (("", clean), (" hostile", mixed)):
            seconds[f"loop{name}"].append(timed(by_loop, texts, golds))
            # Another pool each time: workers remember what they have parsed.
            with Pool(VERIFIERS, Verify(workers=WORKERS, seconds=LIMIT)) as pool:
                by_pool(pool, ["1"] * 64, ["2"] * 64)  # the workers come up
                seconds[f"pool{name}"].append(timed(functools.partial(by_pool, pool), texts, golds))
        with Pool({"accuracy": accuracy_or_stuck}, Verify(workers=WORKERS, seconds=LIMIT)) as pool:
            by_pool(pool, ["1"] * 64, ["2"] * 64)
            took = timed(functools.partial(by_pool, pool), stuck, golds)
            over.append((took - 1.2 * seconds["pool"][-1]) / LIMIT)
            print({how: round(values[-1], 2) for how, values in seconds.items() if values}, file=sys.stderr)
    ratios = {
        kind: [loop / pool for loop, pool in zip(seconds[f"loop{kind}"], seconds[f"pool{kind}"], strict=True)]
        for kind in ("", " hostile")
    }
    with Pool(VERIFIERS, Verify(workers=WORKERS)) as pool:
        texts = hostile_texts()
        in_thread = {name: 1000 * max(thread_seconds(name, text, pool) for text in texts) for name in NAMES}
    show(
        "rewards",
        {
            "clean_ratio": aim(ratios[""], 1.6, "higher"),
            "hostile_ratio": aim(ratios[" hostile"], 8, "higher"),
            "stuck_limits": aim(over, math.ceil(stuck.count(STUCK) / WORKERS), "lower"),
            "sandbox_per_core": aim(sandboxed_per_second(), 20, "higher"),
            "thread_ms": aim(max(in_thread.values()), 10, "lower"),
        },
        answers=ANSWERS,
        hostile=sum(one is not other for one, other in zip(clean, mixed, strict=True)),
        answers_per_second={name: ANSWERS / statistics.median(values) for name, values in seconds.items()},
        thread_ms={name: significant(most) for name, most in in_thread.items()},
    )


def timed(verified: Callable, texts: list[str], golds: list[str]) -> float:
    began = time.perf_counter()
    verified(texts, golds)
    return time.perf_counter() - began


def by_loop(texts: list[str], golds: list[str]) -> list[bool]:
    return [
        verify(parse(f"${gold}$"), parse(text.rpartition("<answer>")[2], parsing_timeout=LIMIT), timeout_seconds=LIMIT)
        for text, gold in zip(texts, golds, strict=True)
    ]


def by_pool(pool: Pool, texts: list[str], golds: list[str]) -> list[float | None]:
    return pool.scores("accuracy", texts, [{"answer": gold} for gold in golds])


def accuracy_or_stuck(text: str, row: dict) -> float | None:
    """`accuracy`, but for an answer that no check recognises and that never comes to an end."""
    while text == STUCK:
        pass
    return accuracy(text, row)


def sandboxed_per_second() -> float:
    require_sandbox()
    began = time.perf_counter()
    for _ in range(PROGRAMS):
        assert run([python(), "-c", "print(1)"]).stdout == b"1\n"
    return PROGRAMS / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
