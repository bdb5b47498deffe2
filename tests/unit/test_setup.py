"""TRL's arguments are built, and refused, before a model is loaded."""

import pytest
import trl

from r1dist.errors import UserError
from r1dist.run.setup import trl_arguments

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
