"""Which language are the words in? Decided by script: Latin letters count as English, Han as Chinese.

Not handled: languages that share a script (English and French count as one).
"""

import re

# A word is a run of Latin letters, or one Han character: Chinese writes no spaces between words.
WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z]+)?|[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
TAG = re.compile(r"</?(?:think|answer)>")
LATEX = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def language_share(text: str, target: str) -> float | None:
    """The share of words in `target` ("en" or "zh"); None if there is no word.

    Tags, LaTeX, code and numbers are no words. Source: DeepSeek-R1 (arXiv 2501.12948), section 2.3.2:
    the proportion of target language words.
    """
    for ignored in (CODE, LATEX, TAG):
        text = ignored.sub(" ", text)
    words = WORD.findall(text)
    if not words:
        return None
    han = sum(word[0] >= "\u3400" for word in words)
    share = han / len(words)
    return share if target == "zh" else 1 - share
