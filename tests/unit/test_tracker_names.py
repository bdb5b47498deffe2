"""Trackers are refused before anything is loaded: unknown ones with the nearest, missing ones with the command."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import trl
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from r1dist.cluster.plan import check_machine
from r1dist.config import GRPORun, RewardModelRun, SFTRun
from r1dist.config.loader import build
from r1dist.config.trackers import PACKAGES, known_trackers
from r1dist.errors import UserError
from r1dist.run.setup import trl_arguments

COMMON = {"model": {"path": "tiny"}, "max_steps": 1, "use_cpu": True}
RUNS = {
    GRPORun: {**COMMON, "data": {"sources": [{"path": "tiny"}]}, "rollout": {"engine": "transformers"}},
    SFTRun: {**COMMON, "data": {"sources": [{"path": "tiny_talk"}]}},
    RewardModelRun: {**COMMON, "loss": "pairwise", "sources": [{"path": "tiny_pairs"}]},
}


def run_of(run_class, tmp_path, **fields):
    return build(run_class, {**RUNS[run_class], "output_dir": str(tmp_path / "run"), **fields}, "test.yaml")


def test_the_names_are_transformers_own():
    assert (
        set(known_trackers()) == INTEGRATION_TO_CALLBACK.keys() and PACKAGES.keys() <= INTEGRATION_TO_CALLBACK.keys()
    )


@pytest.mark.parametrize("run_class", RUNS)
@pytest.mark.parametrize(
    ("named", "nearest"), [("wandv", "wandb"), (["tensorboard", "mlflo"], "mlflow"), ("non", "none")]
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, run_class, named, nearest):
    with pytest.raises(UserError, match=rf"^test.yaml: `report_to`: .*did you mean `{nearest}`\?\nThere are "):
        run_of(run_class, tmp_path, report_to=named)


@pytest.mark.parametrize("run_class", RUNS)
@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_told_with_the_command(tmp_path, monkeypatch, run_class, name):
    found = importlib.util.find_spec
    absent = PACKAGES[name][0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in absent else found(n, *a))
    run = run_of(run_class, tmp_path, report_to=[name])  # the machine that reads it need not be the one that runs it
    with pytest.raises(UserError, match=rf"^`report_to`: {name} is not installed .*\n`pip install {name}` adds it"):
        check_machine(run)
    check_machine(run_of(run_class, tmp_path, report_to="none"))


class AuthenticationError(Exception):
    pass


@pytest.mark.parametrize(
    ("mode", "login", "message"),
    [
        ("offline", None, None),
        ("online", True, None),
        ("online", False, "wandb has no API key here.\n`wandb login`"),
        ("online", AuthenticationError("the key is invalid"), "wandb: the key is invalid\n`wandb login --relogin`"),
    ],
)
def test_wandb_without_a_valid_key_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, mode, login, message):
    def logged_in(prompt):
        assert prompt is False and login is not None
        if isinstance(login, Exception):
            raise login
        return login

    stub = SimpleNamespace(setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)), login=logged_in)
    stub.errors, stub.run = SimpleNamespace(Error=AuthenticationError), None
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr("r1dist.run.trackers.get_reporting_integration_callbacks", lambda report_to: [])
    fields = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": ["wandb"]}
    if message is None:
        trl_arguments(trl.SFTConfig, **fields)
        return
    with pytest.raises(UserError) as refused:
        trl_arguments(trl.SFTConfig, **fields)
    assert str(refused.value).startswith(f"`report_to`: {message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"push_to_hub": True, "hub_token": "hf_1"}, "`hub_token` is not set here; use `hf auth login`"),
        ({"hub_model_id": "me/model"}, "`hub_model_id` is about `push_to_hub`, which is off"),
        ({"push_to_hub": True, "hub_strategy": "sometimes"}, "`hub_strategy`"),
    ],
)
def test_fields_of_the_hub_are_checked(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as refused:
        run_of(SFTRun, tmp_path, **fields)
    assert "hf_1" not in str(refused.value)


def test_transformers_is_not_told_to_push(tmp_path):
    fields = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "push_to_hub": True}
    assert trl_arguments(trl.SFTConfig, **fields).push_to_hub is False
