"""A free port for a server that takes a while to start."""

import random
import socket


def free_port() -> int:
    """On loopback; outside of the range that the system gives to connections and to port 0, from
    which a process of another test could take it meanwhile, and of Ray's workers'."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("none of 100 ports between 20,000 and 32,000 is free")
