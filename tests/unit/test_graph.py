"""What a pipeline and a job give the commands that they run."""

import pytest
from conftest import ROOT, SMALL_GRPO, write_yaml
from placed import CARD, RECIPES, parsed, placed

from r1dist.cluster.allocation import Cluster
from r1dist.cluster.job_launcher import JobLauncher, PipelineJob
from r1dist.config import GRPORun, ServeRun, engines
from r1dist.config.loader import parse
from r1dist.config.pipeline import PipelineRun
from r1dist.config.tree import differences
from r1dist.errors import UserError
from r1dist.generation.vllm.devices import place_servers
from r1dist.generation.vllm.start import plan_servers
from r1dist.pipeline.graph import Graph
from r1dist.pipeline.manifest import settings_of
from r1dist.pipeline.runner import Runner
from r1dist.pipeline.submit import submissions, submit

EVALUATE = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny", "split": "test"}]}}


def graph(folder, grpo, *words):
    """The graph of a base model and a GRPO stage, by two processes, with `words` of the command line."""
    write_yaml(folder / "grpo.yaml", {**SMALL_GRPO, "output_dir": "unused", **grpo})
    write_yaml(folder / "evaluate.yaml", EVALUATE)
    stages = [
        {"name": "base", "kind": "base", "model": "tiny"},
        {"name": "rl", "kind": "grpo", "config": "grpo.yaml", "inputs": {"model.path": "base"}},
    ]
    tree = {"output_dir": "runs/x", "evaluate": "evaluate.yaml", "stages": stages}
    tree["accelerate"] = str(ROOT / "configs" / "accelerate" / "zero2_cpu.yaml")
    file = write_yaml(folder / "pipeline.yaml", tree)
    return Graph(parse(PipelineRun, ["--config", str(file), *words]), folder)


def test_the_plan_knows_the_processes(tmp_path):
    graph(tmp_path, {"per_device_train_batch_size": 4})
    with pytest.raises(UserError, match=r"does not divide the 12 rollouts .* x 2 processes"):
        graph(tmp_path, {"per_device_train_batch_size": 6})
    uneven = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "generation_batch_size": 96}
    with pytest.raises(UserError, match="`generation_batch_size` 96"):
        graph(tmp_path, uneven)
    with pytest.raises(UserError, match=r"accelerate: there is no file absent\.yaml"):
        graph(tmp_path, {}, "--accelerate", "absent.yaml")
    graph(tmp_path, uneven, "--launcher", "job")  # a job's processes depend on its nodes


def test_a_stage_that_could_not_resume_is_refused_in_the_plan(tmp_path):
    with pytest.raises(UserError, match="`save_only_model` leaves checkpoints without the optimizer"):
        graph(tmp_path, {"per_device_train_batch_size": 4, "save_only_model": True})


def test_a_job_checks_the_batch_of_all_its_processes(tmp_path):
    uneven = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "generation_batch_size": 96}
    tree = {**SMALL_GRPO, "output_dir": str(tmp_path / "run"), **uneven, "placement": {"processes": 2}}
    file = write_yaml(tmp_path / "grpo.yaml", tree)
    with pytest.raises(UserError, match=r"grpo\.yaml: `steps_per_generation` 6 \(`generation_batch_size` 96\)"):
        JobLauncher("grpo", ["--config", str(file)], Cluster.here(), [])


def test_commands_get_the_folder_with_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    words = ["--output_dir=~/x", "--slurm", "chain"]
    plan = graph(tmp_path, {"per_device_train_batch_size": 4}, *words)
    assert plan.steps["rl"].command[-1] != "~" and "/somewhere/x/rl" in plan.steps["rl"].command
    assert "/somewhere/x/evaluations/rl.json" in plan.steps["rl.evaluation"].command
    assert all("--output=/somewhere/x/logs/" in " ".join(command) for _, command in submissions(plan, words, ROOT))
    file = write_yaml(tmp_path / "one.yaml", {**SMALL_GRPO, "output_dir": "~/x"})
    job = JobLauncher("grpo", ["--config", str(file)], Cluster.here(), [])
    assert "--output_dir /somewhere/x" in job.plan() and not (tmp_path / "~").exists()
    whole = PipelineJob(["--config", str(tmp_path / "pipeline.yaml"), *words], file, [])
    assert whole.command[-2:] == ["--output_dir", "/somewhere/x"]


def test_a_pipeline_without_servers_takes_no_servers_of_its_stages(tmp_path):
    rollout = {"engine": "vllm", "servers": "a.json"}
    grpo = {"per_device_train_batch_size": 4, "rollout": rollout}
    plan = graph(tmp_path, grpo, "--engine", "transformers")
    assert plan.steps["rl"].config["rollout"]["servers"] == "managed"
    with_servers = graph(tmp_path, grpo)
    assert with_servers.steps["rl"].config["rollout"]["servers"] == "a.json"
    # Who generates may change: what is done is not done again where vLLM is installed later.
    settings = [settings_of(of.steps["rl"], {}) for of in (plan, with_servers)]
    assert differences(*settings) == ["rollout.servers"]


def test_a_field_that_a_later_version_adds_makes_nothing_again(tmp_path):
    plan = graph(tmp_path, {"per_device_train_batch_size": 4})
    now, run_class = settings_of(plan.steps["rl.evaluation"], {}), plan.steps["rl.evaluation"].run_class
    added = ("data.sources.0.stream", "modes.0", "modes.1", "benchmarks", "sampling.temperature")
    before = {name: value for name, value in now.items() if name not in added}
    assert len(before) == len(now) - len(added) and differences(before, now, run_class) == []
    changed = {"data.sources.0.stream": True, "modes.1": None, "benchmarks": None, "benchmarks.0.name": "gsm8k"}
    assert differences(before, {**now, **changed}, run_class) == sorted(changed)
    # An entry of a list has no default, nor has a section that was off.
    assert differences({**before, "data.sources": []}, now, run_class)
    assert differences({"requests": None}, {"requests.max_tokens": 256}, run_class) == ["requests.max_tokens"]


def test_missing_vllm_is_told_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    rollout = {"per_device_train_batch_size": 4, "rollout": {"engine": "vllm"}}
    told = r"^rl: `rollout.engine` is `vllm`, but vLLM is not installed .*\nInstall it: .*--engine transformers"
    for refused in (lambda plan: Runner(plan).run(), lambda plan: submit(plan, [], ROOT)):
        with pytest.raises(UserError, match=told):
            refused(graph(tmp_path, rollout))
    assert not (tmp_path / "runs").exists()
    assert "It would be refused: rl: " in Runner(graph(tmp_path, rollout)).plan()
    for words in (["--engine", "transformers"], ["--until", "base"]):
        assert "refused" not in Runner(graph(tmp_path, rollout, *words)).plan()
    # left open, or answered by servers that are there already
    for other in ({"engine": "auto"}, {"engine": "vllm", "servers": "a.json"}):
        assert "refused" not in Runner(graph(tmp_path, {**rollout, "rollout": other})).plan()


@pytest.mark.parametrize("words", [[], ["--rollout.max_staleness", "1"], ["--rollout.sleep"]], ids=str)
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (1, 1), (1, 2), (1, 8), (2, 1), (4, 8)])
def test_what_a_job_starts_is_accepted_by_what_it_starts(monkeypatch, nodes, gpus, words):
    """Each recipe, on each cluster, as far as its models fit there: launchers parse their commands, and the run's
    servers find the GPUs that were meant for them."""
    planned = 0
    for kind, arguments in RECIPES:
        more = ["--rollout.engine", "vllm", *words] if kind == "grpo" and words else []
        try:
            job = placed(monkeypatch, kind, [*arguments, *more], nodes, gpus)
        except UserError as refused:
            assert len(str(refused).splitlines()) <= 2, refused
            continue
        planned += 1
        placement = job.placement
        for run, _ in parsed(job):
            if isinstance(run, ServeRun) and gpus:
                place_servers(run, run.transport, None, [CARD] * gpus, 0, "")
            elif isinstance(run, GRPORun) and run.rollout.engine == "vllm" and run.rollout.servers == "managed":
                serve, transport = plan_servers(run.rollout, "bfloat16", 900, [CARD] * gpus, placement.processes)
                assert (transport, serve.replicas) == (placement.transport, placement.replicas)
                assert placement.devices in (None, serve.devices)
                assert not (serve.sleep and run.rollout.max_staleness)
    assert planned >= 8
