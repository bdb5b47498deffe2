"""The in-process engine: what it draws is what the policy says, sample by sample."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from r1dist.generation.engine import Request, Sampling, generate, sample_seed
from r1dist.generation.local import ROOM, InProcessEngine, roomy_cache

QUESTIONS = ["Start with 2, then +4 *7 +1: what is the last digit?", "Start with 9, then *3 +3 +8 *9 +2: what is"]


@pytest.fixture
def engine_of(base_model, tokenizer):
    def make(batch_size):
        @contextmanager
        def unwrapped():
            yield base_model

        stops = list(base_model.generation_config.eos_token_id)
        return InProcessEngine(unwrapped, stops, tokenizer.pad_token_id, batch_size)

    return make


def requests(tokenizer, count, step=0):
    made = []
    for prompt_id, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        made += [Request(ids, prompt_id, i, sample_seed(0, step, prompt_id, i)) for i in range(count)]
    return made


def test_a_rollout_does_not_depend_on_its_batch(engine_of, tokenizer):
    asked = requests(tokenizer, 8)
    sampling = Sampling(max_tokens=40)
    whole = generate(engine_of(16), asked, sampling)
    parts = generate(engine_of(3), asked[::-1], sampling)[::-1]
    assert [r.token_ids for r in whole] == [r.token_ids for r in parts]
    assert len({tuple(r.token_ids) for r in whole[:8]}) > 1
    other_step = generate(engine_of(16), requests(tokenizer, 8, step=1), sampling)
    assert [r.token_ids for r in whole] != [r.token_ids for r in other_step]


def test_a_long_beginning_that_prompts_share_is_read_once(engine_of, tokenizer, base_model):
    """And what is drawn is what each prompt alone gives."""
    own = requests(tokenizer, 4)
    asked = [replace(r, prompt_ids=own[0].prompt_ids * 3 + r.prompt_ids) for r in own]
    widths = []
    hook = base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        together = generate(engine_of(16), asked, Sampling(max_tokens=40))
    finally:
        hook.remove()
    common = len(own[0].prompt_ids) * 3
    assert widths[0][0] == 1 and common <= widths[0][1] < common + len(own[0].prompt_ids)
    assert widths[1] == (2, max(len(r.prompt_ids) for r in asked) - widths[0][1])
    alone = [rollout for r in asked for rollout in generate(engine_of(1), [r], Sampling(max_tokens=40))]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    for rollout, other in zip(together, alone, strict=True):
        assert rollout.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_that_have_ended_leave_the_batch(engine_of, tokenizer, base_model):
    sizes = []
    hook = base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        rollouts = generate(engine_of(16), requests(tokenizer, 8), Sampling(max_tokens=40))
    finally:
        hook.remove()
    alive = [sum(len(r.token_ids) > step for r in rollouts) for step in range(len(sizes))]
    assert sizes[0] == len(QUESTIONS) and sizes[1] > 8  # a prompt is read once
    assert len(set(sizes[1:])) > 2
    for left, size in zip(alive[1:], sizes[1:], strict=True):
        assert left <= size < max(left / 0.75, left + 1) + 1


def test_logprobs_are_the_models_own_and_greedy_is_its_best(engine_of, tokenizer, base_model):
    for temperature in (0, 1.0, 0.5):
        rollouts = generate(engine_of(5), requests(tokenizer, 3), Sampling(max_tokens=30, temperature=temperature))
        for rollout in rollouts:
            prompt = rollout.request.prompt_ids
            ids = torch.tensor([prompt + rollout.token_ids])
            with torch.no_grad():
                scores = base_model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            logps = (scores / (temperature or 1.0)).log_softmax(-1)
            own = logps[torch.arange(len(rollout.token_ids)), rollout.token_ids]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), own, atol=1e-4, rtol=0)
            if temperature == 0:
                assert logps.argmax(-1).tolist() == rollout.token_ids


def test_a_cache_with_room_holds_what_transformers_own_holds(base_model):
    generator = torch.Generator().manual_seed(0)
    caches = roomy_cache(base_model.config), DynamicCache(config=base_model.config)
    assert type(caches[0].layers[0]) is not type(caches[1].layers[0])
    for new in (7, 1, ROOM - 1, 1, 1, 3 * ROOM):
        states = torch.randn(2, 4, 3, new, 8, generator=generator)
        held = [cache.update(*states, 0) for cache in caches]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*held, strict=True))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        for cache in caches:
            cache.layers[0].batch_select_indices(torch.tensor([2, 0, 0, 3]))


def test_draws_follow_the_policys_distribution(engine_of, tokenizer, base_model):
    asked = requests(tokenizer, 2000)[:2000]
    drawn = Counter(r.token_ids[0] for r in generate(engine_of(500), asked, Sampling(max_tokens=1)))
    with torch.no_grad():
        policy = base_model(input_ids=torch.tensor([asked[0].prompt_ids])).logits[0, -1].softmax(-1)
    for token in policy.topk(4).indices.tolist():
        share, deviation = policy[token].item(), (policy[token] * (1 - policy[token]) / 2000).sqrt().item()
        assert abs(drawn[token] / 2000 - share) < 4 * deviation + 1e-3


def test_top_k_top_p_and_temperature_narrow_the_draw(engine_of, tokenizer):
    asked = requests(tokenizer, 40)
    greedy = [r.token_ids for r in generate(engine_of(80), asked, Sampling(max_tokens=12, temperature=0))]
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}, {"min_p": 1.0}):
        assert [r.token_ids for r in generate(engine_of(80), asked, Sampling(max_tokens=12, **narrow))] == greedy


def test_finish_reason_and_version(engine_of, tokenizer):
    engine = engine_of(64)
    engine.sync_weights(7)
    rollouts = generate(engine, requests(tokenizer, 20), Sampling(max_tokens=6))
    stops = set(engine.stop_ids)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert rollout.policy_version == 7
        assert 1 <= len(rollout.token_ids) <= 6 and len(rollout.logprobs) == len(rollout.token_ids)
        assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] in stops)
        assert not stops & set(rollout.token_ids[:-1])


def test_seeds_differ_between_samples_prompts_steps_and_runs():
    seeds = {sample_seed(r, s, p, i) for r in range(3) for s in range(5) for p in range(7) for i in range(8)}
    assert len(seeds) == 3 * 5 * 7 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
