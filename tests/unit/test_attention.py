"""Which attention kernel a model is loaded with."""

import pytest
import torch
import varlen_stand_in
from varlen_stand_in import NAME as HUB

from r1dist.cluster.memory import Sharding, training_memory
from r1dist.cluster.plan import check_machine
from r1dist.cluster.shapes import QWEN_HALF_BILLION
from r1dist.config import GRPORun, Model, SFTRun
from r1dist.config.loader import build
from r1dist.errors import UserError
from r1dist.models import VARLEN, attention, model_init_kwargs, why_missing
from r1dist.sft.train import warn_of_masks


@pytest.fixture
def gpu(monkeypatch):
    """Lets torch find a GPU of this compute capability."""

    def found(major: int = 8) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (major, 0))

    return found


@pytest.fixture
def installed(monkeypatch):
    """As where the `kernels` package has flash attention from the hub; the kernel itself needs a GPU."""
    varlen_stand_in.install(monkeypatch)


def test_without_a_gpu_or_a_kernel_it_is_sdpa(gpu):
    assert attention(Model(path="tiny"), half=True) == "sdpa"
    gpu()
    assert attention(Model(path="tiny"), half=True) == "sdpa"


@pytest.mark.parametrize(
    ("major", "trl", "dtype", "kernel"),
    [
        (8, {"bf16": True}, "float32", VARLEN),
        (8, {}, "float32", VARLEN),
        (9, {"bf16": False}, "bfloat16", VARLEN),
        (8, {"bf16": False}, "float32", "sdpa"),  # flash attention computes in 16 bits
        (8, {"bf16": True, "use_cpu": True}, "float32", "sdpa"),
        (7, {"fp16": True}, "float32", "sdpa"),  # Turing is too old for it
    ],
)
def test_on_a_gpu_flash_attention_is_the_default_where_it_is_installed(gpu, installed, major, trl, dtype, kernel):
    gpu(major)
    assert model_init_kwargs(Model(path="tiny", dtype=dtype), trl)["attn_implementation"] == kernel


def test_a_kernel_of_the_hub_may_be_named(installed):
    assert attention(Model(path="tiny", attn_implementation=HUB), half=True) == HUB
    assert attention(Model(path="tiny", attn_implementation=VARLEN), half=True) == VARLEN


@pytest.mark.parametrize("kernel", [VARLEN, "flash_attention_3", HUB, "no_such_kernel", "flash_attention_9"])
def test_a_kernel_that_is_not_there_is_refused_before_anything_is_loaded(kernel, small_grpo):
    tree = {**small_grpo, "model": {"path": "not/downloaded", "attn_implementation": kernel}}
    with pytest.raises(UserError, match=f"model.attn_implementation: {kernel} cannot be used here") as refused:
        check_machine(build(GRPORun, tree, "test"))
    assert len(str(refused.value).splitlines()) == 2


def test_what_transformers_has_itself_is_there():
    assert [why_missing(kernel) for kernel in ("sdpa", "eager", "flex_attention")] == [None] * 3


def test_packing_without_a_varlen_kernel_says_what_mends_it(gpu, caplog):
    warn_of_masks("sdpa", 1)  # nothing can be mended without a GPU
    gpu()
    warn_of_masks(HUB, 8)
    assert not caplog.records
    warn_of_masks("sdpa", 8)
    assert "`make setup GPU=1`" in caplog.text and "with 8 times the `gradient_accumulation_steps`" in caplog.text


def test_masks_are_counted_unless_the_kernel_needs_none(gpu, installed):
    tree = {"model": {"path": "Qwen/Qwen2.5-0.5B"}, "data": {"sources": [{"path": "tiny_sft"}]}, "output_dir": "x"}
    tree |= {"max_length": 16384, "per_device_train_batch_size": 1, "gradient_checkpointing": True, "bf16": True}

    def activations() -> int:
        run = build(SFTRun, tree, "test")
        return training_memory(run, QWEN_HALF_BILLION, Sharding())["activations (training)"]

    without = activations()
    gpu()
    assert without - activations() > 3 * 16384**2  # a byte for each pair of tokens, and two that are added to scores
