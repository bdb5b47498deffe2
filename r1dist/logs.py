"""How this project's processes log."""

import logging
import os


def set_up_logging(level: int | None = None) -> None:
    """Ours from `level` on, everybody else's from WARNING on. Unset: INFO on the first rank, ERROR on others."""
    if level is None:
        level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("r1dist").setLevel(level)
