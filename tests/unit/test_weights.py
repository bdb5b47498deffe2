"""What leaves the trainer for the servers: names, shapes, merged adapters, and files that are whole or refused."""

import json
import os
import stat

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from r1dist.generation.weight_sync.files import INDEX, opened, read_index, write_folder
from r1dist.generation.weight_sync.scratch import PREFIX, own_folder, sweep
from r1dist.generation.weight_sync.source import WeightSource
from r1dist.tiny import BASE_DIR


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32")


def sent(source: WeightSource) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in source.buckets() for name, tensor in bucket}


def test_every_tensor_is_sent_and_a_tied_head_is_named(model):
    weights = sent(WeightSource(model, torch.float32))
    assert weights.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_keep_to_their_size_whatever_the_dtype(model, dtype):
    limit = 256 * 1024
    source = WeightSource(model, dtype, bucket_bytes=limit)
    sizes = [[tensor.nbytes for _, tensor in bucket] for bucket in source.buckets()]
    assert len(sizes) > 3
    assert all(sum(bucket) <= limit or len(bucket) == 1 for bucket in sizes)
    assert {tensor.dtype for tensor in sent(source).values()} == {dtype}


def test_a_rank_that_does_not_send_runs_through_the_same_buckets(model):
    source = WeightSource(model, torch.float32, bucket_bytes=256 * 1024)
    assert list(source.buckets(wanted=False)) == [[]] * len(list(source.buckets()))


def test_adapters_arrive_merged_and_the_trainers_weights_stay(model):
    plain = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    weights = sent(WeightSource(adapted, torch.float32))
    assert weights.keys() == plain.keys()
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())
    changed = {name for name in plain if not torch.equal(weights[name], plain[name])}
    assert changed == {name for name in plain if name.endswith("proj.weight")}

    ids = torch.arange(5, 25)[None]
    received = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32")
    received.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(received(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture
def written(model, tmp_path):
    source = WeightSource(model, torch.float32, bucket_bytes=512 * 1024)
    return tmp_path / "v1", write_folder(tmp_path / "v1", source.buckets()), sent(source)


def test_a_folder_holds_what_was_sent_and_is_nobody_elses(written):
    folder, digest, weights = written
    assert read_index(folder, digest).keys() == weights.keys()
    with opened(folder) as tensors:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.parent.glob("*.partial"))


def test_an_open_folder_can_be_read_after_it_was_removed(written):
    folder, _, weights = written
    with opened(folder) as tensors:
        for path in folder.iterdir():
            path.unlink()
        assert dict(tensors).keys() == weights.keys()


def cut_short(folder):
    shard = next(folder.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)


def replace_shard(folder):
    save_file({"other": torch.zeros(2)}, next(folder.glob("*.safetensors")))


def lose_shard(folder):
    next(folder.glob("*.safetensors")).unlink()


def edit_index(folder):
    index = json.loads((folder / INDEX).read_text())
    index.popitem()
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("damage", [cut_short, replace_shard, lose_shard, edit_index])
def test_a_damaged_folder_is_refused(written, damage):
    folder, digest, _ = written
    damage(folder)
    with pytest.raises(Exception, match=r"refused|[Nn]o such file|header|incomplete|not fully covered"):
        read_index(folder, digest)


def test_only_what_dead_processes_left_is_swept(tmp_path):
    mine = own_folder(tmp_path)
    dead = tmp_path / f"{PREFIX}-{2**22 + 1}-abcd"
    other = tmp_path / "somebody-elses"
    for folder in (mine, dead, other):
        folder.mkdir()
    sweep(tmp_path)
    assert mine.exists() and other.exists() and not dead.exists()
