"""How this project's processes log."""

import logging


def set_up_logging(level: int) -> None:
    """Ours from `level` on, everybody else's from WARNING on."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("r1dist").setLevel(level)
