"""What is overridden or read in TRL 1.16 and transformers is still there, under the same name and signature."""

import ast
import dataclasses
import inspect
import subprocess
import sys

import pytest
import trl
from conftest import ROOT
from transformers import Trainer, TrainingArguments

from r1dist.config.trl_fields import field_types
from r1dist.rl.trainer import GRPOTrainer
from r1dist.run.checkpoints import ResumableTrainer

# As of trl 1.16.0. An upgrade that changes one of them must be looked at by a person.
SIGNATURES = {
    "_get_train_sampler": ["self", "dataset"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
}
# Of transformers' Trainer, the parameters of what `ResumableTrainer` overrides.
TRANSFORMERS = {
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "log": ["self", "logs", "start_time"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_load_best_model": ["self"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "create_model_card": [
        "self",
        "language",
        "license",
        "tags",
        "model_name",
        "finetuned_from",
        "tasks",
        "dataset_tags",
        "dataset",
        "dataset_args",
    ],
}
# Attributes of TRL's trainer that ours reads.
ATTRIBUTES = (
    "_logs",
    "_metrics",
    "aux_loss_enabled",
    "log_completions",
    "loss_type",
    "max_completion_length",
    "num_generations",
    "num_iterations",
    "ref_model",
    "router_aux_loss_coef",
    "shuffle_dataset",
)
# The one attribute of a library that is replaced, and where.
REPLACED = {"r1dist/run/trl_without_vllm.py": ["import_utils.is_vllm_available"]}


def test_version():
    assert trl.__version__ == "1.16.0"


def test_overridden_methods_are_the_listed_ones():
    own = {name for name, member in vars(GRPOTrainer).items() if inspect.isfunction(member)}
    assert {name for name in own if hasattr(trl.GRPOTrainer, name)} - {"__init__"} == SIGNATURES.keys()
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters) == parameters


def test_transformers_step_calls_what_we_override_and_scales_nothing():
    """Our micro-step calls transformers' for each micro-batch."""
    source = inspect.getsource(Trainer.training_step)
    assert "self._prepare_inputs(inputs)" in source and "self.compute_loss(model, inputs" in source
    assert "self.accelerator.backward(loss, **kwargs)" in source
    assert "self.compute_loss_func is None" in source  # else the loss would be divided once more
    assert "self._compute_loss(model, inputs)" in inspect.getsource(trl.GRPOTrainer.compute_loss)
    assert "compute_loss_func" in inspect.getsource(trl.GRPOTrainer) + inspect.getsource(trl.GRPOTrainer.__mro__[1])


def test_what_makes_trainers_resumable_overrides_what_it_means_to():
    own = {name for name, member in vars(ResumableTrainer).items() if inspect.isfunction(member)}
    assert {name for name in own if hasattr(Trainer, name)} - {"__init__"} == TRANSFORMERS.keys()
    for name, parameters in TRANSFORMERS.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
        replaced = name in ("evaluate", "create_model_card")  # by benchmarks, by our own card
        assert replaced or f"super().{name}(" in inspect.getsource(getattr(ResumableTrainer, name))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name):
    assert f"self.{name}" in inspect.getsource(trl.GRPOTrainer)


def test_no_library_is_patched():
    """No assignment to an attribute of TRL's, transformers' or Accelerate's modules, or of an accelerator."""
    found = {}
    for path in sorted((ROOT / "r1dist").rglob("*.py")):
        tree = ast.parse(path.read_text())
        libraries = set()
        for node in ast.walk(tree):
            names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            for alias in names:
                top = (module or alias.name).split(".")[0]
                if top in ("trl", "transformers", "accelerate"):
                    libraries.add(alias.asname or alias.name.split(".")[0])
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute):
                    owner = ast.unparse(target.value)
                    if owner.split(".")[0] in libraries or owner.split(".")[-1] == "accelerator":
                        found.setdefault(str(path.relative_to(ROOT)), []).append(ast.unparse(target))
    assert found == REPLACED


@pytest.mark.parametrize("config", [trl.GRPOConfig, trl.SFTConfig, TrainingArguments])
def test_fields_read_from_source_are_the_real_ones(config):
    read = field_types(config.__name__)
    real = {field.name: field for field in dataclasses.fields(config)}
    assert read.keys() == real.keys()
    known = {name: default for name, (_, default) in read.items() if default is not ...}
    assert len(known) > 0.9 * len(real)
    for name, default in known.items():
        if real[name].default is not dataclasses.MISSING:
            assert default == real[name].default, name


def test_vllm_is_not_imported_with_trl():
    """It would double the seconds in which a launcher starts."""
    asked = "import sys, r1dist.rl.train; print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
