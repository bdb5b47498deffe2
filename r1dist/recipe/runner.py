"""Runs the stages of a pipeline and puts what each of them achieved into `summary.json`.

Every stage is a command that a person could type; it is printed before it is started.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ..config import PipelineRun, Stage
from ..errors import UserError
from ..files import write_json
from ..report.table import stage_table

LAUNCHERS = {"grpo": "grpo.py", "sft": "sft.py"}


class Runner:
    """One pass over the stages of `run`.

    Args:
        run: The pipeline.
        configs: The folder of the pipeline's YAML, which the stages' YAMLs lie beside.
        launch: The folder of the launchers.
    """

    def __init__(self, run: PipelineRun, configs: Path, launch: Path):
        self.run = run
        self.configs = configs
        self.launch = launch
        self.folder = Path(run.output_dir)
        self._check()

    def model_of(self, name: str) -> str:
        """The model that the stage `name` leaves."""
        stage = next(stage for stage in self.run.stages if stage.name == name)
        return stage.model if stage.kind == "base" else str(self.folder / name)

    def train_command(self, stage: Stage) -> list[str]:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", self.run.accelerate]
        script = [str(self.launch / LAUNCHERS[stage.kind]), "--config", str(self.configs / stage.config)]
        overrides = ["--model.path", self.model_of(stage.start), "--output_dir", self.model_of(stage.name)]
        if stage.kind == "grpo" and self.run.engine is not None:
            overrides += ["--rollout.engine", self.run.engine]
        return [*accelerate, *script, *overrides, "--seed", str(self.run.seed)]

    def evaluate_command(self, stage: Stage) -> list[str]:
        script = [sys.executable, str(self.launch / "evaluate.py"), "--config", str(self.configs / self.run.evaluate)]
        return [*script, "--model.path", self.model_of(stage.name), "--output", str(self.evaluation(stage))]

    def evaluation(self, stage: Stage) -> Path:
        return self.folder / "evaluations" / f"{stage.name}.json"

    def commands(self) -> list[list[str]]:
        """All commands, in order."""
        listed = []
        for stage in self.run.stages:
            listed += [] if stage.kind == "base" else [self.train_command(stage)]
            listed.append(self.evaluate_command(stage))
        return listed

    def go(self) -> dict:
        """Run everything and return the summary, which is also in `<output_dir>/summary.json`."""
        if (self.folder / "summary.json").exists() or any((self.folder / s.name).exists() for s in self.run.stages):
            raise UserError(
                f"output_dir {self.folder} already holds a run.\nRemove it, or choose another --output_dir."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = []
        for stage in self.run.stages:
            began = time.monotonic()
            if stage.kind != "base":
                self._execute(stage, self.train_command(stage), stderr_to_log=True)
            # The evaluation's progress bar belongs on the terminal.
            self._execute(stage, self.evaluate_command(stage), stderr_to_log=False)
            scores = json.loads(self.evaluation(stage).read_text())
            seconds = round(time.monotonic() - began, 1)
            finished.append({"name": stage.name, "kind": stage.kind, "seconds": seconds, "eval": scores["greedy"]})
            finished[-1]["sampled"] = scores["sampled"]
            write_json(self.folder / "summary.json", {"seed": self.run.seed, "stages": finished})
            print(stage_table(finished), flush=True)
        return {"seed": self.run.seed, "stages": finished}

    def _check(self) -> None:
        known: set[str] = set()
        for stage in self.run.stages:
            if stage.kind == "base" and stage.model is None:
                raise UserError(f"stages: `{stage.name}` is a base stage and needs `model`.")
            if stage.kind != "base" and (stage.config is None or stage.start not in known):
                before = ", ".join(sorted(known)) or "none yet"
                raise UserError(
                    f"stages: `{stage.name}` needs `config`, and `start` naming a stage before it ({before})."
                )
            known.add(stage.name)

    def _execute(self, stage: Stage, command: list[str], stderr_to_log: bool) -> None:
        print(f"\n[{stage.name}] {shlex.join(command)}", flush=True)
        log = self.folder / "logs" / f"{stage.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file if stderr_to_log else None,
                text=True,
                env={"TOKENIZERS_PARALLELISM": "false", **os.environ},
            )
            for line in process.stdout:
                file.write(line)
                if line.startswith("step "):
                    print(f"  {line}", end="", flush=True)
        if process.wait():
            lines = log.read_text().splitlines()
            said = [line for line in lines if line.startswith("error: ")] or lines[-5:]
            raise UserError(
                f"stage `{stage.name}` failed with exit code {process.returncode}; see {log}:\n" + "\n".join(said[:5])
            )
