"""The shapes in which public datasets write answers and conversations."""

import re

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
STRATOS = re.compile(
    r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>", re.DOTALL
)


def gold_answer(text: str | None, answer_format: str) -> str | None:
    """The gold answer in `text`, or None where there is none."""
    if text is None:
        return None
    match answer_format:
        case "plain":
            answer = str(text)
        case "hashes":
            answer = text.rpartition("####")[2] if "####" in text else ""
        case "boxed":
            answer = last_boxed(text) or ""
    return answer.strip() or None


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced; None without one or where it never closes."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    begin = start + len(r"\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def turns(conversation: list[dict]) -> list[dict]:
    """A conversation of `role`/`content` or `from`/`value` turns as `role`/`content` turns."""
    return [
        {"role": ROLES[turn.get("role") or turn["from"]], "content": turn.get("content") or turn.get("value") or ""}
        for turn in conversation
    ]


def rewrite_stratos(completion: str) -> str | None:
    """Bespoke-Stratos' thought and solution marks as `<think>` and `<answer>` tags; None where they are missing."""
    found = STRATOS.search(completion)
    if found is None:
        return None
    return f"<think>{found[1].strip()}</think>\n<answer>{found[2].strip()}</answer>"
