"""Every rollout as a row of JSONL, written by the rank that made it."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import TRACES, read_lines
from .engine import Rollout


@dataclass(frozen=True)
class TraceRow:
    """One rollout as trained on: what was asked, what came, what it earned."""

    step: int
    prompt_id: int
    sample_index: int
    policy_version: int
    seed: int
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    rewards: dict[str, float | None]
    advantage: float
    prompt: str
    text: str

    @classmethod
    def of(
        cls,
        step: int,
        rollout: Rollout,
        rewards: dict[str, float | None],
        advantage: float,
        prompt: str,
        text: str,
    ) -> "TraceRow":
        request = rollout.request
        return cls(
            step=step,
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            policy_version=rollout.policy_version,
            seed=request.seed,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(rollout.token_ids),
            finish_reason=rollout.finish_reason,
            rewards=rewards,
            advantage=advantage,
            prompt=prompt,
            text=text,
        )


class TraceWriter:
    """Appends to `<run>/traces/rank<r>.jsonl`, a whole generation at a time."""

    def __init__(self, output_dir: str, rank: int):
        self.path = Path(output_dir) / TRACES / f"rank{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Forget what was written after the first `size` bytes."""
        if self.path.exists():
            os.truncate(self.path, min(size, self.size()))

    def all_rows(self) -> Iterator[dict]:
        """The rows of all ranks, as dictionaries."""
        for path in sorted(self.path.parent.glob("rank*.jsonl")):
            yield from read_lines(path)

    def write(self, rows: Iterable[TraceRow]) -> None:
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
