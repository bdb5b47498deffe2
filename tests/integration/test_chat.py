"""What a person sees of a reply, and what a pipe gets."""

import subprocess

import pytest
from conftest import ROOT, launch, python

from r1dist.evaluation.chat import DIM, PLAIN, Painter

REPLY = "<think>1+2 is 3, and 1 < 2.</think>\n<answer>3</answer>"


def painted(pieces, **how) -> str:
    shown: list[str] = []
    painter = Painter(shown.append, **how)
    for piece in pieces:
        painter.feed(piece)
    painter.end()
    return "".join(shown)


@pytest.mark.parametrize("pieces", [[REPLY], list(REPLY), REPLY.split(" "), [REPLY[:20], REPLY[20:]]])
def test_thinking_is_dimmed_or_folded_however_the_text_comes_in_pieces(pieces):
    whole = "".join(pieces)
    thought = "1+2 is 3, and 1 < 2." if " " in whole else "1+2is3,and1<2."
    assert painted(pieces, dim=True, fold=False) == f"{DIM}{thought}{PLAIN}\n3"
    assert painted(pieces, dim=False, fold=True) == f"(thought for {len(thought)} characters)\n3"
    assert painted(pieces, dim=False, fold=False) == whole


def test_a_reply_cut_off_in_its_thinking_leaves_the_terminal_plain():
    assert painted(["<think>1+"], dim=True, fold=False) == f"{DIM}1+{PLAIN}"
    assert painted(["a <thi"], dim=True, fold=False) == "a <thi"


def test_one_prompt_and_pipes():
    question = "Start with 7, then *3 +4 *9: what is the last digit?"
    greedy = ("--temperature", "0", "--max_tokens", "60")
    once = launch("chat.py", "--prompt", question, *greedy)
    assert once.returncode == 0 and once.stdout.strip() and "\x1b" not in once.stdout, once.stderr
    command = [python(), "launch/chat.py", *greedy]
    piped = subprocess.run(command, cwd=ROOT, input=f"{question}\n/new\n{question}\n", capture_output=True, text=True)
    assert piped.stdout == once.stdout * 2
    missing = launch("chat.py", "--model.path", "./nowhere")
    assert missing.returncode == 2 and "there is no folder ./nowhere" in missing.stderr
