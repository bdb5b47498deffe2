"""The embedded default: a tiny base model, its tokenizer, its problems, and the script that builds them."""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
