"""Bad input gets one or two lines that name the mend, and exit code 2, without torch."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, launch, write_yaml

from r1dist.config import EvaluateRun, GRPORun, Reward, RewardModelRun, SampleRun, SFTRun
from r1dist.config.loader import as_tree, build, parse
from r1dist.config.pipeline import PipelineRun
from r1dist.errors import UserError

MISTAKES = [
    (["--lerning_rate", "1"], "`lerning_rate` is not a field; did you mean `learning_rate`?"),
    (["--modle.path", "x"], "`modle` is not a field; did you mean `model`?"),
    (["--model.pth", "x"], "`model.pth` is not a field; did you mean `path`?"),
    (["--data.sources.0.promblem", "x"], "`data.sources.0.promblem` is not a field; did you mean `problem`?"),
    (["--learning_rate", "fast"], "`learning_rate`: Input should be a valid number"),
    (["--max_steps", "1.5"], "`max_steps`: Input should be a valid integer"),
    (["--rewards.accuracy", "much"], "`rewards.accuracy.weight`: Input should be a valid number"),
    (["--model.dtype", "int4"], "`model.dtype`: Input should be 'float32', 'bfloat16' or 'float16'"),
    (["--data.sources", "[]"], "`data.sources`"),
    (["--data.sources.3.path", "x"], "is not one of the 1 entries"),
    (["--vllm_group_port", "1"], "`vllm_group_port` is not set here; use `rollout.transport`, which chooses"),
    (["--vllm_model_impl", "vllm"], "use `rollout.serve.arguments: [--model-impl, transformers]` instead."),
    (
        ["--vllm_server_timeout", "9", "--rollout.no_server_timeout", "9"],
        "`vllm_server_timeout` and `rollout.no_server_timeout` say the same thing; keep the latter.",
    ),
    (["--num_generations", "5"], "num_generations may be 2, 4, 8, 16, 32; or make the batch a multiple of 5."),
    (["stray"], "`stray` is not understood"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_mend(tmp_path, small_grpo, arguments, message):
    file = write_yaml(tmp_path / "run.yaml", small_grpo)
    with pytest.raises(UserError) as error:
        parse(GRPORun, ["--config", str(file), *arguments], processes=1)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_bad_yaml_is_refused_without_torch_or_traceback_and_writes_nothing(tmp_path, small_grpo):
    file = write_yaml(tmp_path / "run.yaml", {**small_grpo, "lerning_rate": 1e-4})
    code = (
        "import runpy, sys; sys.argv = ['grpo.py', '--config', sys.argv[1]]\n"
        "try: runpy.run_path('launch/grpo.py', run_name='__main__')\n"
        "except SystemExit as stop: print('exit', stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "exit 2 False"
    assert "Traceback" not in done.stderr
    assert str(file) in done.stderr and "did you mean `learning_rate`?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_is_a_word_and_false_is_false(tmp_path, small_grpo):
    plain = write_yaml(tmp_path / "plain.yaml", {**small_grpo, "save_strategy": "steps"})
    (tmp_path / "run.yaml").write_text(plain.read_text().replace("save_strategy: steps", "save_strategy: no"))
    assert parse(GRPORun, ["--config", str(tmp_path / "run.yaml")]).trl["save_strategy"] == "no"
    words = ["--save_strategy", "no", "--bf16", "false", "--log_completions"]
    run = parse(GRPORun, ["--config", str(plain), *words])
    assert (run.trl["save_strategy"], run.trl["bf16"], run.trl["log_completions"]) == ("no", False, True)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_help_says_how_to_call_a_launcher_and_what_each_field_means(script, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / script, "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    short = subprocess.run([sys.executable, ROOT / "launch" / script, "-h"], capture_output=True, text=True)
    assert short.returncode == 0 and short.stdout == done.stdout
    assert f"launch/{script}" in done.stdout
    if script not in ("job.py", "check.py"):
        field = {"pipeline.py": "until", "convert.py": "gguf", "sample.py": "generators.N.model.path"}.get(
            script, "model.path"
        )
        assert re.search(rf"^  --{field}\b.*\n      \w", done.stdout, re.MULTILINE)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*absent\.yaml"):
        parse(GRPORun, ["--config", str(tmp_path / "absent.yaml")])
    (tmp_path / "broken.yaml").write_text("model: {path: [")
    with pytest.raises(UserError, match=r"broken\.yaml is not YAML: .*line 1"):
        parse(GRPORun, ["--config", str(tmp_path / "broken.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must hold `field: value` lines, not a list"):
        parse(GRPORun, ["--config", str(tmp_path / "list.yaml")])


def test_missing_fields_are_named(small_grpo):
    for field in ("model", "data", "output_dir"):
        tree = {key: value for key, value in small_grpo.items() if key != field}
        with pytest.raises(UserError, match=f"`{field}` is missing"):
            build(GRPORun, tree, "run.yaml")


def test_values_are_read_as_people_write_them(tmp_path, small_grpo):
    file = tmp_path / "run.yaml"
    write_yaml(file, small_grpo)
    with file.open("a") as appended:
        appended.write("beta: 1e-3\n")
    run = parse(GRPORun, ["--config", str(file), "--learning_rate=3e-6", "--rewards", "{accuracy: 2}", "--bf16"])
    assert (run.trl["beta"], run.trl["learning_rate"], run.trl["bf16"]) == (1e-3, 3e-6, True)
    assert run.rewards == {"accuracy": Reward(weight=2.0)}


def test_the_resolved_configuration_gives_itself(small_grpo):
    run = build(GRPORun, small_grpo, "run.yaml")
    assert build(GRPORun, as_tree(run), "resolved") == run


def test_every_recipe_parses():
    kinds = {"r1_zero": GRPORun, "sft": SFTRun, "evaluate": EvaluateRun, "pipeline": PipelineRun}
    kinds |= {"reasoning_rl": GRPORun, "final_rl": GRPORun, "distill": SFTRun, "reward": RewardModelRun}
    kinds |= {"cold_start": SampleRun, "rejection_sampling": SampleRun, "small_r1_zero": GRPORun}
    recipes = sorted((ROOT / "configs" / "recipes").glob("*/*.yaml"))
    assert len(recipes) >= 8
    for recipe in recipes:
        kind = next(kind for name, kind in kinds.items() if recipe.stem.startswith(name))
        parse(kind, ["--config", str(recipe)], processes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.path", "./nowhere"], "there is no folder ./nowhere"),
        (["--model.path", "nobody/nothing"], "nobody/nothing cannot be loaded"),
        (["--data.sources.0.path", "nobody/nothing"], "the hub does not give it"),
        (["--data.sources.0.path", "absent.jsonl"], "there is no file absent.jsonl"),
        (["--rewards", "{acuracy: 1}"], "`acuracy` is not a reward; there are accuracy, format, helpfulness"),
        (["--loss_type", "grpo", "--max_completion_length", "600"], "none of the 256 prompts fits"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_what_only_shows_later_is_refused_as_clearly(tmp_path, small_grpo, arguments, message):
    file = write_yaml(tmp_path / "run.yaml", small_grpo)
    done = launch("grpo.py", "--config", file, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
