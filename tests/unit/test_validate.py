"""Checks of fields against each other, what may change on resume, renamed fields, and the generated reference."""

import dataclasses
import subprocess
import sys
import typing

import pytest
from config_reference import PAGE, page
from conftest import ROOT

from r1dist.config import GRPORun, RewardModelRun, SampleRun, SFTRun
from r1dist.config.loader import RENAMED, build
from r1dist.config.resumable import MAY_CHANGE
from r1dist.config.tree import may_change, section_of
from r1dist.config.trl_fields import MAY_CHANGE as TRL_MAY_CHANGE
from r1dist.config.trl_fields import field_types
from r1dist.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "vespo"}, "`loss_type` vespo is not supported; there are grpo, dr_grpo, dapo, bnpo, cispo."),
        ({"entropy_coef": 0.01}, "`entropy_coef` is not supported"),
        ({"top_entropy_quantile": 0.2}, "`top_entropy_quantile` is not supported"),
        ({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold` is not supported"),
        ({"gradient_accumulation_steps": 8, "steps_per_generation": 5}, "`steps_per_generation` may be 4 or 8."),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 5}, "`steps_per_generation` may be 4 or 6."),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2},
            "`num_iterations` 2 trains on each generation several times",
        ),
        ({"generation_batch_size": 64, "steps_per_generation": 2}, "say the same thing; keep one."),
        ({"sync_ref_model": True, "beta": 0}, "`sync_ref_model` resets the reference model, which `beta: 0`"),
        ({"sync_ref_model": True, "model": {"path": "tiny", "lora": {}}}, "with adapters the reference is the base"),
    ],
)
def test_what_cannot_be_is_refused_with_its_mend(small_grpo, fields, message):
    with pytest.raises(UserError) as error:
        build(GRPORun, {**small_grpo, **fields}, "run.yaml")
    assert message in str(error.value) and str(error.value).startswith("run.yaml: ")
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("steps", [(1, 1), (1, 4), (2, 6), (4, 1), (4, 2)])
def test_steps_that_divide_one_another_are_fine(small_grpo, steps):
    accumulation, generation = steps
    fields = {"gradient_accumulation_steps": accumulation, "steps_per_generation": generation}
    build(GRPORun, {**small_grpo, **fields}, "run.yaml", processes=1)


@pytest.mark.parametrize(("rollouts", "processes", "steps"), [(48, 1, 6), (96, 2, 6), (40, 1, 5)])
def test_generation_batch_size_that_splits_steps_is_refused_like_steps_per_generation(
    small_grpo, rollouts, processes, steps
):
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "generation_batch_size": rollouts}
    with pytest.raises(UserError, match=f"`steps_per_generation` {steps} \\(`generation_batch_size` {rollouts}\\)"):
        build(GRPORun, {**small_grpo, **batch}, "run.yaml", processes)
    build(GRPORun, {**small_grpo, **batch}, "run.yaml")
    build(GRPORun, {**small_grpo, **batch, "generation_batch_size": 64 * processes}, "run.yaml", processes)


@pytest.mark.parametrize(("rollouts", "mend"), [(40, "32 or 64"), (16, "32"), (33, "32 or 64")])
def test_generation_batch_size_is_whole_micro_steps(small_grpo, rollouts, mend):
    with pytest.raises(
        UserError, match=f"`generation_batch_size` {rollouts} is no multiple of the 32 rollouts"
    ) as error:
        build(GRPORun, {**small_grpo, "generation_batch_size": rollouts}, "run.yaml", processes=1)
    assert str(error.value).endswith(f"It may be {mend}.")


def fields_of(section: type, prefix: str = "") -> typing.Iterator[str]:
    for field in dataclasses.fields(section):
        inner = section_of(typing.get_type_hints(section)[field.name])
        if inner is not None:
            yield from fields_of(inner, f"{prefix}{field.name}.")
        elif field.name != "trl":
            yield f"{prefix}{field.name}"


def test_what_decides_what_is_learnt_may_not_change():
    changing = {name for name in fields_of(GRPORun) if may_change(GRPORun, name)}
    fixed = set(fields_of(GRPORun)) - changing
    sections = {name.split(".")[0] for name in fixed}
    assert sections == {"model", "data", "prompting", "rewards", "rollout", "train"}
    assert {name for name in fixed if name.startswith("rollout")} == {"rollout.max_staleness"}
    assert {name for name in fixed if name.startswith("train")} == {
        "train.objective", "train.dynamic_sampling", "train.pass_rate",
    }  # fmt: skip
    assert {"resume", "dry_run", "train.token_budget", "rollout.serve.dtype", "verify.seconds"} <= changing
    for name in ("learning_rate", "num_generations", "beta", "loss_type", "bf16", "seed", "unknown"):
        assert not may_change(GRPORun, name)
    assert all(may_change(GRPORun, name) for name in ("max_steps", "per_device_train_batch_size", "save_steps"))
    assert not may_change(GRPORun, "model.max_steps") and may_change(SFTRun, "train.stall_timeout")


def test_the_table_of_trls_fields_names_real_ones():
    assert field_types("GRPOConfig").keys() >= TRL_MAY_CHANGE


def test_the_mark_is_metadata_of_the_field():
    hints = typing.get_type_hints(section_of(typing.get_type_hints(GRPORun)["verify"]), include_extras=True)
    assert all(MAY_CHANGE in hint.__metadata__ for hint in hints.values())


@pytest.mark.parametrize("old", RENAMED)
def test_an_earlier_name_is_refused_with_the_one_of_now(small_grpo, old):
    pair = {"model": {"path": "tiny"}, "sources": [{"path": "tiny_pairs"}], "output_dir": "x"}
    sample = {"output_dir": "x"}
    kind, tree = {"learns_from": (RewardModelRun, pair), "ways": (SampleRun, sample)}.get(old, (GRPORun, small_grpo))
    section, _, name = old.rpartition(".")
    tree = {**tree, section: {name: 3}} if section else {**tree, name: 3}
    with pytest.raises(UserError) as error:
        build(kind, tree, "run.yaml")
    assert str(error.value) == f"run.yaml: `{old}` is now `{RENAMED[old]}`."


def test_the_committed_reference_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_the_package_imports_no_torch():
    asked = "import sys, r1dist.config.loader; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
