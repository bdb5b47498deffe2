"""Values and combinations that TRL or transformers would refuse, or ignore, later are refused when they are parsed."""

import pytest
from conftest import write_yaml

from r1dist.config import ChatRun, EvaluateRun, GRPORun, RewardModelRun, SampleRun, SFTRun, trl_limits
from r1dist.config.loader import build, parse
from r1dist.config.trl_fields import field_types, validated_types
from r1dist.config.trl_limits import OURS_INSTEAD, UNSUPPORTED, UNSUPPORTED_IN_GRPO
from r1dist.errors import UserError

SFT = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}, "output_dir": "runs/x"}
PAIRS = {"model": {"path": "tiny"}, "sources": [{"path": "tiny_pairs"}], "output_dir": "runs/x", "loss": "pairwise"}
SAMPLE = {
    "output_dir": "runs/x",
    "generators": [{"name": "g", "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}}],
}
EVALUATE = {"model": {"path": "tiny"}, "data": SFT["data"]}
# Field -> values that are refused, of all training runs.
OUTSIDE = {
    "max_steps": [0, -2],
    "num_train_epochs": [0, -1],
    "learning_rate": [-1e-6],
    "per_device_train_batch_size": [0, -1],
    "gradient_accumulation_steps": [0],
    "save_steps": [0, -5],
    "logging_steps": [0, -1],
    "save_total_limit": [0, -1],
    "warmup_steps": [-1],
    "weight_decay": [-0.1],
    "adam_beta1": [1, -0.1],
    "adam_beta2": [1.5],
    "adam_epsilon": [-1e-8],
    "max_grad_norm": [-1],
    "label_smoothing_factor": [1, -0.1],
    "dataloader_num_workers": [-1],
    "seed": [-1, 2**32],
    "save_strategy": ["best", "sometimes", "true"],
    "logging_strategy": ["sometimes"],
    "lr_scheduler_type": ["cosin"],
    "optim": ["adam"],
    "log_level": ["loud"],
}
OF_GRPO = {
    "temperature": [0, -1],
    "top_k": [-1],
    "top_p": [0, 1.1, -0.5],
    "min_p": [-0.1, 1.5],
    "repetition_penalty": [0, -1],
    "num_generations": [1, 0, None],
    "max_completion_length": [0, None],
    "num_iterations": [0],
    "steps_per_generation": [0, -1],
    "generation_batch_size": [0],
    "beta": [-0.1],
    "epsilon": [-0.1],
    "epsilon_high": [-0.2],
    "delta": [0, -1],
    "ref_model_mixup_alpha": [-0.1, 1.1],
    "ref_model_sync_steps": [0],
    "scale_rewards": ["false", "std"],
    "importance_sampling_level": ["tokens"],
    "multi_objective_aggregation": ["sum"],
    "vllm_importance_sampling_mode": ["token"],
    "vllm_importance_sampling_clip_max": [0],
    "vllm_server_port": [0, 70000],
    "vllm_gpu_memory_utilization": [0, 1.1],
}


def refused(run_class, tree, name, value):
    with pytest.raises(UserError) as error:
        build(run_class, {**tree, name: value}, "run.yaml", processes=1)
    assert str(error.value).startswith(f"run.yaml: `{name}`"), error.value
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_values_out_of_bounds_are_refused_in_every_training_run(small_grpo, name):
    for value in OUTSIDE[name]:
        for run_class, tree in ((GRPORun, small_grpo), (SFTRun, SFT), (RewardModelRun, PAIRS)):
            refused(run_class, tree, name, value)


@pytest.mark.parametrize("name", OF_GRPO)
def test_values_out_of_bounds_are_refused_in_grpo(small_grpo, name):
    for value in OF_GRPO[name]:
        refused(GRPORun, small_grpo, name, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), ".nan", "-.inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, small_grpo, value):
    for name in ("learning_rate", "temperature", "beta", "epsilon", "max_grad_norm"):
        if isinstance(value, float):
            refused(GRPORun, small_grpo, name, value)
        else:
            file = write_yaml(tmp_path / "run.yaml", small_grpo)
            with pytest.raises(UserError, match=f"`{name}`.*finite"):
                parse(GRPORun, ["--config", str(file), f"--{name}", value])
    with pytest.raises(UserError, match="weight"):
        build(GRPORun, {**small_grpo, "rewards": {"accuracy": float(str(value).replace(".", ""))}}, "run.yaml")
    with pytest.raises(UserError, match=r"`sampling\.temperature`"):
        build(EvaluateRun, {**EVALUATE, "sampling": {"temperature": float(str(value).replace(".", ""))}}, "run.yaml")


def test_what_is_at_the_bounds_is_fine(small_grpo):
    fine = {"learning_rate": 0, "beta": 0, "epsilon": 0, "top_k": 0, "top_p": 1, "min_p": None, "max_grad_norm": 0}
    fine |= {
        "max_steps": -1,
        "num_train_epochs": 0.5,
        "warmup_steps": 0.1,
        "save_steps": 0.25,
        "save_total_limit": None,
    }
    fine |= {
        "scale_rewards": "none",
        "seed": 2**32 - 1,
        "delta": None,
        "pad_to_multiple_of": "auto",
        "logging_steps": 0.1,
    }
    build(GRPORun, {**small_grpo, **fine}, "run.yaml", processes=1)
    assert build(EvaluateRun, {**EVALUATE, "sampling": {"temperature": 0}}, "x").sampling.temperature == 0
    assert build(ChatRun, {"model": {"path": "tiny"}, "temperature": 0}, "x").temperature == 0
    sampled = {**SAMPLE["generators"][0], "sampling": {"temperature": 0}}
    assert build(SampleRun, {**SAMPLE, "generators": [sampled]}, "x").generators[0].sampling.temperature == 0


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 0), ("top_p", 2), ("max_tokens", 0), ("samples", 0)]
)
def test_sampling_is_bounded(name, value):
    with pytest.raises(UserError, match=f"`sampling.{name}`"):
        build(EvaluateRun, {**EVALUATE, "sampling": {name: value}}, "run.yaml")


@pytest.mark.parametrize("value", [-1, 2**32])
def test_seeds_are_those_that_all_libraries_take(value):
    for run_class, tree in ((EvaluateRun, EVALUATE), (SampleRun, SAMPLE)):
        refused(run_class, tree, "seed", value)


@pytest.mark.parametrize("name", [*UNSUPPORTED, *UNSUPPORTED_IN_GRPO])
def test_what_would_be_ignored_or_break_checkpoints_is_refused(small_grpo, name):
    other = {
        "accelerator_config": {"split_batches": True}, "fsdp": "full_shard", "fsdp_config": {"a": 1}, "data_seed": 3,
        "parallelism_config": {"a": 1}, "entropy_coef": 0.1, "top_entropy_quantile": 0.2,
        "off_policy_mask_threshold": 0.5, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
        "max_tool_calling_iterations": 2, "train_sampling_strategy": "sequential", "eval_do_concat_batches": False,
    }.get(name, True)  # fmt: skip
    assert "is not supported: it " in refused(GRPORun, small_grpo, name, other)
    if name in UNSUPPORTED:
        refused(SFTRun, SFT, name, other)
        refused(RewardModelRun, PAIRS, name, other)
        build(SFTRun, {**SFT, name: UNSUPPORTED[name][0][0]}, "run.yaml")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval_strategy", "steps", "`data.eval` or `holdout` on what; set both or none"),
        ("eval_steps", 5, "`eval_steps` is of an evaluation during training; set `eval_strategy` and `data.eval`"),
        ("eval_on_start", True, "`eval_on_start` is of an evaluation during training"),
        (
            "metric_for_best_model",
            "gsm8k/accuracy",
            "without `eval_strategy` and `data.eval` or `holdout` there is none",
        ),
        ("load_best_model_at_end", True, "`holdout` there is none"),
        ("do_predict", True, "use launch/evaluate.py instead"),
    ],
)
def test_evaluation_during_training_is_refused_where_nothing_is_measured(name, value, message):
    assert message in refused(SFTRun, SFT, name, value)


def test_the_best_checkpoint_is_by_a_score_that_is_measured(small_grpo):
    data = {**small_grpo["data"], "eval": ["gsm8k"]}
    tree = {**small_grpo, "data": data, "eval_strategy": "steps"}
    assert "there are gsm8k/accuracy, gsm8k/format" in refused(GRPORun, tree, "metric_for_best_model", "gsm8k/loss")
    assert "needs `metric_for_best_model`" in refused(GRPORun, tree, "load_best_model_at_end", True)
    assert build(GRPORun, {**tree, "metric_for_best_model": "gsm8k/accuracy"}, "run.yaml").data.eval[0].name == "gsm8k"
    stale = {**tree, "rollout": {"engine": "vllm", "max_staleness": 1}}
    assert "never stop" in refused(GRPORun, stale, "eval_strategy", "steps")


@pytest.mark.parametrize(
    ("run_class", "tree", "scores"), [(SFTRun, SFT, "loss"), (RewardModelRun, PAIRS, "loss, accuracy")]
)
def test_rows_held_out_are_measured_when_it_says_so(run_class, tree, scores):
    held_out = {**tree, "holdout": [{"path": "tiny_pairs"}], "eval_strategy": "steps"}
    assert f"there are {scores}." in refused(run_class, held_out, "metric_for_best_model", "speed")
    assert build(run_class, {**held_out, "metric_for_best_model": "loss"}, "run.yaml").holdout
    assert "would leave rows of `holdout` out" in refused(run_class, held_out, "dataloader_drop_last", True)
    assert "`holdout` on what" in refused(run_class, tree, "eval_strategy", "steps")


def test_only_a_reward_models_holdout_is_measured_without_a_strategy():
    with pytest.raises(UserError, match="`holdout` on what; set both or none"):
        build(SFTRun, {**SFT, "holdout": [{"path": "tiny"}]}, "run.yaml")
    tree = {**PAIRS, "holdout": [{"path": "tiny_pairs"}]}
    assert build(RewardModelRun, tree, "run.yaml").holdout
    assert "without `eval_strategy` and `holdout` there is none" in refused(
        RewardModelRun, tree, "metric_for_best_model", "accuracy"
    )


@pytest.mark.parametrize("resume", [True, "auto"])
def test_checkpoints_without_the_optimizer_are_not_resumed(small_grpo, resume):
    for run_class, tree in ((GRPORun, small_grpo), (SFTRun, SFT), (RewardModelRun, PAIRS)):
        refused(run_class, {**tree, "resume": resume}, "save_only_model", True)
        build(run_class, {**tree, "save_only_model": True}, "run.yaml")
        build(run_class, {**tree, "save_only_model": False, "resume": resume}, "run.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": None}, "`max_length` is the length of the blocks of `packing`"),
        ({"packing": False, "padding_free": True}, "`padding_free` without `packing` needs `max_length: null`"),
    ],
)
def test_packing_needs_a_length_and_what_replaces_it_none(fields, message):
    with pytest.raises(UserError, match=message):
        build(SFTRun, {**SFT, **fields}, "run.yaml")
    build(SFTRun, {**SFT, "packing": False, "padding_free": True, "max_length": None}, "run.yaml")


def test_the_tables_name_real_fields():
    named = {*trl_limits.TYPES, *trl_limits._ABOVE_0, *trl_limits._AT_LEAST_1, *trl_limits._AT_LEAST_0}
    named |= {*trl_limits._BELOW_1, *trl_limits._AT_MOST, *OURS_INSTEAD, *UNSUPPORTED, *UNSUPPORTED_IN_GRPO}
    assert named <= {name for kind in ("GRPOConfig", "SFTConfig", "RewardConfig") for name in field_types(kind)}


def test_the_defaults_are_within_the_limits():
    from pydantic import TypeAdapter

    for kind in ("GRPOConfig", "SFTConfig", "RewardConfig"):
        for name, annotation in validated_types(kind).items():
            default = field_types(kind)[name][1]
            if default is not ... and name != "output_dir":
                TypeAdapter(annotation).validate_python(default)


SERVER = {"use_vllm": True, "vllm_server_host": "gpu1", "vllm_server_port": 8123}


@pytest.mark.parametrize(
    ("fields", "servers"),
    [
        (SERVER, "http://gpu1:8123"),
        ({**SERVER, "vllm_mode": "server"}, "http://gpu1:8123"),
        ({"use_vllm": True, "vllm_server_host": "gpu1"}, "http://gpu1:8000"),
        ({"use_vllm": True, "vllm_server_port": 9000}, "http://127.0.0.1:9000"),
        ({"use_vllm": True, "vllm_server_base_url": "http://gpu2:1"}, "http://gpu2:1"),
        ({"vllm_server_host": "gpu1", "rollout": {"engine": "vllm"}}, "http://gpu1:8000"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "managed"),
        ({"use_vllm": "yes", "vllm_server_port": "9000"}, "http://127.0.0.1:9000"),
    ],
)
def test_a_server_that_is_named_is_asked(small_grpo, fields, servers):
    del small_grpo["rollout"]
    run = build(GRPORun, {**small_grpo, **fields}, "run.yaml")
    assert (run.rollout.engine, run.rollout.servers) == ("vllm", servers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**SERVER, "vllm_mode": "colocate"},
            "`vllm_mode: colocate` asks no server, and `vllm_server_host` names one",
        ),
        (
            {**SERVER, "use_vllm": False},
            "`vllm_server_host` is about a server, which is only asked with `use_vllm: true`",
        ),
        ({"vllm_server_host": "gpu1"}, "only asked with `use_vllm: true`"),
        ({"vllm_mode": "server"}, "`vllm_mode` is about a server"),
        ({**SERVER, "vllm_server_base_url": "http://x:1"}, "both name the server"),
        ({**SERVER, "rollout": {"servers": "a.json"}}, "say the same thing"),
        ({"rollout": {"engine": "transformers", "servers": "a.json"}}, "no server is asked"),
    ],
)
def test_a_server_that_would_not_be_asked_is_refused(small_grpo, fields, message):
    del small_grpo["rollout"]
    with pytest.raises(UserError) as error:
        build(GRPORun, {**small_grpo, **fields}, "run.yaml")
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 2
