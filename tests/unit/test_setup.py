"""TRL's arguments are built, and refused, before a model is loaded."""

from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import PartialState
from conftest import SMALL_GRPO
from transformers import PreTrainedModel, Trainer

import r1dist.reward_models.train as reward_models
import r1dist.sft.train as sft
from r1dist.config import GRPORun, RewardModelRun, SFTRun
from r1dist.config.loader import build
from r1dist.data.prompts import prompt_dataset
from r1dist.data.templates import load_template
from r1dist.errors import UserError
from r1dist.rewards import Rewards
from r1dist.rl.train import build_trainer, grpo_arguments
from r1dist.run.setup import computing_dtype, hardware_defaults, trl_arguments

FIELDS = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr_rat": 0.1}},
            "`lr_scheduler_kwargs`: .*min_lr_rat",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_kwargs`: .*min_lr"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
            "`lr_scheduler_kwargs`: .*must be smaller",
        ),
        ({"optim": "adamw_bnb_8bit"}, "`optim`: .*bitsandbytes"),
        ({"optim": "adamw_anyprecision", "optim_args": "no equals sign"}, "`optim`: "),
        ({"report_to": "nobody"}, "`report_to`: nobody is not supported"),
        ({"report_to": ["comet_ml"]}, "`report_to`: .*install"),
        ({"bf16": True, "fp16": True}, "SFTConfig: At most one of fp16 and bf16"),
        ({"dataloader_prefetch_factor": 2}, "SFTConfig: "),
    ],
)
def test_what_transformers_would_miss_later_is_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
        trl_arguments(trl.SFTConfig, output_dir=str(tmp_path), **{**FIELDS, **fields})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.1},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
        {"optim": "sgd", "learning_rate": 0.0},
        {"optim": "adafactor", "optim_args": "scale_parameter=False,relative_step=False"},
    ],
)
def test_what_works_is_built(tmp_path, fields):
    built = trl_arguments(trl.SFTConfig, output_dir=str(tmp_path), **FIELDS, **fields)
    assert all(getattr(built, name) == value for name, value in fields.items())


class OnGPU(PartialState):
    """This process's state, as it would be with a GPU."""

    device = property(lambda self: torch.device("cuda", 0))


@pytest.fixture
def loaded_onto(monkeypatch) -> list:
    """On a machine that seems to have two GPUs: the `device_map` of each model that is loaded (here, onto the CPU)."""
    maps, load = [], PreTrainedModel.from_pretrained.__func__

    def spy(cls, *args, device_map=None, **kwargs):
        maps.append(device_map)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(trl.trainer.utils, "PartialState", OnGPU)
    return maps


ONE_PROCESS = {"use_cpu": False, "bf16": False, "max_steps": 1}
SFT = {**ONE_PROCESS, "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny_talk"}]}}
REWARD = {**ONE_PROCESS, "model": {"path": "tiny"}}


def test_a_process_that_sees_two_gpus_trains_policy_and_reference_on_one(tmp_path, pool, loaded_onto):
    tree = {**SMALL_GRPO, **ONE_PROCESS, "beta": 0.1, "output_dir": str(tmp_path)}
    run = build(GRPORun, tree, "test")
    arguments, template = grpo_arguments(run), load_template(run.model, "chat")
    dataset = prompt_dataset(run.data, template, 512, 48)
    trainer = build_trainer(run, arguments, template, dataset, Rewards(run.rewards, pool))
    assert trainer.ref_model is not None and loaded_onto == [None, None]
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 32


@pytest.mark.parametrize(
    ("train", "run_class", "tree"),
    [
        (sft.train, SFTRun, SFT),
        (reward_models.train, RewardModelRun, {**REWARD, "loss": "pairwise", "sources": [{"path": "tiny_pairs"}]}),
        (reward_models.train, RewardModelRun, {**REWARD, "loss": "pointwise", "sources": [{"path": "tiny_judged"}]}),
    ],
)
def test_so_does_every_other_trainer(tmp_path, monkeypatch, loaded_onto, train, run_class, tree):
    trained_on = []
    for module in (sft, reward_models):  # once in a process
        monkeypatch.setattr(module, "set_up_process", lambda **kwargs: None)
    monkeypatch.setattr(Trainer, "train", lambda self, **kwargs: trained_on.append(self.args.n_gpu))
    train(build(run_class, {**tree, "output_dir": str(tmp_path)}, "test"))
    assert trained_on == [1] and loaded_onto == [None]


@pytest.mark.parametrize(
    ("bf16", "fields", "dtype"),
    [
        (True, {}, "bfloat16"),
        (True, {"fp16": True}, "float16"),
        (True, {"bf16": False}, "float32"),
        (True, {"use_cpu": True}, "float32"),
        (False, {"use_cpu": True}, "float32"),
        (False, {}, "float16"),  # Turing
        (False, {"fp16": False}, "float32"),
        (False, {"bf16": True}, "bfloat16"),
        (False, {"model": {"path": "tiny", "dtype": "bfloat16"}}, "bfloat16"),  # the loss would be scaled
    ],
)
def test_a_gpu_computes_in_the_16_bits_that_it_has(small_grpo, monkeypatch, caplog, bf16, fields, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    run = build(GRPORun, {**small_grpo, **fields}, "test")
    chosen = SimpleNamespace(**hardware_defaults(run.trl, run.model.dtype))
    assert not (chosen.bf16 and chosen.fp16) and computing_dtype(chosen, run.model.dtype) == dtype
    assert ("has no bfloat16" in caplog.text) == (not bf16 and not fields)
