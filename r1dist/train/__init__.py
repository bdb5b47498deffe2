"""The trainers: narrow subclasses of TRL's, and what they share."""

from trl import import_utils

# TRL imports all of vLLM for a client of its own, which nothing here uses: half of a launcher's start.
import_utils.is_vllm_available = lambda min_version=None: False
