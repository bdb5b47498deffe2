"""Imported by the fork server of the pool: reasoning-gym takes seconds to import. It may be missing."""

import reasoning_gym  # noqa: F401
