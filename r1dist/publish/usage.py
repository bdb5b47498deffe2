"""How a trained model is used elsewhere: in transformers, vLLM and llama.cpp."""

import json
from pathlib import Path

from ..data.r1_zero import INSTRUCTION, r1_zero_prompt

QUESTION = "What is 12 + 57?"
MAX_TOKENS = 2048  # where the run had no bound of its own
PLAIN = "The prompt is plain text: the model was not trained with the tokenizer's chat template."
SYSTEM = "The instruction below is the system prompt that it was trained with."

TRANSFORMERS = """### transformers

{note}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
{inputs}
output = model.generate(**inputs, max_new_tokens={tokens}, do_sample=True, temperature=0.6, top_p=0.95)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

It stops at the end of the reply: the end tokens are in `generation_config.json`."""

TEXT_INPUTS = """prompt = {prompt!r}
inputs = tokenizer(prompt, return_tensors="pt")"""
CHAT_INPUTS = """messages = {messages!r}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""

VLLM = """### vLLM

```
python -m vllm.entrypoints.openai.api_server --model {name}
curl http://localhost:8000/v1/{endpoint} -H "Content-Type: application/json" -d '{body}'
```"""

LLAMA_CPP = """### llama.cpp

```
{download}python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype q8_0
llama.cpp/build/bin/llama-server -m model.gguf{jinja}
```"""

ADAPTERS = """It is LoRA adapters. vLLM and llama.cpp take the whole model, which this writes:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

AutoPeftModelForCausalLM.from_pretrained("{name}").merge_and_unload().save_pretrained("merged")
AutoTokenizer.from_pretrained("{name}").save_pretrained("merged")
```"""

REWARD_MODEL = """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "{name}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)
messages = [{{"role": "user", "content": "How do I boil an egg?"}}, {{"role": "assistant", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad():
    score = model(**inputs).logits[0, 0]{meaning}
```"""
MEANING = {
    "pairwise": "  # of two replies to a question, the better one's is higher",
    "pointwise": ".sigmoid()  # the probability that the reply is good",
}


def usage(launcher: str, config: dict, repository: str | None, folder: Path) -> str:
    """Markdown for the model that a run with this configuration left in `folder`.

    Args:
        launcher: `grpo`, `sft` or `reward_model`.
        repository: Where it is uploaded to.
    """
    name = repository or str(folder)
    if launcher == "reward_model":
        return REWARD_MODEL.format(name=name, meaning=MEANING[config["loss"]])
    template, tokens = config["data"]["template"], config.get("max_completion_length") or MAX_TOKENS
    plain = template == "r1_zero"
    note = PLAIN if plain else SYSTEM if template == "r1_zero_chat" else ""
    prompt = r1_zero_prompt(QUESTION)
    messages = [{"role": "system", "content": INSTRUCTION}] if template == "r1_zero_chat" else []
    messages += [{"role": "user", "content": QUESTION}]
    inputs = TEXT_INPUTS.format(prompt=prompt) if plain else CHAT_INPUTS.format(messages=messages)
    request = {"prompt": prompt} if plain else {"messages": messages}
    parts = [TRANSFORMERS.format(note=f"{note}\n\n" if note else "", name=name, inputs=inputs, tokens=tokens)]
    download, local = (f"hf download {name} --local-dir model\n", "model") if repository else ("", name)
    if (lora := config["model"].get("lora")) and lora["save"] == "adapters":
        parts.append(ADAPTERS.format(name=name))
        name, download, local = "merged", "", "merged"
    endpoint = "completions" if plain else "chat/completions"
    body = {"model": name, **request, "max_tokens": tokens, "temperature": 0.6, "top_p": 0.95}
    parts.append(VLLM.format(name=name, endpoint=endpoint, body=json.dumps(body)))
    parts.append(LLAMA_CPP.format(download=download, folder=local, jinja="" if plain else " --jinja"))
    return "\n\n".join(parts)
