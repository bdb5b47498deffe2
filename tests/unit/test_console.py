"""The console command `r1dist`: what it knows, what it refuses, and what a shell completes."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from r1dist.__main__ import main
from r1dist.config.loader import config_path
from r1dist.config.reference import LAUNCHERS
from r1dist.shipped import LAUNCH, RECIPES, located, recipes


def test_a_recipe_is_found_by_its_name_from_anywhere_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path(["--config", "tiny/r1_zero"]) == RECIPES / "tiny" / "r1_zero.yaml"
    assert config_path(["--config", "tiny/r1_zero.yaml"]) == RECIPES / "tiny" / "r1_zero.yaml"
    assert located("configs/deepspeed/zero2.json") == str(ROOT / "configs" / "deepspeed" / "zero2.json")
    assert located("configs/recipes/tiny/absent.jsonl") == "configs/recipes/tiny/absent.jsonl"
    Path("tiny").mkdir()
    Path("tiny/r1_zero").touch()
    assert config_path(["--config", "tiny/r1_zero"]) == Path("tiny/r1_zero")


def test_each_launcher_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["r1dist"])
    assert main() == 0
    commands = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert commands == sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
    assert LAUNCHERS.keys() == set(commands) - {"job", "check"}  # whose fields are other launchers', or none
    monkeypatch.setattr(sys, "argv", ["r1dist", "evaluat"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: `evaluat` is no command; did you mean `evaluate`?")


def test_a_command_gets_its_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["r1dist", "grpo", "--lerning_rate", "1", "--config", "tiny/r1_zero"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "`lerning_rate` is not a field; did you mean `learning_rate`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["che"], ["check"]),
        (["grpo", "--rollout.max_st"], ["--rollout.max_staleness"]),
        (["job", "pipe"], ["pipeline"]),
        (["job", "sft", "--per_device_tr"], ["--per_device_train_batch_size"]),
        (["pipeline", "--config", "smollm2-135m/pip"], ["smollm2-135m/pipeline"]),
    ],
    ids=str,
)
def test_a_shell_completes(monkeypatch, capsys, words, completed):
    monkeypatch.setattr(sys, "argv", ["r1dist", "completion"])
    assert main() == 0
    script = capsys.readouterr().out
    typed = f"COMP_WORDS=(r1dist {' '.join(words)}); COMP_CWORD={len(words)}; _r1dist; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{typed}"], capture_output=True, text=True)
    assert done.stdout.split() == completed and not done.stderr


def test_what_is_shipped_is_the_checkout(tmp_path):
    assert LAUNCH == ROOT / "launch" and RECIPES == ROOT / "configs" / "recipes"
    assert all((RECIPES / f"{name}.yaml").is_file() for name in recipes())
