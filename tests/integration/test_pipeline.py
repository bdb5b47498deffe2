"""A recipe from its YAML to `summary.json`: what is run, what is skipped and why, and what a kill leaves."""

import json
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_GRPO, kill_launched, launch, metrics, python, write_yaml
from transformers import AutoModelForCausalLM

from r1dist.errors import EXIT_INTERRUPTED
from r1dist.pipeline.table import stage_table

LONGEST_DELAY = 3.0
ASKED = "sft/metrics.jsonl"

SMALL_SFT = {
    "model": {"path": "tiny"},
    "data": {"sources": [{"path": "nowhere.jsonl", "conversation": "messages"}]},
    "max_steps": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_length": 256,
    "gradient_checkpointing": False,
    "save_steps": 3,
    "seed": 0,
}


def small_recipe(folder: Path) -> dict:
    """base -> samples -> sft -> rl, of seconds each; the stages' YAMLs are written into `folder`."""
    tiny = {"path": "tiny", "limit": 64}
    generator = {"name": "direct", "model": {"path": "tiny"}, "data": {"sources": [tiny]}, "per_prompt": 4}
    generator |= {"prompting": {"prefill": "<think>"}, "sampling": {"samples": 4, "max_tokens": 80}}
    evaluation = {
        "model": {"path": "tiny"},
        "data": {"sources": [{"path": "tiny", "split": "test", "limit": 40}]},
        "sampling": {"samples": 2, "max_tokens": 48},
        "rollout": {"engine": "transformers"},
    }
    rollout = {"engine": "transformers", "batch_size": 64}
    sampling = {"generators": [generator], "filters": {"language": None}, "rollout": rollout}
    write_yaml(folder / "samples.yaml", {**sampling, "output_dir": "unused"})
    write_yaml(folder / "sft.yaml", {**SMALL_SFT, "output_dir": "unused"})
    few = {"per_device_train_batch_size": 16, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    write_yaml(folder / "grpo.yaml", {**SMALL_GRPO, **few, "output_dir": "unused"})
    write_yaml(folder / "evaluate.yaml", evaluation)
    stages = [
        {"name": "base", "kind": "base", "model": "tiny"},
        {"name": "rl", "kind": "grpo", "config": "grpo.yaml", "inputs": {"model.path": "sft"}},
        {"name": "samples", "kind": "sample", "config": "samples.yaml", "inputs": {"generators.0.model.path": "base"}},
        {"name": "sft", "kind": "sft", "config": "sft.yaml"}
        | {"inputs": {"model.path": "base", "data.sources.0.path": "samples"}},
    ]
    goals = [{"stage": "sft", "score": "eval.format", "above": "base"}]
    tree = {"output_dir": str(folder / "run"), "stages": stages, "evaluate": "evaluate.yaml", "goals": goals}
    return {**tree, "accelerate": "configs/accelerate/zero2_cpu.yaml"}


@pytest.fixture
def pipeline(tmp_path):
    return small_recipe(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run's folder, and what was printed. Each test puts it back as it was: runs hold their own paths."""
    folder = tmp_path_factory.mktemp("recipe")
    done = launch("pipeline.py", "--config", written(folder, small_recipe(folder)))
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "run", folder / "whole")
    return folder, done.stdout


def written(tmp_path, tree) -> Path:
    return write_yaml(tmp_path / "pipeline.yaml", tree)


def acts(output: str) -> dict[str, tuple[str, str]]:
    """Step -> what was done with it, and why."""
    return {name: (act, why) for name, act, why in re.findall(r"^\[(\S+)\] (\w+): (.*)$", output, re.MULTILINE)}


def outcome(folder: Path) -> dict[str, tuple]:
    """Of each step: its state and the digests of what it read and what it left."""
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    return {
        name: (record["state"], record["exit_code"], record["output"], sorted(record["inputs"].values()))
        for name, record in sorted(steps.items())
    }


def as_it_was(folder: Path) -> Path:
    """The run's folder, put back; returns the recipe's YAML, written anew."""
    shutil.rmtree(folder / "run", ignore_errors=True)  # a test that failed may have left none
    shutil.copytree(folder / "whole", folder / "run")
    return written(folder, small_recipe(folder))


def test_a_recipe_runs_each_stage_in_its_turn(undisturbed):
    folder, printed = undisturbed
    as_it_was(folder)
    run = folder / "run"
    order = ["base.evaluation", "samples", "sft", "sft.evaluation", "rl", "rl.evaluation"]
    assert list(acts(printed)) == order
    summary = json.loads((run / "summary.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert list(stages) == ["base", "rl", "samples", "sft"]
    for name in ("base", "sft", "rl"):
        assert {"accuracy", "ci95", "format", "language", "mean_tokens"} <= stages[name]["eval"].keys()
    assert stages["sft"]["eval"]["format"] > stages["base"]["eval"]["format"]
    assert [goal["met"] for goal in summary["goals"]] == [True] and "met     sft: format" in printed
    assert stages["samples"]["data"]["rows"] > 40
    losses = [line["loss"] for line in metrics(run / "sft")]
    assert losses[-1] < losses[0]
    assert json.loads((run / "rl" / "run.json").read_text())["config"]["model"]["path"] == str(run / "sft")
    AutoModelForCausalLM.from_pretrained(run / "rl")
    record = json.loads((run / "manifest.json").read_text())["steps"]["sft"]
    assert record["settings"]["learning_rate"] == 1e-3 and set(record["inputs"]) == {
        "model.path", "data.sources.0.path", "accelerate"
    }  # fmt: skip


def test_a_stage_is_repeated_only_where_something_changed(undisturbed):
    folder, _ = undisturbed
    config, run = as_it_was(folder), folder / "run"
    first = outcome(run)
    done = launch("pipeline.py", "--config", config)
    assert done.returncode == 0, done.stderr
    assert {act for act, _ in acts(done.stdout).values()} == {"skip"} and outcome(run) == first

    # A filter drops some rows: the models after it are made anew, the base is not measured again.
    samples = (folder / "samples.yaml").read_text().replace("language: null", "language: null\n  min_tokens: 40")
    (folder / "samples.yaml").write_text(samples)
    done = launch("pipeline.py", "--config", config, "--until", "sft")
    assert done.returncode == 0, done.stderr
    told = acts(done.stdout)
    assert told["base.evaluation"][0] == "skip" and told["samples"] == ("again", "changed since: filters.min_tokens")
    assert told["sft"] == ("again", "changed since: data.sources.0.path") and told["sft.evaluation"][0] == "again"
    assert (run / "superseded" / "samples.1" / "rows.jsonl").exists() and "rl" not in told
    planned = launch("pipeline.py", "--config", config, "--dry_run", "--from", "rl").stdout
    assert acts(planned) == {"rl": ("again", "changed since: model.path"), "rl.evaluation": (
        "start", "what it needs is made first"
    )}  # fmt: skip

    (run / "rl" / "model.safetensors").write_bytes(b"scribble")
    planned = launch("pipeline.py", "--config", config, "--dry_run", "--only", "sft,rl").stdout
    assert acts(planned)["sft"][0] == "skip" and acts(planned)["rl"][0] == "again"

    shutil.rmtree(run / "samples")  # by hand: they are made again in their turn
    (run / "evaluations" / "sft.json").unlink()
    done = launch("pipeline.py", "--config", config, "--until", "base")
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads((run / "summary.json").read_text())["stages"]}
    assert "samples" not in stages and "eval" in stages["base"] and "eval" not in stages["sft"]


def test_killed_anywhere_the_same_command_comes_to_the_same(undisturbed):
    folder, _ = undisturbed
    config = as_it_was(folder)
    run, whole_run, log = folder / "run", folder / "whole", folder / "log"
    shutil.rmtree(run)
    # When to kill: up to some seconds after this file is there. Every stage has its turn, at another place each time.
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed of the moments: {seed}")
    moments = ["evaluations/base.json", "samples/samples/direct.jsonl", ASKED, "sft/checkpoint-3", "rl/metrics.jsonl",
               "rl/checkpoint-4"]  # fmt: skip
    for moment in moments:
        with log.open("a") as file:
            process = subprocess.Popen(
                [python(), "launch/pipeline.py", "--config", config], cwd=ROOT, stdout=file, stderr=file
            )
        began = time.monotonic()
        while not (run / moment).exists():
            assert process.poll() is None and time.monotonic() - began < 300, log.read_text()
            time.sleep(0.01)
        if moment == ASKED:  # to stop, and it saves first
            process.terminate()
            assert process.wait(120) == EXIT_INTERRUPTED, log.read_text()
            continue
        time.sleep(rng.uniform(0, LONGEST_DELAY))
        kill_launched()
        process.wait()
    done = launch("pipeline.py", "--config", config)
    assert done.returncode == 0, done.stderr
    assert log.read_text().count(" resume: ") + log.read_text().count(" again: cut off") >= 2
    whole = outcome(whole_run)
    here = outcome(run)
    assert here.keys() == whole.keys()
    assert (run / "samples" / "rows.jsonl").read_text() == (whole_run / "samples" / "rows.jsonl").read_text()
    assert here == whole
    for name in ("sft", "rl"):
        steps = [line["step"] for line in metrics(run / name)]
        assert steps == list(range(1, len(steps) + 1))


def test_a_dry_run_prints_the_commands_that_a_person_could_type(tmp_path, pipeline):
    done = launch("pipeline.py", "--config", written(tmp_path, pipeline), "--dry_run", "--seed", "3")
    assert done.returncode == 0, done.stderr
    commands = {name: line for name, line in re.findall(r"^\[(\S+)\] .*\n  (.*)$", done.stdout, re.MULTILINE)}
    assert commands["sft"].endswith("--seed 3") and "launch/sft.py" in commands["sft"]
    assert "--model.path tiny" in commands["sft"] and "accelerate" not in commands["samples"]
    assert f"--model.path {tmp_path / 'run' / 'sft'}" in commands["rl"]
    assert f"--data.sources.0.path {tmp_path / 'run' / 'samples' / 'rows.jsonl'}" in commands["sft"]
    assert not (tmp_path / "run").exists()


def test_a_chain_of_jobs_goes_from_stage_to_stage_and_does_not_submit_itself(tmp_path, pipeline):
    pipeline |= {"sbatch": {"nodes": 2}, "launcher": "job"}
    pipeline["stages"][1]["sbatch"] = {"time": "1:00:00"}
    config = written(tmp_path, pipeline)
    done = launch("pipeline.py", "--config", config, "--slurm", "chain", "--dry_run")
    assert done.returncode == 0, done.stderr
    jobs = {re.search(r"--job-name=r1dist-(\w+)", line)[1]: line for line in done.stdout.splitlines()}
    assert list(jobs) == ["base", "samples", "sft", "rl"]
    for name, line in jobs.items():
        assert "--nodes=2" in line and line.endswith(f"--slurm null --dry_run false --until {name}")
        assert ("--time=1:00:00" in line) == (name == "rl")
    assert not (tmp_path / "run").exists()
    planned = launch("pipeline.py", "--config", config, "--dry_run").stdout
    assert f"{ROOT / 'launch' / 'job.py'} sft --config" in planned and "accelerate" not in planned


def test_a_stage_that_fails_shows_its_last_lines_and_the_way_on(tmp_path, pipeline):
    samples = (tmp_path / "samples.yaml").read_text().replace("language: null", "min_tokens: 1000")
    (tmp_path / "samples.yaml").write_text(samples)
    done = launch("pipeline.py", "--config", written(tmp_path, pipeline))
    assert done.returncode == 2
    assert "`samples` failed with exit code 2" in done.stderr and "samples.log" in done.stderr
    assert "no sample is left. direct: 256 samples, dropped" in done.stderr and "continues from here" in done.stderr
    steps = json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"]
    assert steps["samples"]["state"] == "failed" and steps["base.evaluation"]["state"] == "finished"


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (1, {"inputs": {"model.path": "nowhere"}}, "takes `model.path` from `nowhere`, which is no stage"),
        (2, {"inputs": {"generators.0.model.path": "rl"}}, r"(\w+ -> ){3}\w+ is a cycle"),
        (1, {"config": None}, "`rl` needs `config`"),
        (1, {"kind": "dpo"}, "`stages.1.kind`"),
        (1, {"name": "sft"}, "two of them have the same name"),
        (1, {"inputs": {"modle.path": "sft"}}, "did you mean `model`"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(tmp_path, pipeline, stage, change, message):
    pipeline["stages"][stage].update(change)
    done = launch("pipeline.py", "--config", written(tmp_path, pipeline))
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"stage": "rl", "score": "eval.accuracy"}, "`eval.accuracy` of `rl` needs one of"),
        ({"stage": "rl", "score": "eval.accuracy", "above": "base", "at_least": 1}, "needs one of"),
        ({"stage": "rl", "score": "eval.accuracy", "above": "nowhere"}, "goals: there is no stage `nowhere`"),
        ({"stage": "rl", "score": "accuracy", "at_least": 1}, "`goals.0.score`"),
    ],
)
def test_a_goal_that_says_nothing_is_refused(tmp_path, pipeline, goal, message):
    done = launch("pipeline.py", "--config", written(tmp_path, {**pipeline, "goals": [goal]}))
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_mistake_in_any_stages_yaml_is_found_before_the_first_begins(tmp_path, pipeline):
    write_yaml(tmp_path / "grpo.yaml", {**SMALL_GRPO, "output_dir": "unused", "lerning_rate": 1})
    done = launch("pipeline.py", "--config", written(tmp_path, pipeline))
    assert done.returncode == 2 and "grpo.yaml" in done.stderr and "did you mean `learning_rate`?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_asked_for_must_be_there(tmp_path, pipeline):
    config = written(tmp_path, pipeline)
    done = launch("pipeline.py", "--config", config, "--only", "rl")
    assert done.returncode == 2 and "stage `rl` needs what `sft` leaves" in done.stderr
    done = launch("pipeline.py", "--config", config, "--until", "nowhere")
    assert done.returncode == 2 and "--until: there is no stage `nowhere`" in done.stderr
    (tmp_path / "run" / "manifest.json").write_text('{"steps": {"ba')
    done = launch("pipeline.py", "--config", config)
    assert done.returncode == 2 and "manifest.json is damaged" in done.stderr


def test_the_table_has_a_row_for_each_stage():
    scores = {"accuracy": 0.5, "ci95": [0.4, 0.6], "format": 1.0, "language": None, "mean_tokens": 12.5}
    stages = [{"name": name, "kind": "grpo", "seconds": 3, "eval": scores, "sampled": scores} for name in "ab"]
    lines = stage_table(stages).splitlines()
    assert len(lines) == 5 and "50.0 %" in lines[3] and " - " in lines[3]
    assert len({len(line) for line in lines[1:]}) == 1


def test_the_readmes_pipeline_is_the_demo():
    done = launch("pipeline.py", "--dry_run")
    assert done.returncode == 0
    assert str(ROOT / "configs/recipes/tiny/r1_zero.yaml") in done.stdout
