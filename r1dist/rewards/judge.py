"""An LLM as the judge: a server with OpenAI's chat API is asked for a score of each completion, once."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from ..config.rewards import Reward
from ..config.values import Expanded, PathText, Seed
from ..errors import UserError, did_you_mean
from ..files import append_lines, mend_lines, read_lines
from .calls import CallScorer, whole_row
from .math.accuracy import final_answer
from .pool import Pool
from .server import Endpoint, NoScore, ServerDown, ServerReward, shortened

SCORE = re.compile(r"(?<![^\W_])score[*_`]*:[\s*_`]*([-+]?\d+(?:\.\d+)?)(?!\w|[.,]?\d)", re.IGNORECASE)
"""Where a reply holds its score; what is written otherwise (`7,5`, `1e1`) is none."""
ENDING = "\n\nEnd your reply with the line `Score: N`, where N is a number from {lowest:g} to {highest:g}."
"""What every rubric is followed by."""
GIVEN = ("prompt", "completion", "final_answer")
"""Placeholders beside the row's columns."""


class Judge(ServerReward):
    """The scores, from 0 to 1, by the model `model` at `url`; `judgements` holds what it has said.

    Raises `UserError` for what cannot be asked. Nothing is asked yet.
    """

    def __init__(
        self, name: str, *, url: Annotated[Expanded, Field(description="the address of a server")],
        model: Annotated[str, Field(description="the model's name at the server")], rubric: str | None = None,
        rubric_file: PathText | None = None, lowest: float = 0, highest: float = 10, max_tokens: PositiveInt = 512,
        seed: Seed = 0, api_key_env: str | None = None,
    ):  # fmt: skip
        super().__init__(name, self.ask)
        self.endpoint = Endpoint(name, url, api_key_env)
        if lowest >= highest:
            raise UserError(f"rewards.{name}: `lowest` {lowest:g} is not below `highest` {highest:g}.")
        self.lowest, self.highest = lowest, highest
        self.settings = {"model": model, "temperature": 0, "seed": seed, "max_tokens": max_tokens}
        text = _rubric(name, rubric, rubric_file) + ENDING.format(lowest=lowest, highest=highest)
        self._parts = _parts(name, text)
        named = {field for _, field in self._parts if field is not None}
        if not named & {"completion", "final_answer"}:
            raise UserError(f"rewards.{name}: the rubric shows neither `{{completion}}` nor `{{final_answer}}`.")
        self.columns = named - {*GIVEN}
        self.judgements = Judgements()

    def messages(self, completion: str, row: dict) -> list[dict] | None:
        """What it is asked; None where the row lacks a value that the rubric names."""
        row = row | {"prompt": prompt_text(row["prompt"]), "completion": completion}
        row["final_answer"] = final_answer(completion).strip()
        if any(row[field] is None for _, field in self._parts if field is not None):
            return None
        text = "".join(before + ("" if field is None else _text(row[field])) for before, field in self._parts)
        return [{"role": "user", "content": text}]

    def digest(self, completion: str, row: dict) -> str:
        """By which `judgements` knows the question. The server's address is no part of it."""
        asked = [self.settings, self.lowest, self.highest, self.messages(completion, row)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    async def ask(self, completion: str, row: dict) -> float | None:
        """The score of one completion. Raises `ServerDown`, `Refused`, `NoScore`."""
        messages = self.messages(completion, row)
        if messages is None:
            return None
        answer = await self.endpoint.post("/chat/completions", {**self.settings, "messages": messages})
        reply, cut = _reply(answer)
        score = self.score(reply, cut)
        self.judgements.add(self.digest(completion, row), row, score, reply)
        return score

    def score(self, reply: str, cut: bool = False) -> float:
        """The last `Score: N` of a reply, scaled to 0..1. Raises `NoScore` if there is none within the bounds."""
        found = SCORE.findall(reply)
        if found and self.lowest <= float(found[-1]) <= self.highest:
            return (float(found[-1]) - self.lowest) / (self.highest - self.lowest)
        bounds = f"from {self.lowest:g} to {self.highest:g}"
        why = f", cut off at `max_tokens` {self.settings['max_tokens']}" if cut else ""
        raise NoScore(f"no `Score: N` {bounds} in the reply{why}: {shortened(reply)!r}")


class JudgeScorer:
    """Scores by `judge`, which is asked once for each question, whatever the number of rollouts that ask it."""

    def __init__(self, judge: Judge, reward: Reward, pool: Pool):
        self.judge = judge
        self._ask = CallScorer(judge, reward, {}, pool)

    def __call__(
        self, texts: list[str], rows: list[dict], heartbeat: Callable[[], None] = lambda: None
    ) -> list[float | None]:
        judgements = self.judge.judgements
        keys = [self.judge.digest(text, whole_row(row)) for text, row in zip(texts, rows, strict=True)]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key not in judgements.scores:
                first.setdefault(key, place)
        places = [*first.values()]
        found = self._ask([texts[i] for i in places], [rows[i] for i in places], heartbeat) if places else []
        for key, place, score in zip(first, places, found, strict=True):
            if key not in judgements.scores:  # it could not be asked, or has said nothing that is a score
                judgements.add(key, rows[place], score, None)
        return [judgements.scores[key] for key in keys]


class Judgements:
    """What a judge has said. In a run's folder each rank writes a file, and reads those of all.

    A line: `key`, the question's digest; `prompt_id`; `score`, null if it has said nothing that is one; `reply`.
    """

    def __init__(self) -> None:
        self.scores: dict[str, float | None] = {}
        self._file: Path | None = None

    def open(self, folder: Path, name: str, rank: int) -> None:
        """Take up what is in `folder`, and write there from now on. Raises `UserError` for a damaged file."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{name}.rank{rank}.jsonl"
        for path in sorted(folder.glob(f"{name}.rank*.jsonl")):
            mend_lines(path)  # all ranks do, before one writes
            self.scores |= {line["key"]: line["score"] for line in read_lines(path)}

    def add(self, key: str, row: dict, score: float | None, reply: str | None) -> None:
        if self._file is not None:
            line = {"key": key, "prompt_id": row.get("prompt_id"), "score": score, "reply": reply}
            append_lines(self._file, [line])
        self.scores[key] = score


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as text; of several messages, each with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def check_placeholders(judge: Judge, columns: set[str]) -> None:
    """Raises `UserError` if the rubric names what is neither given nor among the rows' `columns`."""
    for name in sorted(judge.columns - columns):
        raise UserError(
            f"rewards.{judge.key}: the rubric names `{{{name}}}`, which rows do not have"
            f"{did_you_mean(name, [*GIVEN, *columns])}\n"
            "Name a column of the data in `columns` of its source; braces of the text itself are doubled: {{ }}."
        )


def _rubric(name: str, rubric: str | None, file: str | None) -> str:
    if (rubric is None) == (file is None):
        raise UserError(f"rewards.{name}: it needs `rubric`, the text that the judge is given, or `rubric_file`.")
    if file is None:
        return rubric.strip()
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rewards.{name}: `rubric_file` {file} cannot be read: {error}.") from error


def _parts(name: str, rubric: str) -> list[tuple[str, str | None]]:
    """(text, the placeholder after it, or None) of a rubric. Raises `UserError` for braces that are no placeholder."""
    try:
        parts = [*Formatter().parse(rubric)]
    except ValueError as error:
        raise UserError(
            f"rewards.{name}: the rubric: {error}.\nBraces of the text itself are doubled: {{{{ and }}}}."
        ) from error
    for _, field, form, how in parts:
        if form or how:
            raise UserError(f"rewards.{name}: the rubric: `{{{field}}}` is a name alone, without `!` or `:`.")
    return [(text, field) for text, field, _, _ in parts]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _reply(answer: Any) -> tuple[str, bool]:
    """The reply's text, and whether it was cut off. Raises `ServerDown` for what is no answer of a chat API."""
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        return text.encode(errors="replace").decode(), choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerDown(f"no chat completion in the answer: {shortened(json.dumps(answer))}") from error
