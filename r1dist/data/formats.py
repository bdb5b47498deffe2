"""The shapes in which public datasets write answers and conversations."""

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
STRATOS = re.compile(
    r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>", re.DOTALL
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
CALCULATION = re.compile(r"<<[^<>]*>>")
NESTED = re.compile(r"\\(?:boxed|fbox)")
COMMAND = r"\\[A-Za-z]+(?:\{[^{}]*\})+"
BARE_BOX = re.compile(rf"\\(boxed|fbox)(?:\s+([^\s{{}}\\$]*[^\s{{}}\\$.,;:])|\s*(\d+|{COMMAND}))")


class UnusableRow(ValueError):
    """A row that is left out. The message is what it comes with, such as "no answer"."""


def as_text(value: Any) -> str | None:
    """A text or a number as text, whole numbers without decimals ("14" for 14.0); None for anything else."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else str(int(value)) if value.is_integer() else repr(value)
    return str(value) if isinstance(value, str | int | Decimal) else None


def gold_answer(value: Any, answer_format: str) -> str | None:
    """The gold answer in a text or number, or None where there is none."""
    text = as_text(value)
    if text is None:
        return None
    match answer_format:
        case "plain":
            answer = text
        case "hashes":
            answer = text.rpartition("####")[2] if "####" in text else ""
        case "boxed":
            answer = last_boxed(text) or ""
    return answer.strip() or None


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` or `\fbox{}` of `text` holds; None without one, or where it never closes."""
    text = with_braces(text)
    begin, end = max(boxes(text), default=(0, None))
    return None if end is None else text[begin:end]


def with_braces(text: str) -> str:
    r"""`\boxed 5` and `\\boxed{5}` as `\boxed{5}`."""
    return BARE_BOX.sub(lambda found: rf"\{found[1]}{{{found[2] or found[3]}}}", text.replace(r"\\boxed", r"\boxed"))


def boxes(text: str) -> Iterator[tuple[int, int | None]]:
    r"""(begin, end) of what each innermost `\boxed{}` or `\fbox{}` holds, in the order of their ends.

    Braces are balanced, escaped ones aside. Those that never close come last, with None for their end.
    """
    opened: list[int | None] = []
    for found in BOX.finditer(text):
        if found[0].endswith("{") and found[0] != r"\{":
            opened.append(found.end() if len(found[0]) > 1 else None)
        elif found[0] == "}" and opened:
            begin = opened.pop()
            if begin is not None and not NESTED.search(text, begin, found.start()):
                yield begin, found.start()
    yield from ((begin, None) for begin in opened if begin is not None)


def turns(conversation: Any) -> list[dict]:
    """A conversation of `role`/`content` or `from`/`value` turns as `role`/`content` turns.

    An empty system turn is dropped. Raises `UnusableRow` for what is no such conversation, has no turns, one that says
    nothing or is no text, or one of a role that is not in `ROLES`.
    """
    found = []
    for turn in conversation if isinstance(conversation, list) else []:
        if not isinstance(turn, dict):
            raise UnusableRow("a turn without a role")
        role = str(turn.get("role") or turn.get("from"))
        if role not in ROLES:
            raise UnusableRow(f"a turn of the role `{role}`")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if isinstance(content, list):
            content = "".join(_part_text(part) for part in content)
        text = as_text(content)  # a number where `datasets` took a text for one, among turns of several shapes
        if text is None and content is not None:
            raise UnusableRow("a turn that is no text")
        if text and not text.isspace():
            found.append({"role": ROLES[role], "content": text})
        elif ROLES[role] != "system":
            raise UnusableRow("an empty turn")
    if not found:
        raise UnusableRow("no turns")
    return found


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise UnusableRow("a turn that is no text")
    return text


def question(conversation: list[dict]) -> tuple[str | None, list[dict], str]:
    """`turns` that end with a question as (system prompt, the `question` and `reply` of each turn before, question).

    Raises `UnusableRow` if they end otherwise, or the user's and the assistant's do not take turns.
    """
    system = conversation[0]["content"] if conversation[0]["role"] == "system" else None
    rest = conversation[system is not None :]
    if not rest or rest[-1]["role"] != "user":
        raise UnusableRow("no question of the user at the end")
    if [turn["role"] for turn in rest[:-1]] != ["user", "assistant"] * (len(rest) // 2):
        raise UnusableRow("turns that do not alternate")
    pairs = zip(rest[:-1:2], rest[1::2], strict=True)
    earlier = [{"question": asked["content"], "reply": said["content"]} for asked, said in pairs]
    return system, earlier, rest[-1]["content"]


def as_turns(exchange: dict) -> list[dict]:
    """The two turns of an exchange, as `question` gives them."""
    return [
        {"role": "user", "content": exchange["question"]},
        {"role": "assistant", "content": exchange["reply"]},
    ]


def rewrite_stratos(completion: str) -> str | None:
    """Bespoke-Stratos' thought and solution marks as `<think>` and `<answer>` tags; None where they are missing."""
    found = STRATOS.search(completion)
    if found is None:
        return None
    return f"<think>{found[1].strip()}</think>\n<answer>{found[2].strip()}</answer>"


def rewrite_hashes(solution: str) -> str | None:
    """GSM8K's worked solution, which ends in `####` and the answer, as a thought and an answer in their tags.

    Without its calculator annotations (`<<48/2=24>>`). None where the solution or the answer is missing.
    """
    thought, _, answer = (part.strip() for part in CALCULATION.sub("", solution).rpartition("####"))
    return f"<think>{thought}</think>\n<answer>{answer}</answer>" if thought and answer else None
