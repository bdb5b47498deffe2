"""Runs the missing steps of a recipe, and records them.

Every step is a command that a person could type; it is printed before it is started. A step that is done is
not done again while nothing it depends on has changed; an interrupted one resumes from its own checkpoint.
"""

import functools
import json
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ..config.trackers import PACKAGES
from ..config.tree import differences
from ..errors import Interrupted, StageFailed, UserError
from ..files import CHECKSUMS, lock_run_dir, versions, write_json
from ..publish.account import require_account
from ..run.children import code_noted, end_with_parent, forget, handing_on, last_words
from ..run.forked import Forked, import_for_forks
from .cards import write_cards
from .goals import judge
from .graph import EVALUATION, Graph, Step, missing_packages
from .manifest import Manifest, digest, inputs_of, settings_of
from .page import write_page
from .table import goals_list, stage_table

SHOWN = ("step ", "hub: ", *(f"{tracker}: " for tracker in PACKAGES))
"""How the lines of a stage begin that are for the terminal, besides its log."""


@dataclass(frozen=True)
class Decision:
    """What to do with a step, and why."""

    act: Literal["skip", "start", "resume", "again"]
    """`again`: what is there is put aside first."""
    reason: str


class Runner:
    """One pass over the chosen steps of `graph`."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.folder = graph.folder
        self.manifest = Manifest(self.folder)

    def plan(self) -> str:
        """What `run` would do, as far as it can be known before the first command has run."""
        lines, changing = [], set()
        for step in self.graph.chosen():
            if changing & set(step.needs):
                decision = Decision("start", "what it needs is made first")
            else:
                decision = self.decide(step, inputs_of(step))
            if decision.act != "skip":
                changing.add(step.name)
            lines += [f"[{step.name}] {decision.act}: {decision.reason}", f"  {shlex.join(step.command)}"]
        if missing := missing_packages(self._unfinished()):
            lines.append(f"It would be refused: {missing}")
        return "\n".join(lines)

    def run(self) -> dict:
        """Do what is missing and return the summary, which is also in `<output_dir>/summary.json`.

        Raises `StageFailed`, or `UserError` if another runner is at work in the folder, a package is missing, or a
        stage is to be uploaded and the hub refuses the token.
        """
        if missing := missing_packages(self._unfinished()):
            raise UserError(missing)
        if any(step.config.get("push_to_hub") for step in self._unfinished()):
            require_account()
        with lock_run_dir(self.folder):
            self.manifest = Manifest(self.folder)
            for step in self.graph.chosen():
                self._require_inputs(step)
                inputs = inputs_of(step)
                decision = self.decide(step, inputs)
                print(f"\n[{step.name}] {decision.act}: {decision.reason}", flush=True)
                if decision.act != "skip":
                    self._do(step, decision, inputs)
                summary = self._summarise()
                if step.name.endswith(EVALUATION):
                    print(stage_table(summary["stages"]), flush=True)
            print(goals_list(summary["goals"]), flush=True)
            write_page(self.folder, summary, self.graph.edges())
            trained = [step for step in self.graph.steps.values() if step.trains and self._is_finished(step.name)]
            write_cards(self.graph, trained, summary)
            return summary

    def _unfinished(self) -> list[Step]:
        steps = self.manifest.steps
        return [step for step in self.graph.chosen() if steps.get(step.name, {}).get("state") != "finished"]

    def decide(self, step: Step, inputs: dict[str, str]) -> Decision:
        """Compare the step, with the digests of what it reads now, with its record."""
        record = self.manifest.steps.get(step.name)
        there = _holds_something(step.folder)
        if record is None:
            return Decision("again", "not in the manifest") if there else Decision("start", "not done yet")
        changed = differences(record["inputs"], inputs)
        changed += differences(record["settings"], settings_of(step, inputs), step.run_class)
        if changed:
            return Decision("again" if there else "start", f"changed since: {', '.join(changed[:5])}")
        if record["state"] != "finished":
            if not there:
                return Decision("start", "cut off before it left anything")
            if step.trains and not _checkpoints(step.folder):
                return Decision("again", "cut off before its first checkpoint")
            return Decision("resume", "cut off in the middle")
        if not step.output.exists() or digest(step.output) != record["output"]:
            return Decision("again" if there else "start", f"{step.output} is not what it left")
        now = versions()
        other = [f"{name} {record['versions'].get(name)}" for name in differences(record["versions"], now)]
        note = f" (though made with {', '.join(other)})" if other else ""
        return Decision("skip", f"done, and nothing it depends on has changed{note}")

    def _require_inputs(self, step: Step) -> None:
        for name in step.needs:
            needed = self.graph.steps[name]
            if not self._is_finished(name):
                raise UserError(
                    f"stage `{step.stage.name}` needs what `{name}` leaves ({needed.output}), and that is not there. "
                    f"Run `{name}` first: --until {step.stage.name} runs all that it needs."
                )

    def _is_finished(self, name: str) -> bool:
        """Whether the step was done, and what it left has not been removed since."""
        done = self.manifest.steps.get(name, {}).get("state") == "finished"
        return done and self.graph.steps[name].output.exists()

    def _do(self, step: Step, decision: Decision, inputs: dict[str, str]) -> None:
        if decision.act == "again":
            self._put_aside(step)
        resumes = decision.act == "resume" and step.trains
        command = [*step.command, "--resume", "auto"] if resumes else step.command
        print(shlex.join(command), flush=True)
        before = self.manifest.steps.get(step.name, {}) if decision.act == "resume" else {}
        record = {
            "state": "running",
            "command": step.command,
            "settings": settings_of(step, inputs),
            "inputs": inputs,
            "versions": versions(),
            "started": before.get("started", _now()),
        }
        self.manifest.write(step.name, record)
        if step.trains:
            forget(step.folder)
        began = time.monotonic()
        code, asked = self._execute(step, command)
        record |= {
            "exit_code": code,
            "ended": _now(),
            # of the last start alone, if it was cut off before
            "seconds": round(time.monotonic() - began, 1),
        }
        if code and asked and not step.trains:
            self.manifest.write(step.name, record | {"state": "failed"})
            raise Interrupted(f"`{step.name}` was interrupted. The same command continues.")
        if code:
            code = code_noted(step.folder, code)
            self.manifest.write(step.name, record | {"state": "failed", "exit_code": code})
            raise StageFailed(self._failure(step, code), code)
        self.manifest.write(step.name, record | {"state": "finished", "output": digest(step.output)})
        if asked:
            raise Interrupted(f"`{step.name}` is done, the others are not started. The same command continues.")

    def _execute(self, step: Step, command: list[str]) -> tuple[int, bool]:
        """The command's exit code, and whether this runner was asked to stop in the meantime."""
        log = self._log(step)
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            # An evaluation's or a sampling's progress bar belongs on the terminal.
            stderr = file if step.trains else None
            env = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
            process: Forked | subprocess.Popen
            if self._forks:
                process = Forked(command[1:], stderr, env)
            else:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, preexec_fn=end_with_parent
                )
            with handing_on(step.name, process, step.folder if step.trains else None) as asked:
                for line in process.stdout:
                    file.write(line)
                    if line.startswith(SHOWN):
                        print(f"  {line}", end="", flush=True)
                return process.wait(), bool(asked)

    @functools.cached_property
    def _forks(self) -> bool:
        """Whether steps run in forks of this process. It is asked before the first one is started."""
        return self.graph.run.launcher == "accelerate" and import_for_forks(self.graph.modules(self._unfinished()))

    def _failure(self, step: Step, code: int) -> str:
        log = self._log(step)
        return (
            f"`{step.name}` failed with exit code {code}; {log} has everything that it printed:\n"
            + "\n".join(f"  {line}" for line in last_words((log, 0)))
            + "\nWhat is done is kept: the same command continues from here."
        )

    def _log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.log"

    def _put_aside(self, step: Step) -> None:
        """Nothing is deleted: what is there moves to `superseded`."""
        attic = self.folder / "superseded"
        attic.mkdir(exist_ok=True)
        number = 1
        while (attic / f"{step.folder.name}.{number}").exists():
            number += 1
        aside = step.folder.rename(attic / f"{step.folder.name}.{number}")
        print(f"  what was there is now in {aside}", flush=True)

    def _summarise(self) -> dict:
        stages = []
        for stage in self.graph.run.stages:
            record = self.manifest.steps.get(stage.name, {})
            evaluation = self.manifest.steps.get(stage.name + EVALUATION, {})
            finished = [name for name in (stage.name, stage.name + EVALUATION) if self._is_finished(name)]
            if not finished:
                continue
            entry = {"name": stage.name, "kind": stage.kind}
            entry["seconds"] = round(record.get("seconds", 0) + evaluation.get("seconds", 0), 1)
            if stage.name + EVALUATION in finished:
                scores = json.loads(self.graph.steps[stage.name + EVALUATION].output.read_text())
                entry |= {"eval": scores["greedy"], "sampled": scores["sampled"]}
                entry |= {part: scores[part] for part in ("requests", "benchmarks") if part in scores}
            if stage.kind == "sample":
                entry["data"] = json.loads((self.folder / stage.name / "report.json").read_text())
            if stage.kind == "reward_model":
                measured = self.folder / stage.name / "evaluation.json"
                entry |= {"scores": json.loads(measured.read_text())} if measured.exists() else {}
            stages.append(entry)
        by_name = {stage["name"]: stage for stage in stages}
        goals = [judged for goal in self.graph.run.goals if (judged := judge(goal, by_name)) is not None]
        summary = {"seed": self.graph.run.seed, "stages": stages, "goals": goals}
        write_json(self.folder / "summary.json", summary)
        return summary


def _checkpoints(folder: Path) -> bool:
    return any(folder.glob(f"checkpoint-*/{CHECKSUMS}"))


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
