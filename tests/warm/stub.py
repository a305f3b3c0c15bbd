# The lines above name the interpreter: PYTHON.
"""Stands for a process that the warm server forks: passes arguments, files and signals on, ends as it does.

Run without site-packages, so that it starts in 20 ms.
"""

import json
import os
import signal
import socket
import struct
import sys

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    told = int(os.environ.pop("WARM_PID_FD", -1))
    inherited = [int(name) for name in os.listdir("/proc/self/fd")]
    files = sorted(fd for fd in inherited if fd != told and _is_open(fd))
    server = socket.socket(socket.AF_UNIX)
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        if any(
            os.path.exists(f"{path}/sitecustomize.py") for path in os.environ.get("PYTHONPATH", "").split(":")
        ):
            raise FileNotFoundError("no warm process: this one is to be customized before all imports")
        server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "server"))
        request = {"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "files": files}
        text = json.dumps(request).encode()
        socket.send_fds(server, [struct.pack("!I", len(text))], files)
        server.sendall(text)
        pid = struct.unpack("!i", server.recv(4))[0]
    except (OSError, struct.error):  # as everywhere else
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        if told >= 0:
            os.write(told, str(os.getpid()).encode())
            os.close(told)
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])  # type: ignore[name-defined]  # noqa: F821
    if told >= 0:
        os.write(told, str(pid).encode())
        os.close(told)
    for fd in files:
        os.close(fd)  # else a pipe would stay open as long as this process, not as long as that one
    for number in _FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    answer = server.recv(4)
    code = struct.unpack("!i", answer)[0] if answer else 1
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # the one that listed the folder
        return False
    return True


main()
