"""The estimate of memory, held against a count of every tensor of real steps."""

import weakref
from collections.abc import Callable

import pytest
import torch
import trl.kernels.chunked_logprob as tiles
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from r1dist.cluster import memory
from r1dist.cluster.memory import Step, parameter_count, step_memory
from r1dist.data.length_groups import by_prompt
from r1dist.rl.batch import RolloutBatch, collate
from r1dist.rl.logprobs import forward
from r1dist.rl.loss import LossConfig, grpo_loss
from r1dist.rl.shared_attention import ATTENTION

VOCABULARY, HIDDEN = 16384, 192
TILE_TOKENS, TILE_WORDS = 512, 2048
"""As small beside this model as TRL's own tiles are beside a real one."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make inside the context, as long as they live."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # Autograd adds up the two gradients of a tied embedding in place, but not under a mode.
        if func is torch.ops.aten.add.Tensor and made.shape == (VOCABULARY, HIDDEN):
            return made
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return made

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if id(storage) in given or self._seen.get(id(storage)) is storage:
            return
        self._seen[id(storage)] = storage
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """TRL's fused head as it is on a GPU, where kernels make none of the copies that torch makes here."""

    def uncounted(function: Callable) -> Callable:
        def called(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return called

    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(tiles, name, uncounted(getattr(tiles, name)))
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE_WORDS)
    monkeypatch.setattr(tiles, "TOKEN_CHUNK_SIZE", TILE_TOKENS)
    monkeypatch.setattr(memory, "TILE_WORDS", TILE_WORDS)
    monkeypatch.setattr(memory, "TILE_TOKENS", TILE_TOKENS)


def shape(tied: bool = True) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=960, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, max_position_embeddings=4096,
    )  # fmt: skip


def rollouts(rows: int, length: int, prompt: int = 16) -> RolloutBatch:
    """Of one prompt; all but one as long as they may be."""
    torch.manual_seed(0)
    lengths = [length - prompt] * (rows - 1) + [length - prompt - 16]
    prompt_ids = torch.randint(1, VOCABULARY, (prompt,))
    completions = [torch.randint(1, VOCABULARY, (n,)) for n in lengths]
    return RolloutBatch(
        rollout_ids=[(0, 0, i) for i in range(rows)],
        prompt_ids=[prompt_ids] * rows,
        completion_ids=completions,
        sampler_logprobs=[torch.full((n,), -9.0) for n in lengths],
        counts=[True] * rows,
        advantages=torch.linspace(-1, 1, rows),
        policy_versions=[0] * rows,
        rewards={},
        prompts=[""] * rows,
        texts=[""] * rows,
        reference_logprobs=[torch.full((n,), -9.0) for n in lengths],
    )


def backward(model: PreTrainedModel, batch: RolloutBatch, mixed: bool, shared: bool = False) -> None:
    """As `GRPOTrainer` makes it."""
    micro_batch = collate(batch, 0, shared=shared)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logprobs = forward(model, micro_batch, packed=False).logprobs
    loss, _ = grpo_loss(
        logprobs, None, micro_batch.reference_logprobs, micro_batch.sampler_logprobs, micro_batch.advantages,
        micro_batch.mask, LossConfig(beta=0.001), len(batch),
    )  # fmt: skip
    loss.backward()


DTYPES = {"float32": (4, 4), "autocast": (4, 2), "bfloat16": (2, 2)}
"""Bytes of weights and of the computation."""


def counted(
    config: Qwen2Config, dtype: str, checkpointed: bool, batch: RolloutBatch, lora: bool = False, shared: bool = False
) -> int:
    """The most bytes that a micro-batch has beside weights and gradients."""
    held, compute = DTYPES[dtype]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=ATTENTION).train()
    model = model.bfloat16() if held == 2 else model
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for parameter in model.parameters():  # of earlier micro-batches
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as bytes_:
        backward(model, batch, held != compute or lora, shared)
    return bytes_.peak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize(("rows", "length", "tied"), [(4, 128, True), (2, 384, False)])
def test_a_steps_memory_is_estimated_within_10_percent(as_on_a_gpu, dtype, checkpointed, rows, length, tied):
    held, compute = DTYPES[dtype]
    config = shape(tied)
    step = Step(rows * length, rows * length**2, held, compute, checkpointed)
    estimate = step_memory(config, parameter_count(config), step)
    assert estimate == pytest.approx(counted(config, dtype, checkpointed, rollouts(rows, length)), rel=0.10)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_so_is_that_of_adapters(as_on_a_gpu, checkpointed):
    config, (rows, length) = shape(), (4, 128)
    step = Step(rows * length, rows * length**2, 2, 2, checkpointed, adapters=True)
    estimate = step_memory(config, parameter_count(config), step)
    found = counted(config, "bfloat16", checkpointed, rollouts(rows, length), lora=True)
    assert estimate == pytest.approx(found, rel=0.10)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize(("dtype", "length", "prompt"), [("autocast", 144, 100), ("bfloat16", 80, 16)])
def test_a_shared_prompt_takes_the_memory_of_its_cost_in_tokens(as_on_a_gpu, dtype, checkpointed, length, prompt):
    """So a micro-batch within the token budget fits, whatever it shares."""
    held, compute = DTYPES[dtype]
    config, batch = shape(), rollouts(8, length, prompt)
    own = [len(ids) for ids in batch.completion_ids]
    size = list(by_prompt([0] * 8, [prompt - 1] * 8, own).sizes(range(8)))[-1]
    assert size.tokens < size.cost < 8 * length
    step = Step(size.cost, max(own) * (prompt - 1 + max(own)), held, compute, checkpointed)
    estimate = step_memory(config, parameter_count(config), step)
    assert 0.9 * estimate < counted(config, dtype, checkpointed, batch, shared=True) < 1.1 * estimate
