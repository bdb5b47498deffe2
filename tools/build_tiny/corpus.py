"""What the tiny base model has read: worked chains as plain text, and chat that mostly answers at once.

The plain text teaches the arithmetic. The chat teaches a raw base model's habits: asked, it mostly blurts
out a digit; sometimes it uses the tags, sometimes it forgets one; now and then it works the chain out, and
changes its language from step to step. Every answer in the corpus is right. The blurted ones are still
useless to copy, because a network this small cannot compute a chain in one forward pass.

In the last phase of the corpus no reply to a question is an untagged chain. With a twentieth of such replies
the base stood one step from them: whatever was rewarded, even the format alone, the first policy gradients
away from blurting led there (measured: under the format reward alone, format fell from 20 % to 11 % in 12 steps).
"""

import random
from collections.abc import Iterator

from r1dist.tiny import talk
from r1dist.tiny.problems import Problem, draw

CHAT_SHARE = 0.5
LENGTHS = (2, 3, 4, 5, 6, 7, 8, 9, 10)
LENGTH_WEIGHTS = (1.0, 3.0, 4.0, 4.0, 4.0, 1.2, 0.6, 0.3, 0.2)
# Chains longer than these stand in the plain text only: asked, the base stops too early. Room for later stages.
CHAT_LENGTHS = (3, 4, 5, 6, 7, 8)

# How the base model answers when asked, by phase: name -> share of the chat.
FIRST_HABITS = {
    "blurt": 0.45,
    "blurt_tagged": 0.08,
    "restate": 0.17,
    "restate_unclosed": 0.10,
    "think": 0.15,
    "think_untagged": 0.05,
}
LAST_HABITS = {"blurt": 0.45, "blurt_tagged": 0.10, "restate": 0.17, "restate_unclosed": 0.10, "think": 0.18}
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def chat_prompt(question: str) -> str:
    """The chat template of the tiny tokenizer, written out for one user turn and a generation prompt."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def chain(rng: random.Random, problem: Problem) -> str:
    """The worked steps, each in English or Chinese by the toss of a coin."""
    opening = rng.choice(("", "", "Let me work it out. ", "一步一步算。"))
    steps = []
    for before, operation, after in problem.steps:
        english = rng.random() < 0.5
        steps.append(f"{before}{operation} ends in {after}. " if english else f"{before}{operation}末位是{after}。")
    return opening + "".join(steps).strip()


def reply(rng: random.Random, problem: Problem, habits: dict[str, float]) -> str:
    """One assistant turn in one of the `habits`."""
    habit = rng.choices(tuple(habits), tuple(habits.values()))[0]
    answer = f"<answer>{problem.answer}</answer>"
    restated = f"<think>{problem.statement}."
    sentence = rng.choices((f"The answer is {problem.answer}.", f"答案是{problem.answer}。"), (9, 1))[0]
    match habit:
        case "blurt":
            return sentence
        case "blurt_tagged":
            return answer
        case "restate":
            return f"{restated}</think>\n{answer}"
        case "restate_unclosed":
            return f"{restated}\n{answer}"
        case "think":
            return f"<think>{chain(rng, problem)}</think>\n{answer}"
        case "think_untagged":
            return f"{chain(rng, problem)} {sentence}"
    raise AssertionError(habit)


def document(rng: random.Random, habits: dict[str, float]) -> str:
    """One row of the corpus, on a problem of the train split."""
    if rng.random() < CHAT_SHARE:
        problem = draw(rng, CHAT_LENGTHS, "train")
        return f"{chat_prompt(problem.question)}{reply(rng, problem, habits)}{IM_END}\n{END_OF_TEXT}"
    problem = draw(rng, LENGTHS, "train", LENGTH_WEIGHTS)
    text = f"{problem.statement}. {chain(rng, problem)}"
    return f"{text} {rng.choice(('The answer is', '答案是'))} {problem.answer}.{END_OF_TEXT}"


def documents(seed: int, habits: dict[str, float], prose: float = 0.0) -> Iterator[str]:
    """An endless, seeded stream of corpus rows, of which the share `prose` is about the world of requests."""
    rng = random.Random(f"corpus:{seed}")
    sentences = talk.prose(seed)
    while True:
        yield f"{next(sentences)}{END_OF_TEXT}" if prose and rng.random() < prose else document(rng, habits)
