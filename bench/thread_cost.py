"""What the longest completions cost the trainer's own thread, by reward."""

import time

from r1dist.config import Reward
from r1dist.rewards import Rewards
from r1dist.rewards.pool import Pool
from r1dist.rewards.registry import BUILT_IN, MODELS

TOKENS = 32_768
CHARACTERS = 4 * TOKENS
FIELDS = {"cosine": {"max_tokens": TOKENS}, "overlong": {"max_tokens": TOKENS, "cache_tokens": 1}}
NAMES = [name for name in BUILT_IN if name not in MODELS and name != "judge"]
"""Rewards that run or ask no model."""
PIECES = (
    *("a", "a b ", "1", "1. ", "\n", " ", "<", "é", "中", "语言 mixed ", "🙂", "\u0301", "\x00"),
    *("\\( ", "\\[ ", "$ ", "$a\n", "$$", "`", "`a\n", "```\n", "```python\n", "\\a", "{", "a'", "\\boxed{"),
    *("<think>", "</think>", "<answer>", "<think></think>", "<answer></answer>", "<think></think><answer>"),
    *(
        "Step 1: ",
        "\n- ",
        "\n1. ",
        "First ",
        "The quick brown fox jumps over the lazy dog. ",
        "Пусть даны два числа. ",
    ),
)


def hostile_texts() -> list[str]:
    """Texts of that length: one piece again and again, plainly, as a thought, and in and around an answer."""
    bodies = [(piece * (CHARACTERS // len(piece) + 1))[:CHARACTERS] for piece in PIECES]
    thoughts = [f"<think>a{body}</think><answer>b</answer>" for body in bodies]
    halves = [body[: CHARACTERS // 2] for body in bodies]
    return [*bodies, *thoughts, *(f"<think>a</think>{half}<answer>b{half}</answer> c" for half in halves)]


def thread_seconds(name: str, text: str, pool: Pool, tries: int = 3) -> float:
    """Processor seconds of this thread that the reward `name` takes for one completion; waiting is none."""
    rewards = Rewards({name: Reward(parameters=FIELDS.get(name, {}))}, pool)
    row = {"kind": "math", "problem": "1+1?", "answer": "2", "tests": None, "language": "python"}
    row |= {"tokens": TOKENS, "group_tokens": [1, TOKENS]}
    seconds = []
    for rollout in range(tries):  # the least, since others use the machine, too
        began = time.thread_time()
        rewards.begin((0, 0, rollout), 0, text, row)
        rewards.score([(0, 0, rollout)], 0, [text], [row])
        seconds.append(time.thread_time() - began)
    return min(seconds)
