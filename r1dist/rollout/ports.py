"""Free ports."""

import socket


def free_port(host: str = "") -> int:
    """A port that nobody listened on at `host` a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
