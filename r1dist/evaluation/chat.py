"""A conversation in the terminal: replies as they are made, thinking dimmed or folded away."""

import sys
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from transformers import TextStreamer, set_seed

from ..adapters import load_model
from ..config import ChatRun
from ..data.tags import TAGS
from ..data.templates import Template, load_template
from ..errors import UserError
from ..models import model_path
from ..rewards.math.accuracy import final_answer
from ..run.process import set_up_process

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/fold hides the thinking or shows it, /new starts a new conversation, Ctrl-C stops a reply, Ctrl-D ends."


class Painter:
    """Writes a reply that comes in pieces: thinking dimmed (or only counted), tags left out.

    Without `dim` and `fold` the text passes as it is, for whoever reads the pipe.
    """

    def __init__(self, write: Callable[[str], None], dim: bool, fold: bool):
        self.write = write
        self.dim = dim
        self.fold = fold
        self.thinking = False
        self._held = ""
        self._hidden = 0

    def feed(self, piece: str) -> None:
        if not self.dim and not self.fold:
            self.write(piece)
            return
        self._held += piece
        while (found := self._next_tag()) is not None:
            place, tag = found
            self._show(self._held[:place])
            self._held = self._held[place + len(tag) :]
            self._turn(tag)
        # What may become a tag waits for the next piece.
        begun = max((n for n in range(1, 9) if any(t.startswith(self._held[-n:]) for t in TAGS)), default=0)
        cut = len(self._held) - min(begun, len(self._held))
        self._show(self._held[:cut])
        self._held = self._held[cut:]

    def end(self) -> None:
        self._show(self._held)
        if self.thinking:
            self._turn("</think>")
        self._held = ""

    def _next_tag(self) -> tuple[int, str] | None:
        return min(((self._held.find(tag), tag) for tag in TAGS if tag in self._held), default=None)

    def _show(self, text: str) -> None:
        if self.thinking and self.fold:
            self._hidden += len(text)
        elif text:
            self.write(text)

    def _turn(self, tag: str) -> None:
        if tag == "<think>":
            self.thinking, self._hidden = True, 0
            self.write(DIM if self.dim and not self.fold else "")
        elif tag == "</think>" and self.thinking:
            self.thinking = False
            note = f"(thought for {self._hidden} characters)" if self.fold else ""
            self.write(f"{DIM if self.fold else ''}{note}{PLAIN}" if self.dim else note)


class _Stream(TextStreamer):
    """transformers' streamer, which decodes by `template`, with its words given to `sink`."""

    def __init__(self, template: Template, sink: Callable[[str], None]):
        super().__init__(template, skip_prompt=True)  # type: ignore[arg-type]  # of a tokenizer it uses `decode` alone
        self.sink = sink

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.sink(text)


class Chat:
    """A model and a conversation. Earlier replies are kept without their thinking."""

    def __init__(self, run: ChatRun):
        self.run = run
        self.template = load_template(run.model, run.template)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, run.model.dtype)
        self.model = load_model(model_path(run.model), dtype=dtype).to(device).eval()
        self.turns: list[tuple[str, str]] = []

    def reply(self, question: str, sink: Callable[[str], None]) -> str:
        """Answer `question`, each word given to `sink` as it comes. Raises `UserError` if the context is full."""
        ids = self.template.prompt_ids(self.template.prompt(question, examples=self.turns))
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise UserError("the conversation is longer than the model's context; /new begins another.")
        sampled = self.run.temperature > 0
        how = {"temperature": self.run.temperature, "top_p": self.run.top_p} if sampled else {}
        sink(self.template.opening)
        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=sampled,
            max_new_tokens=min(room, self.run.max_tokens or room),
            eos_token_id=self.template.stop_ids,
            pad_token_id=self.template.tokenizer.pad_token_id,
            streamer=_Stream(self.template, sink),
            **how,
        )
        text = self.template.text(output[0, len(ids) :].tolist())
        self.turns.append((question, final_answer(text).strip()))
        return text


def converse(run: ChatRun, source: TextIO = sys.stdin, target: TextIO = sys.stdout) -> None:
    """Answer `run.prompt`, or each line of `source` until its end."""
    set_up_process()
    if run.seed is not None:
        set_seed(run.seed)
    chat = Chat(run)
    dim, fold = target.isatty(), run.fold
    in_person = run.prompt is None and source.isatty()

    def write(text: str) -> None:
        target.write(text)
        target.flush()

    for question in [run.prompt] if run.prompt is not None else _questions(source, in_person, write):
        if question == "/fold":
            fold = not fold
        elif question == "/new":
            chat.turns.clear()
        else:
            painter = Painter(write, dim, fold)
            try:
                chat.reply(question, painter.feed)
            except KeyboardInterrupt:
                if not in_person:
                    raise
            painter.end()
            write("\n")


def _questions(source: TextIO, in_person: bool, write: Callable[[str], None]) -> Iterator[str]:
    if in_person:
        write(f"{HELP}\n")
    while True:
        if in_person:
            write("> ")
        line = source.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
