"""Forks stages and dvc, see tests/forking.py. Python imports this at its start where tests/starts
is on PYTHONPATH.

This process stays in place of the forked one: it passes signals on, dies with it, and ends as it
does.
"""

import os
import sys


def forked(arguments):
    """Ends as the forked process, or returns if these arguments need an ordinary start.

    Args:
        arguments: those of python.
    """
    server, unbuffered, what = os.environ.get("BLOCKPRUNER_TESTS_FORK"), arguments[:1] == ["-u"], {}
    arguments = arguments[unbuffered:]
    if arguments[:1] == ["-m"] and (
        arguments[1] in ("dvc", "flows.dvc") or arguments[1].startswith("stages.")
    ):
        what = {"module": arguments[1]}
    elif arguments[:1] == ["-P"] and arguments[1].endswith(".py"):
        what = {"script": arguments[1]}
    if not server or not what:
        return
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(server)
        except OSError:  # it has ended
            return
        known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        passed = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
        job = what | {
            "arguments": arguments[2:],
            "folder": os.getcwd(),  # noqa: PTH109 (pathlib takes a while to load)
            "environment": dict(os.environ),
            "unbuffered": unbuffered or "PYTHONUNBUFFERED" in os.environ,
            "interrupt": signal.SIGINT in passed,
            "parent": os.getppid(),
        }
        socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
        if connection.recv(100) != b"started":  # it would not be the same
            return
        for number in passed:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        code = int(connection.recv(100) or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if "-I" not in sys.orig_argv[:2] and "-IS" not in sys.orig_argv[:2]:
    forked(sys.orig_argv[1:])
