"""Chat templates: how a question becomes a prompt, what of the reply the prompt opens, and what ends the reply.

Everything that depends on a tokenizer's chat template or on its special tokens is decided here, by rendering the
template, for training, evaluation, sampling, chat and reward models alike.

Not handled: templates that write the reasoning elsewhere than between `<think>` and `</think>` (gpt-oss' channels),
templates for messages that are not text, and tools. They are refused.
"""

import logging
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..config import Model
from ..errors import UserError
from ..models import load_model_config, load_tokenizer, named_stop_ids
from .r1_zero import INSTRUCTION, r1_zero_prompt
from .tags import TAGS

logger = logging.getLogger(__name__)

NO_THOUGHT = "<think>\n\n</think>\n\n"
# What a template is rendered with, to find out what it writes around the texts that it is given.
SYSTEM, QUESTION, REPLY, NEXT = "(system)", "(question)", "(reply)", "(next)"


class Template:
    """`data.template` over a tokenizer.

    Args:
        tokenizer: Its end-of-sequence token becomes the one that ends a reply, so that what is saved with it stops
            there. That token also pads where the tokenizer had neither of the two.
        name: As in `data.template`.
        model: Where the tokenizer is from, for errors.
        stop_ids: Further token ids that end a completion.
        prefill: The beginning of every reply, which the prompt then holds.

    Raises `UserError` for a chat template that is missing or cannot be used.
    """

    opening: str
    """What the prompt already holds of the reply: what the chat template opens (`<think>` and a line break, an empty
    thought, or nothing), and the prefill."""
    stop_ids: list[int]
    """The token ids that end a completion."""
    has_system_role: bool

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        model: str,
        stop_ids: Sequence[int] = (),
        prefill: str = "",
    ):
        self.tokenizer = tokenizer
        self.name = name
        self.model = model
        self.opening, self._no_thought, self.has_system_role = "", "", True
        stops = {*stop_ids, tokenizer.eos_token_id}
        if name == "r1_zero":
            self._ending = tokenizer.eos_token
        else:
            self._read_chat_template()
            stops.add(tokenizer.eos_token_id)
        if tokenizer.eos_token is None:
            raise UserError(
                f"model: the tokenizer of {model} has no end-of-sequence token, so that no reply would ever end.\n"
                "Set `eos_token` in its tokenizer_config.json."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.stop_ids = sorted(stops - {None})
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        tags = {vocabulary[tag] for tag in TAGS if tag in vocabulary}
        self._hidden = (special | {*tokenizer.all_special_ids, *self.stop_ids}) - tags
        self._ends_thought = "</think>" in self.opening
        begun = self.after_opening(prefill)
        self._prefill_ids = self._ids(begun)
        self.opening += begun

    def prompt(
        self, problem: str, system: str | None = None, examples: Sequence[tuple[str, str]] = ()
    ) -> str | list[dict]:
        """The prompt for one question: text for `r1_zero`, a list of messages for the chat templates.

        `examples` (problem, completion) come before it, as if they had been asked and answered.
        """
        if self.name == "r1_zero":
            return r1_zero_prompt(problem, examples)
        turns = [{"role": "system", "content": system}] if system else []
        for asked, answered in examples:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return self.messages([*turns, {"role": "user", "content": problem}])

    def messages(self, turns: list[dict]) -> list[dict]:
        """`turns` with the system prompt that the template brings; without such a role it goes before the question."""
        if self.name == "r1_zero_chat":
            turns = [
                {"role": "system", "content": INSTRUCTION}, *(turn for turn in turns if turn["role"] != "system")
            ]  # fmt: skip
        if self.has_system_role or turns[0]["role"] != "system":
            return turns
        system, first, *others = turns
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]

    def prompt_ids(self, prompt: str | list[dict]) -> list[int]:
        """The token ids that the model is given for `prompt`, with a beginning-of-sequence token where it wants one,
        up to the end of the prefill.

        Raises jinja2's `TemplateError` for messages that the chat template refuses.
        """
        if not isinstance(prompt, str):
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
            # Some tokenizers end every text with it, but the reply is still to come.
            ids = ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids
        return ids + self._prefill_ids

    def holds(self, prompt: str | list[dict], texts: Sequence[str]) -> bool:
        """Whether the rendered `prompt` holds all `texts`: some chat templates drop the reasoning of earlier turns."""
        rendered = prompt if isinstance(prompt, str) else self._render(prompt, add_generation_prompt=True)
        return all(text.strip() in rendered for text in texts)

    def reply_ids(self, reply: str) -> list[int]:
        """The token ids of a whole reply behind its prompt, up to what ends the turn: what is taught or judged."""
        if not reply.lstrip().startswith("<think>"):
            reply = self._no_thought + reply
        lead = " " if self.name == "r1_zero" else ""
        return self._ids(lead + self.after_opening(reply) + self._ending)

    def after_opening(self, text: str) -> str:
        """What is left of a reply, or of its beginning, behind what the prompt has opened."""
        if not self.opening or text.startswith(self.opening):
            return text[len(self.opening) :]
        return text.lstrip().removeprefix("<think>").removeprefix("\n")

    def require_thoughts(self, what: str) -> None:
        """Raises `UserError`, which begins with `what`, if prompts hold a whole, empty thought: no reply can think."""
        if self._ends_thought:
            raise UserError(
                f"{what}, and the chat template of {self.model} ends the thought in the prompt.\n"
                "Set the argument that lets it think in `model.chat_template_kwargs`."
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens; tags are text even where they are special tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self._hidden])

    def text(self, ids: Sequence[int]) -> str:
        """The whole reply of which `ids` were generated, with what the prompt has opened."""
        return self.opening + self.decode(ids)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: list[dict], **kwargs: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def _read_chat_template(self) -> None:
        """Find out by rendering what the chat template opens, closes and refuses."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"data.template `{self.name}` needs a chat template, and the tokenizer of {self.model} has none.\n"
                "Use `data.template: r1_zero`, or a tokenizer with a template in `model.tokenizer`."
            )
        asked = [{"role": "user", "content": QUESTION}]
        answered = [*asked, {"role": "assistant", "content": REPLY}]
        try:
            prompt = self._render(asked, add_generation_prompt=True)
            whole = self._render(answered)
            further = self._render([*answered, {"role": "user", "content": NEXT}])
        except (TemplateError, TypeError) as error:
            raise self._unusable(f"fails for a question and its answer: {error}") from error
        if any(text not in rendered for text, rendered in ((QUESTION, prompt), (REPLY, whole), (REPLY, further))):
            raise self._unusable("drops the text of a message: it is for another kind of messages")
        header = prompt.rpartition(QUESTION)[2]
        opens = header.find("<think>")
        if opens >= 0:
            header, self.opening = header[:opens], header[opens:]
        before, _, after = whole.partition(QUESTION)[2].partition(REPLY)
        between = before.removeprefix(header)
        if not before.startswith(header) or between.replace("<think>", "", 1).replace("</think>", "", 1).strip():
            raise self._unusable(f"writes {before!r} before a reply, and asks for one with {header + self.opening!r}")
        self._no_thought = between if between.strip() else NO_THOUGHT if self.opening else ""
        self._ending = self._end_of_turn(after, further.partition(REPLY)[2].partition(NEXT)[0])
        self.has_system_role = self._keeps_system(asked)
        if not self.has_system_role:
            logger.info(
                "the chat template of %s has no system role: system prompts go before the question", self.model
            )

    def _end_of_turn(self, after: str, before_next: str) -> str:
        """The text that ends a reply. Its first special token becomes the tokenizer's end of sequence.

        Args:
            after: What the template writes behind a last reply.
            before_next: What it writes between a reply and the next question.
        """
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        of_last, of_earlier = ([i for i in self._ids(text) if i in added] for text in (after, before_next))
        if after.strip() and not of_last:
            raise self._unusable(
                f"ends a reply with {after.strip()!r}, which is no token, so that nothing stops there"
            )
        if not of_last and not of_earlier:
            return after + (self.tokenizer.eos_token or "")
        self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens((of_last or of_earlier)[0])
        return after if of_last else self.tokenizer.eos_token

    def _keeps_system(self, asked: list[dict]) -> bool:
        try:
            return SYSTEM in self._render([{"role": "system", "content": SYSTEM}, *asked])
        except TemplateError:
            return False

    def _unusable(self, reason: str) -> UserError:
        return UserError(
            f"data.template `{self.name}`: the chat template of {self.model} {reason}.\n"
            "Set its arguments in `model.chat_template_kwargs`, name another tokenizer in `model.tokenizer`, or "
            "use `data.template: r1_zero`."
        )


def load_template(model: Model, name: str, prefill: str = "") -> Template:
    """`data.template` for `model`, with its tokenizer. Raises `UserError` for what cannot be loaded or used."""
    template = Template(load_tokenizer(model), name, model.path, named_stop_ids(model), prefill)
    vocabulary = load_model_config(model).get_text_config().vocab_size
    probe = template.prompt_ids(template.prompt(QUESTION)) + template.reply_ids(REPLY)
    if max(probe) >= vocabulary:
        token = template.tokenizer.convert_ids_to_tokens(max(probe))
        raise UserError(
            f"model.tokenizer: {token} is token {max(probe)}, and the model {model.path} has embeddings of "
            f"{vocabulary} tokens.\nUse the model's own tokenizer, or resize its embeddings."
        )
    return template
