"""Jobs on a real SLURM of two nodes: each kind of job, and each way in which one can end."""

import json
import os
import re
import shlex
import signal
import stat
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, launch, metrics, write_yaml
from machines import CORES, MEMORY, until
from small_runs import SFT, SMALL_GRPO

from r1dist.cluster.allocation import Cluster

SCRIPTS = ROOT / "launch" / "slurm"
PAGES = [ROOT / "README.md", ROOT / "docs" / "cluster.md", *sorted(SCRIPTS.glob("*.slurm"))]
DOCUMENTED = [
    line for page in PAGES for line in re.findall(r"\bsbatch (--.*launch/slurm/\w+\.slurm)", page.read_text())
]


def submit(slurm, kind: str, log: Path, *words, options: tuple[str, ...] = ("--nodes=2",)) -> str:
    return slurm.submit(*options, f"--output={log}", str(SCRIPTS / f"{kind}.slurm"), *map(str, words))


def last_line(log: Path) -> str:
    return log.read_text().splitlines()[-1]


def steps(folder: Path) -> list[int]:
    return [round(line["step"]) for line in metrics(folder)] if (folder / "metrics.jsonl").exists() else []


def left_behind(folder: Path) -> list[str]:
    """Processes that still know of `folder`."""
    named = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [words for words in named if str(folder) in words]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_a_documented_line_gets_whole_nodes(slurm, tmp_path, line):
    options = shlex.split(line)
    nodes = next((int(word[len("--nodes=") :]) for word in options if word.startswith("--nodes=")), 1)
    step = "scontrol show step -o $SLURM_JOB_ID.$SLURM_STEP_ID; echo cores=$SLURM_CPUS_ON_NODE"
    srun = Cluster("job", ("any",) * nodes, ("",) * nodes).on(0, nodes)
    srun = shlex.join(word for word in srun if not word.startswith("--nodelist"))
    launcher = tmp_path / "python"  # in the place of the launcher's
    launcher.write_text(f"#!/bin/sh\nscontrol show job -o $SLURM_JOB_ID\n{srun} sh -c '{step}'\n")
    launcher.chmod(0o755)
    array = "--array" in line
    log = tmp_path / ("job-0.log" if array else "job.log")
    output = f"--output={tmp_path}/{'job-%a.log' if array else 'job.log'}"
    job = slurm.submit(f"--export=ALL,R1DIST_PYTHON={launcher}", output, *options)
    assert slurm.ended(f"{job}_0" if array else job, 120) == "COMPLETED", log.read_text()
    whole = f"TRES=cpu={CORES * nodes},mem={MEMORY * nodes}M,node={nodes}"
    lines = log.read_text().splitlines()
    seen = [line for line in lines if line.startswith(("JobId=", "StepId="))]
    assert len(seen) == 1 + nodes and all(whole in line and "TresPerNode=gres:gpu:8" in line for line in seen), lines
    assert lines.count(f"cores={CORES}") == nodes, lines


@pytest.fixture
def sft(tmp_path) -> Path:
    """A training of two nodes, one process each, that saves every 20 steps."""
    tree = {**SFT, "output_dir": str(tmp_path / "run"), "save_steps": 20, "resume": "auto"}
    return write_yaml(tmp_path / "sft.yaml", tree)


def test_servers_on_one_node_training_on_the_other_and_a_server_killed(slurm, tmp_path):
    run = tmp_path / "run"
    serve = {"cores": 1, "max_model_len": 512}
    tree = {**SMALL_GRPO, "output_dir": str(run), "rollout": {"engine": "vllm", "serve": serve}, "max_steps": 8}
    log = tmp_path / "job.log"
    job = submit(slurm, "grpo", log, "--config", write_yaml(tmp_path / "grpo.yaml", tree))
    slurm.until(job, lambda: len(steps(run)) >= 2, 240, "two steps")
    endpoints = json.loads((run / "servers" / "n2.json").read_text())
    assert stat.S_IMODE((run / "servers" / "token").stat().st_mode) == 0o600
    assert endpoints["token"] == (run / "servers" / "token").read_text()
    assert endpoints["servers"][0]["url"].startswith("http://127.0.0.12:")
    os.kill(endpoints["servers"][0]["pid"], signal.SIGKILL)
    assert slurm.ended(job, 300) == "COMPLETED", log.read_text()
    assert steps(run) == list(range(1, 9)) and (run / "model.safetensors").exists()
    rows = [json.loads(line) for path in (run / "traces").glob("*.jsonl") for line in path.open()]
    assert max(line["rollout/logp_diff"] for line in metrics(run)) < 1e-3
    assert len({(row["step"], row["prompt_id"], row["sample_index"]) for row in rows}) == len(rows) == 8 * 32
    assert "1 node, 1 server" in log.read_text() and "shm" in log.read_text()
    until(lambda: not left_behind(run), 20, f"the end of {left_behind(run)}")


def test_the_time_limit_puts_a_training_of_two_nodes_back_until_it_is_done(slurm, tmp_path, sft):
    run, log = tmp_path / "run", tmp_path / "job.log"
    tree = {**yaml.safe_load(sft.read_text()), "max_steps": 100_000}
    write_yaml(sft, tree)
    began = time.monotonic()
    job = submit(slurm, "sft", log, "--config", sft, options=("--nodes=2", "--time=30", "--signal=B:USR1@10"))
    slurm.until(job, lambda: len(steps(run)) >= 25, 180, "a few steps")
    # SLURM looks at its limits every half minute, and warns as much too early; past the limit it warns of nothing.
    limit = 1 + (time.monotonic() - began + 40) // 60
    slurm.ask("scontrol", "update", f"jobid={job}", f"timelimit={limit:.0f}")
    slurm.until(job, lambda: int(slurm.job(job)["Restarts"]) >= 1, 150, "it was put back")
    end = steps(run)[-1] + 40  # a training's length may change while it is stopped
    write_yaml(sft, {**tree, "max_steps": end})
    slurm.ask("scontrol", "update", f"jobid={job}", "timelimit=30")
    assert "requeued: " in log.read_text() and f"step {end - 40} is saved" in log.read_text()
    assert slurm.ended(job, 300) == "COMPLETED", log.read_text()
    assert steps(run) == list(range(1, end + 1))
    assert list(run.glob("logs/ranks-*")) and list(run.glob("logs/sft-*-0.log")) and list(run.glob("logs/sft-*-1.log"))
    until(lambda: not left_behind(run), 20, f"the end of {left_behind(run)}")


def test_cancelled_it_ends_with_the_reason_and_does_not_come_back(slurm, tmp_path, sft):
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(slurm, "sft", log, "--config", sft, "--max_steps", "100000")
    slurm.until(job, lambda: len(steps(run)) >= 25, 180, "a few steps")
    slurm.ask("scancel", job)
    assert slurm.ended(job, 60) == "CANCELLED" and int(slurm.job(job)["Restarts"]) == 0
    until(lambda: not left_behind(run), 40, f"the end of {left_behind(run)}")
    assert "SIGTERM" in log.read_text() and list(run.glob("checkpoint-*/checksums.json"))


def test_a_node_set_down_costs_the_steps_since_the_checkpoint(slurm, tmp_path, sft):
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(slurm, "sft", log, "--config", sft, "--max_steps", "400")
    slurm.until(job, lambda: len(steps(run)) >= 25, 180, "a few steps")
    slurm.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: slurm.job(job)["JobState"] == "PENDING", 60, "the job to be put back")
    until(lambda: not left_behind(run), 60, f"the end of {left_behind(run)}")
    slurm.ask("scontrol", "update", "nodename=n2", "state=resume")
    assert slurm.ended(job, 240) == "COMPLETED", log.read_text()
    assert steps(run) == list(range(1, 401)) and int(slurm.job(job)["Restarts"]) == 1


def test_a_failure_ends_all_and_its_reason_is_the_last_line(slurm, tmp_path, sft):
    log = tmp_path / "job.log"
    job = submit(slurm, "sft", log, "--config", sft, "--data.sources.0.path", tmp_path / "nowhere.jsonl")
    assert slurm.ended(job, 120) == "FAILED"
    assert "nowhere.jsonl" in last_line(log), log.read_text()
    job = submit(slurm, "sft", log, "--config", sft, "--placement.zero_stage", "1")
    assert slurm.ended(job, 120) == "FAILED" and slurm.job(job)["ExitCode"] == "2:0"
    assert last_line(log) == "error: placement.zero_stage: on CPUs it is 2 or 3; the nearest is 2."


def test_an_array_shares_out_the_prompts_and_loses_nobody_s_work(slurm, tmp_path):
    asked = {"prompting": {"prefill": "<think>"}, "sampling": {"samples": 4, "max_tokens": 64}, "per_prompt": 4}
    source = {"path": "tiny", "limit": 96}
    generators = [{"name": "direct", "model": {"path": "tiny"}, "data": {"sources": [source]}, **asked}]
    tree = {"output_dir": str(tmp_path / "out"), "generators": generators, "filters": {"language": None}, "shard": 8}
    config = write_yaml(tmp_path / "sample.yaml", {**tree, "rollout": {"engine": "transformers", "batch_size": 32}})
    logs = str(tmp_path / "job-%a.log")
    array = submit(slurm, "sample", logs, "--config", config, options=("--array=0-3",))
    journals = tmp_path / "out" / "samples"
    until(lambda: journals.exists() and any(p.stat().st_size for p in journals.glob("*.jsonl")), 120, "a sample")
    slurm.ask("scancel", "--signal=KILL", f"{array}_1")
    for task in (0, 2, 3):
        assert slurm.ended(f"{array}_{task}", 240) == "COMPLETED", (tmp_path / f"job-{task}.log").read_text()
    alone = launch("sample.py", "--config", config, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    assert (tmp_path / "out" / "rows.jsonl").read_text() == (tmp_path / "alone" / "rows.jsonl").read_text()
    ids = [json.loads(line)["prompt_id"] for path in journals.glob("direct.*.jsonl") for line in path.open()]
    assert sorted(ids) == list(range(96))


def test_a_recipe_as_a_chain_of_jobs(slurm, tmp_path):
    tree = {**SFT, "max_steps": 4, "save_steps": 2, "resume": "auto", "output_dir": "set by the pipeline"}
    write_yaml(tmp_path / "sft.yaml", tree)
    problems = {"data": {"sources": [{"path": "tiny", "limit": 8, "split": "test"}]}, "model": {"path": "tiny"}}
    problems["rollout"] = {"engine": "transformers"}
    write_yaml(tmp_path / "evaluate.yaml", {**problems, "sampling": {"samples": 1, "max_tokens": 16}})
    pipeline = {
        "output_dir": str(tmp_path / "out"),
        "accelerate": "configs/accelerate/cpu.yaml",
        "evaluate": "evaluate.yaml",
        "sbatch": {"nodes": 2},
        "stages": [
            {"name": "base", "kind": "base", "model": "tiny"},
            {"name": "first", "kind": "sft", "config": "sft.yaml", "inputs": {"model.path": "base"}},
            {"name": "second", "kind": "sft", "config": "sft.yaml", "inputs": {"model.path": "first"}},
        ],
    }
    config = write_yaml(tmp_path / "pipeline.yaml", pipeline)
    said = slurm.run("launch/pipeline.py", "--config", str(config), "--slurm", "chain")
    assert said.returncode == 0, said.stderr
    jobs = json.loads((tmp_path / "out" / "slurm.json").read_text())
    assert list(jobs) == ["base", "first", "second"]
    assert slurm.job(jobs["second"])["Dependency"].startswith(f"afterok:{jobs['first']}")
    for name, job in jobs.items():
        log = tmp_path / "out" / "logs" / f"slurm-{name}-{job}.log"
        assert slurm.ended(job, 240) == "COMPLETED", log.read_text()
    steps = json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"]
    assert {name: step["state"] for name, step in steps.items()} == dict.fromkeys(
        ("base.evaluation", "first", "first.evaluation", "second", "second.evaluation"), "finished"
    )
    assert "2 nodes, 1 process each" in (tmp_path / "out" / "logs" / "second.log").read_text()
    time.sleep(1)
    assert slurm.ask("squeue", "-h").strip() == ""
