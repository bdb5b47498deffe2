"""What is overridden or read in TRL 1.16 is still there, under the same name and signature."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import trl
from conftest import ROOT
from transformers import Trainer, TrainingArguments

from r1dist.train import grpo
from r1dist.train.checkpoints import ResumableTrainer
from r1dist.train.loss import TrainerOfGroups
from r1dist.trl_fields import field_types

# As of trl 1.16.0. An upgrade that changes one of them must be looked at by a person.
SIGNATURES = {
    "_get_train_sampler": "(self, dataset: datasets.arrow_dataset.Dataset | None = None) "
    "-> torch.utils.data.sampler.Sampler",
    "_prepare_inputs": "(self, generation_batch: dict[str, torch.Tensor | typing.Any]) "
    "-> dict[str, torch.Tensor | typing.Any]",
    "_compute_loss": "(self, model, inputs)",
    "_generate_and_score_completions": "(self, inputs: list[dict[str, torch.Tensor | typing.Any]]) "
    "-> dict[str, torch.Tensor | typing.Any]",
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, "
    "batch_size=None, compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, "
    "num_images=None, pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, "
    "token_type_ids=None, mm_token_type_ids=None, image_position_ids=None) "
    "-> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]",
}
# Of transformers' Trainer, the parameters of what `ResumableTrainer` overrides.
TRANSFORMERS = {
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "log": ["self", "logs", "start_time"],
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
}
# Attributes of the trainer that the subclass reads or sets.
ATTRIBUTES = (
    "use_vllm",
    "vllm_generation",
    "_last_loaded_step",
    "vllm_importance_sampling_correction",
    "_logs",
    "log_completions",
    "_tokenize_prompts",
    "aux_loss_enabled",
    "loss_type",
    "num_iterations",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_clip_max",
    "_metrics",
    "reward_func_names",
    "eos_token_ids",
    "max_completion_length",
    "ref_model",
    "_buffered_inputs",
    "_step",
)


def test_version():
    assert trl.__version__ == "1.16.0"


def test_overridden_methods_are_the_listed_ones():
    members = [*vars(grpo.GRPOTrainer).items(), *vars(TrainerOfGroups).items()]
    ours = {name for name, member in members if inspect.isfunction(member)}
    inherited = {name for name in ours if hasattr(trl.GRPOTrainer, name)} - {"__init__"}
    assert inherited == set(grpo.OVERRIDDEN) == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = str(inspect.signature(getattr(trl.GRPOTrainer, name)))
    assert signature.replace("Any", "typing.Any").replace("typing.typing.", "typing.") == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_overrides_call_super(name):
    assert f"super().{name}" in inspect.getsource(grpo.GRPOTrainer) + inspect.getsource(TrainerOfGroups)


def test_the_loss_looks_its_metrics_up_before_it_asks_all_ranks():
    """What `Tally.instead_of` rests on: `metrics[name].append(f(reduce(...)))`, and `gather` for extremes only."""
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    assert source.count("self.accelerator.reduce(") == 2  # in global_masked_mean, and of the adaptive entropy
    assert all(
        line.strip().startswith("self._metrics[mode][")
        for line in source.splitlines()
        if "global_masked_mean(" in line and "def " not in line
    )
    gathers = [line.strip() for line in source.splitlines() if "self.accelerator.gather(" in line]
    assert [line.split(" ")[0] for line in gathers] == [
        'self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())',
        "gathered_low_clip",
        "gathered_high_clip",
    ]


def test_what_all_ranks_are_given_of_a_generation_is_what_the_table_of_completions_shows():
    """What `texts_gathered` leaves out: it gathers for `_logs` alone, or what we never use."""
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    assert [line.strip() for line in source.splitlines() if "gather_object(" in line] == [
        'self._logs["prompt"].extend(gather_object(prompts))',
        'self._logs["completion"].extend(gather_object(completions))',
        "for column in sorted(set(gather_object(list(self._pending_extra_logs)))):",
        'self._logs["extra"][column].extend(gather_object(values))',
        "for name in sorted(set(gather_object(list(self._pending_metrics)))):",
        'self._logs["images"].extend(gather_object(images))',
    ]


def test_what_makes_trainers_resumable_overrides_what_it_means_to():
    ours = {name for name, member in vars(ResumableTrainer).items() if inspect.isfunction(member)}
    assert {name for name in ours if hasattr(Trainer, name)} - {"__init__"} == TRANSFORMERS.keys()
    for name, parameters in TRANSFORMERS.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
        assert f"super().{name}(" in inspect.getsource(getattr(ResumableTrainer, name))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name):
    assert f"self.{name}" in inspect.getsource(trl.GRPOTrainer)


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


def test_vllm_is_not_imported_beside_trl():
    """It would double the seconds of a launcher's start; TRL asks the function that `r1dist.train` replaces."""
    asked = "import sys, r1dist.train.grpo; print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
