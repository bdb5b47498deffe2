"""What a chat template opens, closes and drops is found out by rendering it; TRL's copies of real ones are tried."""

import json
import re
from pathlib import Path

import pytest
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1dist.config import Data, Generator, GRPORun, Model, Prompting, SampleRun, ServeRun, Source
from r1dist.config.loader import build
from r1dist.data.prompts import completion_dataset, prompt_dataset
from r1dist.data.templates import INSTRUCTION, NO_THOUGHT, Template, load_template
from r1dist.errors import UserError
from r1dist.generation.vllm.command import command
from r1dist.generation.vllm.start import plan_serve
from r1dist.models import load_tokenizer
from r1dist.rewards.format import has_format
from r1dist.rewards.model import conversation_ids
from r1dist.rl.train import _train
from r1dist.sampling.run import _jobs
from r1dist.tiny import BASE_DIR

FOLDER = Path(trl.__file__).parent / "chat_templates"
OPENS = "<think>\n"
# Template -> the token that ends a reply, and what the prompt opens. Base tokenizers end texts with another token.
REAL = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "deepseek_r1_distill": ("<｜end▁of▁sentence｜>", OPENS),
    "deepseekv3": ("<｜end▁of▁sentence｜>", OPENS),
    "gemma": ("<end_of_turn>", ""),
    "gemma3": ("<end_of_turn>", ""),
    "glm4moe": ("<|user|>", ""),
    "lfm2": ("<|im_end|>", ""),
    "llama3": ("<|eot_id|>", ""),
    "llama3_1": ("<|eot_id|>", ""),
    "llama3_2": ("<|eot_id|>", ""),
    "nemotron_3_nano": ("<|im_end|>", OPENS),
    "phi3": ("<|end|>", ""),
    "phi3_5": ("<|end|>", ""),
    "qwen2_5": ("<|im_end|>", ""),
    "qwen3": ("<|im_end|>", ""),
    "qwen3_5_nothink": ("<|im_end|>", NO_THOUGHT),
    "qwen3_5_think": ("<|im_end|>", OPENS),
    "qwen3_6": ("<|im_end|>", OPENS),
    "qwen3_instruct_2507": ("<|im_end|>", ""),
}
CHANNELS = ("gptoss", "muse_glimmer")
OTHER_MESSAGES = ("idefics3", "smolvlm", "llava_next")
REPLY = "<think>1+1 is 2.</think>\n<answer>2</answer>"


def tokenizer_of(text: str):
    """The tiny tokenizer with the special tokens that a chat template writes; texts end with `<|endoftext|>`."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.eos_token = "<|endoftext|>"
    found = re.findall(r"<[|｜][^<>{}'\"]*?[|｜]>|<(?:start|end)_of_turn>", text)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(found))}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.chat_template = text
    return tokenizer


def real(name: str) -> Template:
    return Template(tokenizer_of((FOLDER / f"{name}.jinja").read_text()), "chat", name)


def template_of(text: str, name: str = "chat") -> Template:
    return Template(tokenizer_of(text), name, "m")


CHATML = (BASE_DIR / "chat_template.jinja").read_text()
OPENED = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.mark.parametrize("name", REAL)
def test_real_templates(name):
    """A prompt is what the model is given, a taught row begins with it, and what is taught last ends generation."""
    end, opening = REAL[name]
    template = real(name)
    tokenizer = template.tokenizer
    assert tokenizer.eos_token == end and template.opening == opening
    assert {tokenizer.convert_tokens_to_ids(t) for t in (end, "<|endoftext|>")} <= set(template.stop_ids)
    prompt = template.prompt("What is 1+1?", "Be brief.")
    ids = template.prompt_ids(prompt)
    rendered = tokenizer.decode(ids)
    assert "What is 1+1?" in rendered and "Be brief." in rendered and rendered.endswith(opening)
    assert rendered == tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    if opening == NO_THOUGHT:
        return
    taught = template.reply_ids(REPLY)
    stop = next(i for i, token in enumerate(taught) if token in template.stop_ids)
    # What is generated stops at the first stop token; rewards see the reply itself, in whichever half it was opened.
    assert template.text(taught[: stop + 1]).replace("<think>\n", "<think>") == REPLY
    assert has_format(template.text(taught[: stop + 1]))
    assert tokenizer.decode(taught[stop + 1 :]).strip() in ("", "<|endoftext|>")  # Phi's template ends texts twice


@pytest.mark.parametrize("name", REAL)
def test_replies_without_a_thought_teach_an_empty_one_where_the_prompt_opens_it(name):
    template = real(name)
    text = template.text(template.reply_ids("Hello."))
    assert text.strip().endswith("Hello.") and text.count("<think>") == text.count("</think>") <= 1
    assert ("<think>" in text) >= bool(template.opening)


@pytest.mark.parametrize("name", [*CHANNELS, *OTHER_MESSAGES])
def test_templates_that_write_replies_elsewhere_are_refused(name):
    with pytest.raises(UserError, match=rf"data.template `chat`: the chat template of {name} .*\n.*model.tokenizer"):
        real(name)


def test_ordinary_rows_are_those_that_trl_makes(template, tokenizer):
    """The ids of a whole conversation, rendered at once."""
    turns = [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": REPLY}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert template.prompt_ids(template.prompt("What is 1+1?")) + template.reply_ids(REPLY) == whole
    assert conversation_ids(template, "What is 1+1?", REPLY) == whole


def test_the_end_of_a_turn_must_be_a_token():
    with pytest.raises(UserError, match=r"ends a reply with '\[END\]', which is no token"):
        template_of(CHATML.replace("<|im_end|>", "[END]"))
    roles = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    unmarked = template_of(roles + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert unmarked.tokenizer.eos_token == "<|endoftext|>"
    assert unmarked.reply_ids("Yes.")[-1] == unmarked.tokenizer.eos_token_id


def test_a_token_that_ends_turns_without_being_special_stops_and_is_no_text():
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "[END]"))
    tokenizer.add_tokens(["[END]"])
    template = Template(tokenizer, "chat", "m")
    end = tokenizer.convert_tokens_to_ids("[END]")
    assert end in template.stop_ids and template.text([*template._ids("Yes."), end]) == "Yes."


def test_the_template_of_r1_zero(tokenizer):
    template = template_of(CHATML, "r1_zero")
    assert template.prompt("Why?") == f"{INSTRUCTION} User: Why?. Assistant:"
    assert template.stop_ids == [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert template.tokenizer.decode(template.reply_ids("Yes.")) == " Yes.<|endoftext|>"
    chat = template_of(CHATML, "r1_zero_chat")
    assert chat.prompt("Why?", "s") == [
        {"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "Why?"}
    ]  # fmt: skip


def test_without_a_system_role_system_prompts_go_before_the_question():
    drops_it = CHATML.replace("messages %}", "messages if message.role != 'system' %}")
    for text in (NO_SYSTEM, drops_it):
        template = template_of(text, "r1_zero_chat")
        assert template.prompt("Why?") == [{"role": "user", "content": f"{INSTRUCTION}\n\nWhy?"}]
        assert template_of(text).prompt("Why?", "s") == [{"role": "user", "content": "s\n\nWhy?"}]
        assert template_of(text).prompt("Why?") == [{"role": "user", "content": "Why?"}]


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = None
    Template(tokenizer, "r1_zero", "m")
    with pytest.raises(UserError, match=r"data.template `chat` needs a chat template, and the tokenizer of m"):
        Template(tokenizer, "chat", "m")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tokenizer_of(CHATML)
    tokenizer.eos_token = None
    assert Template(tokenizer_of(CHATML), "chat", "m").tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        Template(tokenizer, "r1_zero", "m")


def test_where_only_the_chat_template_names_an_end_it_pads():
    tokenizer = tokenizer_of(CHATML)
    tokenizer.eos_token = tokenizer.pad_token = None
    template = Template(tokenizer, "chat", "m")
    assert template.tokenizer.eos_token == template.tokenizer.pad_token == "<|im_end|>"
    assert template.stop_ids == [template.tokenizer.pad_token_id]


def test_tags_that_are_special_tokens_are_text():
    tags = {"extra_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]}
    tokenizer = tokenizer_of(CHATML)
    tokenizer.add_special_tokens(tags, replace_extra_special_tokens=False)
    template = Template(tokenizer, "chat", "m")
    ids = template.reply_ids(REPLY)
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert template.text(ids).strip() == REPLY and has_format(template.text(ids))


def test_one_beginning_of_sequence():
    """At the front of a prompt, neither before a prefill nor before a reply; and no end behind a prompt."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("{{ bos_token }}" + CHATML)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    for name in ("r1_zero", "chat"):
        template = Template(tokenizer, name, "m", prefill="<think>")
        prompt = template.prompt_ids(template.prompt("Why?"))
        ids = prompt + template.reply_ids("No.")
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.convert_tokens_to_ids("<|endoftext|>") not in prompt


@pytest.mark.parametrize("prefill", ["<think>", "<think>\nLet me", "Let me", ""])
def test_a_prefill_continues_what_the_prompt_has_opened(prefill):
    template = Template(tokenizer_of(OPENED), "chat", "m", prefill=prefill)
    ids = template.prompt_ids(template.prompt("Why?"))
    text = template.tokenizer.decode(ids)
    assert text.count("<think>") == 1 and text.endswith("Let me" if "Let me" in prefill else OPENS)
    assert text.endswith(template.text([]))


def rows_file(tmp_path, rows) -> Source:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path), conversation="messages")


def conversation(*contents: str) -> dict:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_reasoning_is_taught_whatever_the_template_drops(tmp_path):
    data = Data(sources=[rows_file(tmp_path, [conversation("Why?", REPLY), conversation("Hi", REPLY, "Why?", REPLY)])])
    template = real("deepseek_r1_distill")
    for row in completion_dataset(data, template, None):
        taught = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        assert template.tokenizer.decode(taught) == "1+1 is 2.</think>\n<answer>2</answer><｜end▁of▁sentence｜>"
    with pytest.raises(UserError, match="ends the thought in the prompt"):
        completion_dataset(data, real("qwen3_5_nothink"), None)


def test_where_the_prompt_ends_the_thought_nothing_that_needs_one_is_asked_for(tmp_path):
    model = tmp_path / "model"
    tokenizer_of((FOLDER / "qwen3_5_nothink.jinja").read_text()).save_pretrained(model)
    config = json.loads((BASE_DIR / "config.json").read_text()) | {"vocab_size": 1000}
    (model / "config.json").write_text(json.dumps(config))
    data = {"sources": [{"path": "tiny", "limit": 4}]}
    tree = {"model": {"path": str(model)}, "data": data, "output_dir": str(tmp_path / "run"), "use_cpu": True}
    with pytest.raises(UserError, match=r"rewards\.format is for replies that think, and the chat template"):
        _train(build(GRPORun, {**tree, "rewards": {"format": 1}}, "test"), None)
    generator = Generator(name="g", model=Model(path=str(model)), data=Data(sources=[Source(path="tiny", limit=4)]))
    with pytest.raises(UserError, match=r"filters\.format keeps replies that think, and the chat template"):
        _jobs(SampleRun(output_dir="unused", generators=[generator]), None, [])


def test_rows_that_a_template_refuses_are_counted(tmp_path, caplog):
    good, bad = conversation("Why?", REPLY), {"messages": [{"role": "user", "content": c} for c in "abc"]}
    bad["messages"].append({"role": "assistant", "content": REPLY})
    template = real("gemma")
    assert len(completion_dataset(Data(sources=[rows_file(tmp_path, [good, bad])]), template, None)) == 1
    assert "left out 1 of 2 rows: the chat template says: Conversation roles must alternate" in caplog.text
    with pytest.raises(UserError, match="the chat template refuses all of the 1 rows: Conversation roles"):
        completion_dataset(Data(sources=[rows_file(tmp_path, [bad])]), template, None)


def test_examples_must_be_shown_whole(tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"problem": "1+1?", "completion": REPLY}) + "\n")
    data = Data(sources=[Source(path="tiny", limit=2)])
    prompting = Prompting(examples=str(examples), shots=1)
    row = prompt_dataset(data, template_of(CHATML), 4096, 8, prompting)[0]
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    with pytest.raises(UserError, match=r"prompting\.examples: the chat template of qwen3 drops a part"):
        prompt_dataset(data, real("qwen3"), 4096, 8, prompting)


def saved(tmp_path, tokenizer) -> str:
    """A model folder with this tokenizer."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((BASE_DIR / "config.json").read_text())
    return str(tmp_path)


def test_arguments_of_the_template_are_used_counted_and_saved(tmp_path):
    model = Model(path=saved(tmp_path, tokenizer_of((FOLDER / "qwen3_5_think.jinja").read_text())))
    vocabulary = {"vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | vocabulary))
    assert load_template(model, "chat").opening == OPENS
    model.chat_template_kwargs = {"enable_thinking": False}
    template = load_template(model, "chat")
    assert template.opening == NO_THOUGHT
    row = prompt_dataset(Data(sources=[Source(path="tiny", limit=1)]), template, 4096, 8)[0]
    assert row["prompt_length"] == len(row["prompt_ids"])
    assert template.tokenizer.decode(row["prompt_ids"]).endswith(NO_THOUGHT)
    template.tokenizer.save_pretrained(tmp_path)
    assert load_template(Model(path=model.path), "chat").opening == NO_THOUGHT  # as it was trained
    again = Model(path=model.path, chat_template_kwargs={"enable_thinking": True})
    assert load_template(again, "chat").opening == OPENS
    with pytest.raises(UserError, match="has no `enable_thinkin`; leave it out"):
        load_tokenizer(Model(path=model.path, chat_template_kwargs={"enable_thinkin": True}))


def test_a_tokenizer_that_pads_with_nothing_pads_with_the_end_of_texts(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    tokenizer.pad_token = None
    assert load_tokenizer(Model(path=saved(tmp_path, tokenizer))).pad_token == "<|endoftext|>"


def test_tokens_that_the_model_has_no_embedding_of_are_refused(tmp_path):
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "<|new|>"))
    with pytest.raises(UserError, match=r"model.tokenizer: <\|new\|> is token 363, and the model .* 363 tokens"):
        load_template(Model(path=saved(tmp_path, tokenizer)), "chat")


def test_generation_settings_add_their_stops():
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    assert load_template(Model(path="tiny"), "chat").stop_ids == model.generation_config.eos_token_id


def test_served_chats_end_where_the_template_ends_replies(tmp_path):
    """vLLM stops at its tokenizer's end of text."""
    tokenizer_of(CHATML).save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text((BASE_DIR / "config.json").read_text())
    run = ServeRun(model=Model(path=str(tmp_path / "model")), endpoints=str(tmp_path / "e.json"))
    plan_serve(run)
    words = command(run, "m", "shm", 1)
    assert AutoTokenizer.from_pretrained(words[words.index("--tokenizer") + 1]).eos_token == "<|im_end|>"
