"""Keeps TRL from importing vLLM; imported before TRL's trainers.

TRL imports all of vLLM for a client that this project does not use: 7 of the 11 seconds in which a launcher starts.
"""

from trl import import_utils

import_utils.is_vllm_available = lambda min_version=None: False
