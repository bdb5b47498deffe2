"""The embedded defaults: two tiny base models, their tokenizer, their problems, and the script that builds them."""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
# What `model.path` calls them -> where they lie. The smaller one is there to be taught by the other.
EMBEDDED = {"tiny": BASE_DIR, "tiny-small": Path(__file__).parent / "small"}
