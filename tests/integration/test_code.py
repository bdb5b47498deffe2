"""Programs are paid for the tests that they pass, not for what looks like it."""

import json
import shutil
import time

import pytest

from r1dist.errors import VerifiersBroken
from r1dist.rewards.code import sandbox
from r1dist.rewards.code.reward import code, code_format, program, read_tests
from r1dist.rewards.code.sandbox import INSTALL, Limits

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason=f"the sandbox is not installed: {INSTALL}")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: apt-get install g++")

SUM = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10\n"}]
ADD = "a, b = map(int, input().split())\nprint(a + b)"
ADD_CPP = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"
BOTH = {"python", "cpp"}


def answer(source: str, name: str = "python") -> str:
    return f"<think>so</think>\n<answer>\n```{name}\n{source}\n```\n</answer>"


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "share"),
    [
        (ADD, 1.0),
        ("print(3)", 0.5),
        ("print(3, 4)", 0.0),
        ("print('3\\n10')", 0.0),
        (ADD + "\nprint()", 1.0),
        (ADD + "\nexit(1)", 0.0),
        (ADD + "\nexit()", 1.0),
        (ADD + "\nimport os; os._exit(0)", 0.0),  # what it printed was never written
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", 1.0),
        ("import sys\nprint(sum(map(int, open(0).read().split())), file=sys.stderr)", 0.0),
        ("a, b = map(int, input().split())\nassert a != b\nprint(a + b)", 0.5),
        ("this is no program", 0.0),
        ("print(3.0)", 0.0),
        ("", 0.0),
    ],
)
def test_the_share_of_tests(source, share):
    assert code(answer(source), {"tests": SUM}) == share
    assert code(answer(source), {"tests": json.dumps(SUM), "language": "python"}) == share


@needs_sandbox
def test_the_whole_output_counts():
    row = {"tests": [{"stdin": "", "stdout": "1\n2\n3"}]}
    assert code(answer("print(1)"), row) == 0.0
    assert code(answer("print(*range(1, 5))"), row) == 0.0
    assert code(answer("print(1, 2, 3)"), row) == 1.0
    assert code(answer("print('x')"), {"tests": [{"stdin": "", "stdout": "X"}]}) == 0.0


@needs_sandbox
def test_tolerance():
    row = {"tests": [{"stdin": "", "stdout": "yes 0.3333"}]}
    assert code(answer("print('yes', 1 / 3)"), row) == 0.0
    assert code(answer("print('yes', 1 / 3)"), {**row, "tolerance": 1e-3}) == 1.0
    assert code(answer("print('yes', 'nan')"), {**row, "tolerance": 1e-3}) == 0.0
    assert code(answer("print('yes', 'inf')"), {**row, "tolerance": 1e-3}) == 0.0
    assert code(answer("print('no', 1 / 3)"), {**row, "tolerance": 1e-3}) == 0.0


@needs_sandbox
def test_a_timeout_fails_its_test_only(monkeypatch):
    monkeypatch.setattr(sandbox.Limits.__init__, "__kwdefaults__", {**Limits.__init__.__kwdefaults__, "seconds": 1.0})
    slow = "a, b = map(int, input().split())\nwhile a == b: pass\nprint(a + b)"
    begun = time.monotonic()
    assert code(answer(slow), {"tests": SUM}) == 0.5
    assert time.monotonic() - begun < 3


CALLS = [
    {"call": "f(1, 2)", "returns": 3},
    {"call": "f([1], [2])", "returns": [1, 2]},
    {"call": "f(.1, .2)", "returns": 0.3},
]


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "share"),
    [
        ("def f(a, b):\n    return a + b", 1.0),
        ("print('3\\n', end='')\ndef f(a, b):\n    print('x', end='')\n    return a + b", 1.0),
        ("def f(a, b):\n    return 3", 1 / 3),
        ("def f(a, b):\n    return True", 0.0),
        ("def f(a, b):\n    return '3'", 0.0),
        ("def f(a, b):\n    print(a + b)", 0.0),
        ("def f(a, b):\n    return (a + b) if isinstance(a, int) else tuple(a) + tuple(b)", 2 / 3),
        ("def g(a, b):\n    return a + b", 0.0),
        ("if __name__ == '__main__':\n    input()\ndef f(a, b):\n    return a + b", 1.0),
    ],
)
def test_functions(source, share):
    assert code(answer(source), {"tests": CALLS, "tolerance": 1e-9}) == pytest.approx(share)


# Each would be paid by a grader that compares inside, or that believes what a program prints.
FORGED = {
    "equal to everything": """
class Anything(int):
    def __eq__(self, other): return True
    def __repr__(self): return "3"
f = lambda a, b: Anything(4)
""",
    "not serialisable": "f = lambda a, b: object()",
    "ends early": "import os\nos._exit(0)",
    "ends well": "raise SystemExit(0)",
    "prints a result": "print('passed', True, 3)\nimport os\nos._exit(0)",
    "changes json": "import json\njson.dumps = lambda value: 'true'\nf = lambda a, b: 4",
    "changes eval and print": """
import builtins
said = print
builtins.eval = lambda *_: None
builtins.print = lambda *_: said('3')
f = lambda a, b: 4
""",
    "says more than one value": """
mark = open('harness.py').read().split("+ '")[1].split("'")[0]
for value in range(10):
    print("\\n" + mark + str(value))
f = lambda a, b: 3
""",
    "nests": """
import json
json.dumps = lambda value: '[' * 100000
f = lambda a, b: 4
""",
    "counts digits": """
import json
json.dumps = lambda value: '9' * 100000
f = lambda a, b: 4
""",
    "not a number": "f = lambda a, b: float('nan')",
}


@needs_sandbox
@pytest.mark.parametrize("name", FORGED)
def test_nothing_is_forged(name):
    assert code(answer(FORGED[name]), {"tests": CALLS[:1], "tolerance": 1e-6}) == 0.0


@needs_sandbox
def test_hidden_tests_are_out_of_reach():
    """The program prints all that it can read: files, memory, command lines, environments, descriptors."""
    look = """
import glob, os, re
seen = b""
for path in glob.glob("/tmp/**", recursive=True) + glob.glob("/proc/[0-9]*/*") + glob.glob("/proc/[0-9]*/fd/*"):
    if os.path.isfile(path) and not path.endswith(("/mem", "/fd/1", "/fd/2", "pagemap", "clear_refs")):
        try:
            seen += open(path, "rb").read(1 << 20)
        except OSError:
            pass
for line in open("/proc/self/maps"):
    low, high, mode = re.match(r"(\\w+)-(\\w+) (....)", line).groups()
    if mode.startswith("rw") and "[v" not in line:
        try:
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(int(low, 16))
                seen += memory.read(min(int(high, 16) - int(low, 16), 32 << 20))
        except OSError:  # given back to the system meanwhile
            pass
"""
    find = look + "print(*[word for word in ({words}) if word[::-1].encode() in seen])"
    hidden = ["moc-wollems-one", "moc-wollems-two"]
    tests = [{"stdin": f"input-{n}", "stdout": word} for n, word in enumerate(hidden)]
    # Backwards, so that the program itself does not hold what it looks for.
    words = ", ".join(repr(word[::-1]) for word in (*hidden, "input-0", "input-1"))
    source = find.format(words=words)
    own = {"tests": [{"stdin": f"input-{n}", "stdout": f"input-{n}"[::-1]} for n in (0, 1)]}
    assert code(answer(source), own) == 1.0  # its own input is found, and no other's
    assert code(answer(source), {"tests": tests}) == 0.0
    called = look + "f = lambda _: [word[::-1] for word in ('ni-nevig', 'tuo-neddih') if word[::-1].encode() in seen]"
    call = "f('given-in')"
    assert code(answer(called), {"tests": [{"call": call, "returns": ["given-in"]}]}) == 1.0
    assert code(answer(called), {"tests": [{"call": call, "returns": ["given-in", "hidden-out"]}]}) == 0.0


@needs_sandbox
@needs_compiler
def test_cpp():
    assert code(answer(ADD_CPP, "cpp"), {"tests": SUM}) == 1.0
    assert code(answer(ADD_CPP, "c++"), {"tests": SUM, "language": "cpp"}) == 1.0
    assert code(answer("int main() { return nonsense; }", "cpp"), {"tests": SUM}) == 0.0
    assert code(answer('#include "/etc/passwd"\nint main() {}', "cpp"), {"tests": SUM}) == 0.0
    assert code(answer("int main() { return *(volatile int *)0; }", "cpp"), {"tests": SUM}) == 0.0


@needs_sandbox
def test_only_the_language_that_is_asked_for():
    assert code(answer(ADD), {"tests": SUM, "language": "cpp"}) == 0.0
    assert code(answer(ADD_CPP, "cpp"), {"tests": CALLS}) == 0.0
    two = f"{answer(ADD)}\n```cpp\nint main() {{}}\n```"
    assert code(two, {"tests": SUM, "language": "Python"}) == 1.0


def test_rows_that_cannot_be_scored():
    for tests in (None, "", "no json", "{}", [], "[]", [1], [{"stdin": "1"}], [{"call": "f()"}], [*SUM, {}], 7):
        assert code(answer(ADD), {"tests": tests}) is None
    assert code(answer(ADD), {}) is None
    assert code(answer(""), {"tests": [{"stdin": "", "stdout": " \n"}]}) is None
    assert code(answer(ADD), {"tests": SUM, "language": "cobol"}) is None
    assert code(answer(ADD), {"tests": SUM, "tolerance": "small"}) is None
    assert code(answer(ADD), {"tests": CALLS, "language": "cpp"}) is None
    assert len(read_tests({"tests": json.dumps(SUM + CALLS)})) == 5


def test_no_program_is_paid_nothing():
    for text in ("", "<think>so</think><answer>3</answer>", f"<think>```python\n{ADD}\n```</think><answer>3</answer>"):
        assert code(text, {"tests": SUM}) == 0.0
    assert code(answer(ADD, "bash"), {"tests": SUM}) == 0.0
    assert code(f"<think>so</think><answer>```python\n{ADD}</answer>", {"tests": SUM}) == 0.0


def test_which_block():
    assert program("```python\nold\n```\n```python\nnew\n```", BOTH) == ("python", "new")
    assert program("<think>```py\nthought\n```</think>```py\nx\n```<answer>see above</answer>", BOTH) == (
        "python",
        "x",
    )
    assert program("</think>```py\nbeside\n```\n<answer>\n```c++\nin\n```\n</answer>", BOTH) == ("cpp", "in")
    assert program("```\nplain\n```\n```python\nx\n```\n```text\nout\n```", BOTH) == ("python", "x")
    assert program("```\nnever closed\n```python\nx\n```", BOTH) == ("python", "x")
    assert program("```python\nx", BOTH) is None
    begun = time.monotonic()
    assert program("```python\n" * 20_000, BOTH) is None
    assert time.monotonic() - begun < 1


def test_code_format():
    assert code_format(answer(ADD), {"language": "python"}) == 1.0
    assert code_format(answer(ADD), {"language": "cpp"}) == 0.0
    assert code_format(answer(ADD), {}) == 1.0
    assert code_format(f"<think>```python\n{ADD}\n```</think><answer>3</answer>", {}) == 0.0
    assert code_format(f"<answer>\n```python\n{ADD}\n```\n```python\n{ADD}\n```\n</answer>", {}) == 0.0
    assert code_format(f"<answer>\n```python\n{ADD}\n```\n```text\n3\n```\n</answer>", {}) == 1.0


@needs_sandbox
def test_a_broken_sandbox_scores_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda limits: ["/usr/bin/bwrap", "--nonsense"])
    with pytest.raises(VerifiersBroken):
        code(answer(ADD), {"tests": SUM})
