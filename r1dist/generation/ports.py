"""Free ports, and addresses that others can reach."""

import socket


def free_port(host: str = "") -> int:
    """A port of `host` that is free at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def address_towards(host: str, port: int = 9) -> str:
    """This machine's address as `host` sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return probe.getsockname()[0]
