"""Words count for the language that they are in, told by script or, within one, by py3langid."""

import random
import re
import time

import numpy as np
import pytest
from conftest import ROOT

from r1dist.config import Reward
from r1dist.config.languages import SCRIPT
from r1dist.rewards import Rewards
from r1dist.rewards.language import language as language_reward
from r1dist.rewards.language import language_share, problem_language
from r1dist.rewards.thinking import after_thinking, thinking_of
from r1dist.tiny import talk, worked

SENTENCES = [line.split("\t") for line in (ROOT / "bench" / "sentences.tsv").read_text("utf-8").splitlines()]
# The measure as it was while script alone decided.
OLD_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z]+)?|[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def by_script_alone(text: str, target: str) -> float:
    words = OLD_WORD.findall(re.sub(r"</?(?:think|answer)>", " ", text))
    share = sum(word[0] >= "\u3400" for word in words) / len(words)
    return share if target == "zh" else 1 - share


def test_the_tiny_world_scores_as_it_did():
    rng = random.Random(0)
    steps = ["3+4 ends in 7. ", "7*2 ends in 4. ", "3+4末位是7。", "9-1末位是8。"]
    texts = ["".join(rng.choices(steps, k=rng.randint(1, 12))) for _ in range(300)]
    texts += [row["completion"] for row in worked.rows(200, 0, "train")]
    for text in texts:
        for target in ("en", "zh"):
            # TRL keeps rewards in float32.
            assert np.float32(language_share(text, target)) == np.float32(by_script_alone(text, target)), text
    for row in talk.rows(0, "train", unsafe=False) + talk.rows(0, "train", unsafe=True):
        assert language_share(row["completion"], "en") == 1.0, row


@pytest.mark.parametrize("words", [1, 2, 3, 4, 8, 16])
def test_short_english_does_not_flip(words):
    cut = [" ".join(text.split()[:words]) for language, text in SENTENCES if language == "en"]
    assert {problem_language(text) for text in cut} == {"en"}
    assert {language_share(text, "en") for text in cut} <= {1.0, None}


def test_eight_words_are_enough():
    for language, text in SENTENCES:
        short = text[:8] if language == "zh" else " ".join(text.split()[:8])
        assert problem_language(short) == language, short


def test_whole_sentences_count_for_their_own_language_only():
    for language, text in SENTENCES:
        assert language_share(text, language) == 1.0, text
        for other in {"en", "fr", "de", "es", "zh", "ru"} - {language}:
            assert language_share(text, other) == 0.0, (other, text)


def test_a_text_of_two_languages_is_divided_where_they_meet():
    english, french = ([text for language, text in SENTENCES if language == name] for name in ("en", "fr"))
    for first, second in zip(english, french, strict=True):
        expected = len(first.split()) / len(f"{first} {second}".split())
        assert language_share(f"{first} {second}", "en") == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("これは三つの数です", "ja"),
        ("我们先把两边相加", "zh"),
        ("두 수를 더하면", "ko"),
        ("Пусть даны два числа", "ru"),
        ("Яка сума цих двох чисел і чому вона така?", "uk"),
        ("مجموع العددين هو", "ar"),
        ("مجموع این دو عدد چقدر می‌شود و چرا؟", "fa"),
        ("Το άθροισμα των αριθμών", "el"),
        ("הסכום של שני מספרים", "he"),
        ("ผลรวมของสองจำนวน", "th"),
        ("दो संख्याओं का योग", "hi"),
        ("Tính tổng của hai số nguyên dương đầu tiên", "vi"),
    ],
)
def test_scripts(text, language):
    assert problem_language(text) == language
    assert language_share(text, language) == 1.0
    assert language_share(text, "en" if language != "en" else "zh") == 0.0


def test_code_formulas_numbers_and_symbols_are_no_words():
    assert language_share("设 x = 3，则 α + β = 2x ×4", "zh") == 1.0
    assert language_share(r"因此 \(\text{area}\) 与 \[ right \] $word$ `code` ```more code``` \frac", "zh") == 1.0
    assert language_share("$x$ 12 + 3 = x", "en") is None
    assert language_share("தமிழ் words", "en") < 1
    assert problem_language("1 + 1 = ?") == "en"


def test_the_target_may_be_the_prompts(pool):
    problems = {language: text for language, text in SENTENCES}
    rows = [{"problem": problems[name], "kind": "math"} for name in ("fr", "zh", "en")]
    texts = [f"<think>{problems[name]}</think>" for name in ("fr", "en", "fr")]
    for given, scores in (
        ({}, [1.0, 0.0, 0.0]),
        ({"target": "prompt"}, [1.0, 0.0, 0.0]),
        ({"target": "fr"}, [1.0, 0.0, 1.0]),
    ):
        assert Rewards({"language": Reward(parameters=given)}, pool).scorers["language"](texts, rows) == scores


@pytest.mark.parametrize("target", sorted(SCRIPT))
def test_every_language_can_be_asked_for(target):
    assert language_share("one two three four five six seven eight", target) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("completion", "thought", "after"),
    [
        ("<think>a</think>b", "a", "b"),
        ("x<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),  # the prompt opened it
        ("<think>a", "a", ""),
        ("b", "", "b"),
        ("<think></think>b", "", "b"),
        ("<think>a</think>b<think>c</think>d", "a</think>b<think>c", "d"),
        ("a</think>b<think>c</think>d", "a</think>b<think>c", "d"),
        ("<think>a</think>b<think>c", "a\nc", "b"),
        ("a</think>b<think>c", "a\nc", "b"),
        ("<think>a<think>b</think>c", "a<think>b", "c"),
        ("", "", ""),
    ],
)
def test_what_is_thought_and_what_comes_after(completion, thought, after):
    assert (thinking_of(completion), after_thinking(completion)) == (thought, after)


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        ("<think></think><answer>The answer is seven.</answer>", 0),
        ("<think> \n</think><answer>The answer is seven.</answer>", 0),
        ("The answer is seven.", 0),
        ("", 0),
        ("<think>我们先算。</think><answer>It is easy to see that the answer must be seven.</answer>", 0),
        ("<think>We add three and four.</think><answer>答案是七。</answer>", 1),
        ("We add three and four.</think><answer>答案是七。</answer>", 1),
        ("<think>We add three and 四", 0.8),  # cut off
        ("<think>three</think> 四 <think>four</think> 七", 2 / 3),
        ("<think>$3+4=7$</think><answer>Seven</answer>", None),
    ],
)
def test_the_reward_is_for_the_language_of_the_thinking(completion, share):
    assert language_reward(completion, {}, "en") == (share if share is None else pytest.approx(share))


def test_openers_that_are_never_closed_take_no_quadratic_time():
    begin = time.process_time()
    for opener in ("\\( ", "\\[ ", "$$ ", "$ ", "`", "``` ", "\\\\[ "):
        language_share(f"{opener * 40_000} end", "zh")
    assert time.process_time() - begin < 2  # more, if they did


def test_formulas_end_where_they_are_closed():
    assert language_share(r"因此 \[ a \\[2pt] \text{area} \] 与 \(\left(one\right)\) 好", "zh") == 1.0
    assert language_share(r"never closed \( words \(here\)", "en") == 1.0
    assert language_share("$$one$two$$ 好 $three$ four$", "zh") == 0.5


def test_fast_where_script_decides():
    texts = [text for language, text in SENTENCES if language == "zh"] * 25
    begin = time.process_time()
    for text in texts:
        language_share(text, "zh")
    assert len(texts) / (time.process_time() - begin) > 5000
