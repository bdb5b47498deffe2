"""The hub is asked before training, what is uploaded is what was named, and the card says what the record says."""

import json
import logging
import time
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from r1dist.config import GRPORun, RewardModelRun, SFTRun
from r1dist.config.loader import as_tree, build
from r1dist.errors import RunStopped, UserError
from r1dist.files import write_json, write_run_file
from r1dist.publish import licences
from r1dist.publish.card import model_card
from r1dist.publish.hub import Publication, hub_repository
from r1dist.run.resume import check_same
from r1dist.tiny import BASE_DIR

SFT = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny_talk", "limit": 8}]}, "max_steps": 4}
GRPO = {
    "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny", "limit": 8}], "template": "r1_zero"},
    "num_generations": 4, "per_device_train_batch_size": 8, "rollout": {"engine": "transformers"},
}  # fmt: skip
PAIRS = {"model": {"path": "tiny"}, "loss": "pairwise", "sources": [{"path": "tiny_pairs", "limit": 8}]}


def run_of(tmp_path, **fields) -> SFTRun:
    return build(SFTRun, {**SFT, "output_dir": str(tmp_path / "mine"), "push_to_hub": True, **fields}, "test")


@pytest.mark.parametrize(
    ("token", "fields", "message"),
    [
        ("hf_wrong", {}, r"^`push_to_hub`: http.* refuses the token \(401\)"),
        ("hf_reads", {}, r"^`push_to_hub`: the token mine of somebody may only read"),
        ("", {}, r"^`push_to_hub`: there is no token"),
        ("hf_writes", {"hub_model_id": "others/x"}, r"^`hub_model_id`: the hub does not let somebody .* `others/x`"),
        ("hf_writes", {"hub_model_id": "no name"}, r"^`hub_model_id`: the hub does not let somebody .* `no name`"),
    ],
)
def test_what_the_hub_refuses_is_refused_at_the_start(tmp_path, hub, monkeypatch, token, fields, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no such token"))
    with pytest.raises(UserError, match=message) as refused:
        hub_repository(run_of(tmp_path, **fields))
    assert len(str(refused.value).splitlines()) == 2 and hub.repositories == {}


def test_a_hub_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub_repository(run_of(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached"):
        hub_repository(run_of(tmp_path))


def test_the_repository_is_made_as_the_fields_say(tmp_path, hub):
    assert hub_repository(build(SFTRun, {**SFT, "output_dir": str(tmp_path)}, "test")) is None and hub.calls == []
    assert hub_repository(run_of(tmp_path)) == "somebody/mine" and not hub.private
    fields = {"hub_model_id": "somebody/other", "hub_private_repo": True, "hub_revision": "trial"}
    for _ in range(2):  # the second time, both are there
        assert hub_repository(run_of(tmp_path, **fields)) == "somebody/other"
    assert hub.private == {"somebody/other"} and set(hub.repositories["somebody/other"]) == {"main", "trial"}


def written(run, tmp_path):
    """The folder of `run` as a run leaves it, with files that are nobody's business."""
    folder = tmp_path / "mine"
    write_run_file(folder, "sft", as_tree(run), {}, [{"problem": "secret"}], 2)
    model = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    others = ("training_args.bin", "ended.json", "trainer_state.json", "traces/rank0.jsonl")
    for name in (*model, *others, "runs/a/events.out.tfevents.1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def saved(folder, step: int):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", "optimizer.pt", "state.json", f"rank{step}.pt"):
        (checkpoint / name).write_text(f"{name} of {step}")
    return checkpoint


def until(done) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def publication(run, folder, repository) -> tuple[Publication, SimpleNamespace]:
    arguments = SimpleNamespace(output_dir=str(folder))
    trainer = SimpleNamespace(args=arguments, is_world_process_zero=lambda: True, on_saved=None)
    return Publication(run, trainer, repository), trainer


MODEL = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}


def test_the_end_uploads_the_model_its_card_and_nothing_else(tmp_path, hub):
    run = run_of(tmp_path, hub_strategy="end")
    folder = written(run, tmp_path)
    published, trainer = publication(run, folder, hub_repository(run))
    assert trainer.on_saved is None
    published.finish()
    files = hub.files("somebody/mine")
    assert (
        set(files) == MODEL | {"runs/a/events.out.tfevents.1"} and files["model.safetensors"] == b"model.safetensors"
    )
    assert files["README.md"] == (folder / "README.md").read_bytes() and hub.messages == ["End of training"]
    assert not (folder / ".uploading").exists() and b"secret" not in b"".join(files.values())


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("every_save", set()),
        ("checkpoint", {f"last-checkpoint/{n}" for n in ("config.json", "optimizer.pt", "rank2.pt", "state.json")}),
        ("all_checkpoints", {f"checkpoint-{step}/rank{step}.pt" for step in (1, 2)}),
    ],
)
def test_checkpoints_are_uploaded_as_the_strategy_says(tmp_path, hub, strategy, more):
    run = run_of(tmp_path, hub_strategy=strategy, hub_always_push=True)
    folder = written(run, tmp_path)
    _, trainer = publication(run, folder, hub_repository(run))
    for step in (1, 2):
        checkpoint = saved(folder, step)
        trainer.on_saved(checkpoint)
        for file in checkpoint.iterdir():  # as `save_total_limit` may, at once
            file.unlink()
    until(lambda: len(hub.messages) == 2 and not (folder / ".uploading/checkpoint-2").exists())
    files = hub.files("somebody/mine")
    assert files["model.safetensors"] == b"model.safetensors of 2" and more <= set(files)
    assert "last-checkpoint/rank1.pt" not in files and {"optimizer.pt", "state.json"}.isdisjoint(files)
    assert b"Training goes on" in files["README.md"] and b"2 optimizer steps" in files["README.md"]


def test_a_failed_upload_ends_no_training_but_is_told_at_its_end(tmp_path, hub, caplog):
    run = run_of(tmp_path)
    folder = written(run, tmp_path)
    published, trainer = publication(run, folder, hub_repository(run))
    hub.refuse_commits = 1
    with caplog.at_level(logging.WARNING):
        trainer.on_saved(saved(folder, 1))
        until(lambda: "the upload of step 1 to somebody/mine failed" in caplog.text)
    hub.refuse_commits = 1
    with pytest.raises(RunStopped, match=r"The model is saved in .*mine, but its upload to somebody/mine failed"):
        published.finish()
    assert {path.name for path in (folder / ".uploading/final").iterdir()} == MODEL | {"runs"}
    published.finish()
    assert set(hub.files("somebody/mine")) >= MODEL


def card_of(tmp_path, run_class, tree: dict, launcher: str, metrics: list[dict] = (), **kwargs) -> ModelCard:
    run = build(run_class, {**tree, "output_dir": str(tmp_path / "run")}, "test")
    write_run_file(tmp_path / "run", launcher, as_tree(run), {}, (), 2)
    lines = "".join(json.dumps(line) + "\n" for line in metrics)
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    return model_card(tmp_path / "run", **kwargs)


def test_the_card_of_an_rl_run(tmp_path, hub):
    hub.cards = {
        ("models", "org/base"): {"license": "apache-2.0"},
        ("datasets", "org/data"): {"license": ["mit", "cc0-1.0"]},
        ("datasets", "org/plain"): {},
    }
    sources = [{"path": "org/data", "subset": "main", "problem": "q", "answer": "a"}]
    sources += [{"path": path, "problem": "q", "answer": "a"} for path in ("org/plain", "org/missing")]
    tree = {**GRPO, "model": {"path": "org/base"}, "rewards": {"accuracy": 1, "format": 0.5}, "beta": 0.02}
    tree["data"] = {"sources": [*sources, {"path": "tiny", "limit": 8}], "template": "r1_zero"}
    lines = [
        {"step": step, "reward": step / 100, "completions/mean_length": 5.0, "rewards/accuracy/mean": None}
        for step in range(1, 41)
    ]
    lines += [{"step": 40, "eval/gsm8k/accuracy": 0.25}, {"step": 40, "train_loss": 1.0, "train_runtime": 2.0}]
    card = card_of(tmp_path, GRPORun, tree, "grpo", lines, repository="me/zero")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["license"] == "apache-2.0"
    assert data["datasets"] == ["org/data", "org/plain", "org/missing"] and data["pipeline_tag"] == "text-generation"
    for row in (
        "| base model | [org/base](https://huggingface.co/org/base) (licence: apache-2.0) |",
        "| org/data | main, split train | all | mit, cc0-1.0 |",
        "| org/plain | split train | all | not known |",
        "| org/missing | split train | all | not known |",
        "| tiny | split train | 8 | mit |",
        "| `beta` | 0.02 |",
        "| `weight_decay` | 0.0 |",
        "| `num_train_epochs` | 3.0 |",
        "| processes | 2 |",
        "| reward `format` | weight 0.5 |",
        "| steps | reward | tokens | accuracy |",
        "| 1 to 4 | 0.025 | 5 | - |",
        "| 37 to 40 | 0.385 | 5 | - |",
        "| 40 | 0.25 |",
    ):
        assert row in card.text, row
    assert "`max_steps`" not in card.text and "`fp16`" not in card.text
    assert "40 optimizer steps" in card.text and "hf download me/zero" in card.text
    assert "was not trained with the tokenizer's chat template" in card.text and "v1/completions" in card.text


def test_the_configuration_in_the_card_is_the_runs_own(tmp_path):
    tree = {**GRPO, "learning_rate": 3e-6, "placement": {"nodes": 1}, "push_to_hub": True}
    card = card_of(tmp_path, GRPORun, tree, "grpo")
    shown = card.text.partition("```yaml\n")[2].partition("```")[0]
    assert "accelerate launch --num_processes 2 launch/grpo.py --config run.yaml" in card.text
    again = yaml.safe_load(shown)
    assert {"output_dir", "placement", "push_to_hub"}.isdisjoint(again)
    rebuilt = build(GRPORun, {**again, "output_dir": str(tmp_path / "run")}, "card")
    check_same(tmp_path / "run", GRPORun, as_tree(rebuilt), {})


def test_what_looks_like_a_secret_is_not_shown(tmp_path):
    card_of(tmp_path, SFTRun, SFT, "sft")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["config"]["judge"] = {"api_key": "sk-1", "name": "j", "more": [{"password": "pw-1"}]}
    write_json(tmp_path / "run/run.json", record)
    text = model_card(tmp_path / "run").text
    assert "sk-1" not in text and "pw-1" not in text and "api_key: (not shown)" in text and "name: j" in text


def test_the_cards_of_reward_models_and_adapters(tmp_path):
    (tmp_path / "run").mkdir()
    scores = {"rows": 50, "accuracy": 0.9, "ci95": [0.8, 0.95]}
    write_json(tmp_path / "run/evaluation.json", scores)
    card = card_of(tmp_path, RewardModelRun, PAIRS, "reward_model", [{"step": 1, "loss": 0.5, "accuracy": 0.5}])
    assert card.data.pipeline_tag == "text-classification" and "vLLM" not in card.text
    assert "Right on 90.0 % of 50 rows held out (95 % interval 80.0 to 95.0 %)." in card.text
    assert "AutoModelForSequenceClassification" in card.text and "| 1 | 0.5 | 0.5 |" in card.text
    (tmp_path / "run/evaluation.json").unlink()
    lora = {**SFT, "model": {"path": "tiny", "lora": {}}}
    card = card_of(tmp_path, SFTRun, lora, "sft")
    assert card.data.library_name == "peft" and "merge_and_unload" in card.text and "--model merged" in card.text
    merged = {**SFT, "model": {"path": "tiny", "lora": {"save": "merged"}}}
    card = card_of(tmp_path, SFTRun, merged, "sft")
    assert card.data.library_name == "transformers" and "merge_and_unload" not in card.text


def test_licence_and_base_are_handed_on_from_a_folders_card(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in BASE_DIR.iterdir():
        (base / file.name).symlink_to(file)
    tree = {**SFT, "model": {"path": str(base)}}
    assert "base_model" not in card_of(tmp_path, SFTRun, tree, "sft").data.to_dict()
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\nbase_model: org/first\n---\n# Base\n")
    licences._licence.cache_clear()
    data = card_of(tmp_path, SFTRun, tree, "sft").data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["base_model"] == "org/first"


def test_rows_that_were_sampled_have_the_licences_of_their_problems(tmp_path):
    rows = tmp_path / "cold_start" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("")
    generators = [{"data": {"sources": [{"path": "tiny"}]}}, {"data": {"sources": [{"path": "reasoning_gym"}]}}]
    write_json(rows.parent / "run.json", {"launcher": "sample", "config": {"generators": generators, "mix": []}})
    tree = {**SFT, "data": {"sources": [{"path": str(rows), "conversation": "messages"}]}}
    expected = "sampled by r1dist, for problems of tiny, reasoning_gym | all | mit, apache-2.0 |"
    assert expected in card_of(tmp_path, SFTRun, tree, "sft").text
