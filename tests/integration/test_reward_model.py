"""Reward models: trained, measured, read on the part that is theirs, and refused where they cannot be."""

import json

import pytest
import torch
from conftest import launch, write_yaml
from small_runs import LABELS as SMALL_LABELS
from small_runs import PAIRS as SMALL_PAIRS
from small_runs import Launch
from transformers import AutoModelForSequenceClassification

from r1dist.config import Reward, RewardModelRun, Source
from r1dist.config.loader import build
from r1dist.data.sources import load_labels, load_pairs
from r1dist.errors import UserError
from r1dist.reward_models.train import holdout_rows, measure, new_classifier, training_rows
from r1dist.rewards import Rewards
from r1dist.rewards import model as model_reward
from r1dist.rewards.model import ModelReward, batches
from r1dist.tiny import BASE_DIR, talk

SMALL = {
    "model": {"path": "tiny"},
    "seed": 0,
    "max_steps": 40,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "max_length": 256,
    "gradient_checkpointing": False,
    "save_steps": 20,
}
PAIRS, LABELS = (
    {
        "loss": kind,
        "sources": [{"path": path, "limit": 2000}],
        "holdout": [{"path": path, "split": "test", "limit": 240}],
    }
    for kind, path in (("pairwise", "tiny_pairs"), ("pointwise", "tiny_judged"))
)
ROW = {"problem": "Say hello to Ann.", "kind": "talk"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with both, trained for seconds."""
    folder = tmp_path_factory.mktemp("reward_models")
    for name, tree in (("helpfulness", PAIRS), ("safety", LABELS)):
        config = write_yaml(folder / f"{name}.yaml", {**SMALL, **tree, "output_dir": str(folder / name)})
        done = launch("reward_model.py", "--config", config)
        assert done.returncode == 0, done.stderr
    return folder


def test_they_learn_and_are_measured_on_rows_held_out(trained):
    for name in ("helpfulness", "safety"):
        scores = json.loads((trained / name / "evaluation.json").read_text())
        assert scores["rows"] > 200 and scores["accuracy"] > 0.7, (name, scores)
        assert scores["ci95"][0] < scores["accuracy"] < scores["ci95"][1]


@pytest.mark.parametrize(
    ("tree", "load", "lora", "deepspeed"),
    [
        (SMALL_PAIRS, load_pairs, None, None),
        (SMALL_PAIRS, load_pairs, None, "zero3"),
        (SMALL_LABELS, load_labels, {"r": 4}, "zero3"),
    ],
)
def test_several_ranks_measure_what_one_does(tree, load, lora, deepspeed, zygote, tmp_path):
    (source,) = tree["sources"]
    held_out = [{**source, "split": "test", "limit": 23}]  # no multiple of the ranks
    short = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 2}
    tree = {**tree, **short, "model": {"path": "tiny", "lora": lora}, "holdout": held_out}
    config = write_yaml(tmp_path / "run.yaml", {**tree, "output_dir": str(tmp_path / "run")})
    launch = Launch(zygote, "reward_model.py", config, 2, deepspeed=deepspeed)
    assert launch.wait() == [0, 0], launch.log.read_text()[-3000:]
    run = build(RewardModelRun, {**tree, "output_dir": str(tmp_path / "run")}, "test")
    alone = measure(run, load(run.holdout))
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores == {"rows": 23, "accuracy": alone.accuracy, "ci95": pytest.approx(alone.ci95)}


def test_a_classifiers_head_is_the_seeds_whatever_was_drawn_before(tokenizer):
    heads = []
    for seed, drawn in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(drawn)  # a process of its own begins anywhere
        run = build(RewardModelRun, {**SMALL, **LABELS, "seed": seed, "output_dir": "unused"}, "test")
        heads.append(new_classifier(run, tokenizer.pad_token_id, {}).score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_helpfulness_reads_the_summary_alone_and_safety_everything(trained):
    helpfulness, safety = (ModelReward(name, str(trained / name)) for name in ("helpfulness", "safety"))
    texts = [talk.response(thought, "Hello!") for thought in ("This does harm.", "A greeting.")]
    one, other = helpfulness(texts, [ROW, ROW])
    assert one == pytest.approx(other, abs=1e-5)
    assert helpfulness([talk.response("A greeting.", "")], [ROW])[0] < one
    one, other = safety(texts, [ROW, ROW])
    assert abs(one - other) > 1e-4 and 0 < one < 1 and 0 < other < 1


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(trained):
    model = ModelReward("safety", str(trained / "safety"))
    rows = load_labels([Source(path="tiny_judged", limit=70)])
    together = model(rows["completion"], list(rows))
    alone = [model([row["completion"]], [row])[0] for row in rows.select(range(5))]
    assert together[:5] == pytest.approx(alone, abs=1e-5)


def test_forwards_are_bounded_by_tokens_and_take_every_row_once(monkeypatch):
    monkeypatch.setattr(model_reward, "SCORED_TOKENS", 100)
    lengths = [10, 99, 3, 150, 50, 30, 31, 1, 20]
    found = list(batches(lengths))
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= 100
    assert found[-2:] == [[1], [3]] and len(found) < len(lengths) - 2
    assert list(batches([])) == []


def test_in_bfloat16_a_reward_model_takes_half_and_still_tells_replies_apart(trained):
    rows = load_labels([Source(path="tiny_judged", limit=64)])
    whole, half = (ModelReward("safety", str(trained / "safety"), dtype) for dtype in ("float32", "bfloat16"))
    assert half.model.get_memory_footprint() < 0.51 * whole.model.get_memory_footprint()
    scores, rounded = (model(rows["completion"], list(rows)) for model in (whole, half))
    assert rounded == pytest.approx(scores, abs=0.05)
    assert len(set(rounded)) == len(set(scores))  # the head, in float32, makes no ties


def test_rows_held_out_that_are_longer_than_the_limit_are_not_measured(template, caplog):
    for tree, load in ((PAIRS, load_pairs), (LABELS, load_labels)):
        run = build(RewardModelRun, {**SMALL, **tree, "output_dir": "x"}, "test")
        ids = training_rows(run, template).remove_columns("labels" if tree is LABELS else "rejected_ids")
        run.trl["max_length"] = sorted(len(row) for (row,) in (each.values() for each in ids))[len(ids) // 2]
        caplog.clear()
        rows, all_rows = holdout_rows(run, template), load(run.holdout)
        assert 0 < len(rows) < len(all_rows) and rows.column_names == all_rows.column_names
        assert f"holdout: dropped {len(all_rows) - len(rows)} of {len(all_rows)} rows" in caplog.text
    run = build(RewardModelRun, {**SMALL, **PAIRS, "output_dir": "x", "max_length": 2}, "test")
    with pytest.raises(UserError, match="holdout: none of the"):
        holdout_rows(run, template)


def test_in_the_rewards_of_a_run_each_kind_has_its_own(trained, pool):
    rewards = {
        "safety": Reward(parameters={"model": str(trained / "safety")}, kinds=["talk"]),
        "accuracy": Reward(kinds=["math"]),
    }
    scorers = Rewards(rewards, pool).scorers
    rows = [ROW, {"problem": "1+1?", "answer": "2", "kind": "math"}]
    texts = [talk.response("A greeting.", "Hello!"), "<answer>2</answer>"]
    scores = {name: scorer(texts, rows) for name, scorer in scorers.items()}
    assert scores["accuracy"] == [None, 1.0] and scores["safety"][1] is None and 0 < scores["safety"][0] < 1


def test_the_loss_of_labels_is_binary_cross_entropy(template):
    run = build(RewardModelRun, {**SMALL, **LABELS, "output_dir": "x"}, "test")
    tokenizer = template.tokenizer
    rows = training_rows(run, template).select(range(7))
    assert len({len(ids) for ids in rows["input_ids"]}) > 2
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        BASE_DIR, num_labels=1, problem_type="multi_label_classification", pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    ).eval()  # fmt: skip
    batch = tokenizer.pad({"input_ids": rows["input_ids"]}, padding_side="right", return_tensors="pt")
    labels = torch.tensor(rows["labels"])
    loss = model(**batch, labels=labels).loss
    logits = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in rows["input_ids"]])
    right = torch.where(labels[:, 0] == 1, logits.sigmoid(), 1 - logits.sigmoid())
    assert loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-5)


def test_pairs_come_as_trl_takes_them_and_over_long_ones_are_dropped(template, caplog):
    run = build(RewardModelRun, {**SMALL, **PAIRS, "output_dir": "x", "max_length": 36}, "test")
    rows = training_rows(run, template)
    assert set(rows.column_names) == {"chosen_ids", "rejected_ids"}
    assert max(map(len, rows["chosen_ids"])) <= 36 and 0 < len(rows) < len(load_pairs(run.sources))
    text = template.tokenizer.decode(rows[0]["chosen_ids"])
    assert text.startswith("<|im_start|>user\n") and text.count("<|im_end|>") == 2


def test_a_reply_may_be_the_last_turn_of_a_conversation(tmp_path):
    file = tmp_path / "rows.jsonl"
    talks = {
        name: [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}] for name in ("good", "bad")
    }
    file.write_text(json.dumps({"p": "q", **talks}) + "\n")
    (row,) = load_pairs([Source(path=str(file), problem="p", chosen="good", rejected="bad")])
    assert row == {"problem": "q", "chosen": "good", "rejected": "bad"}


def test_strange_labels_and_missing_columns_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "a", "r": "b", "s": 2}\n')
    with pytest.raises(UserError, match="must hold 0 or 1; there is also 2"):
        load_labels([Source(path=str(file), problem="q", completion="r", label="s")])
    with pytest.raises(UserError, match="needs `chosen`"):
        load_pairs([Source(path=str(file), problem="q")])
