"""Imports what takes seconds once, then forks a process for whoever connects: `python -m tests.warm.server`.

It has one thread and computes nothing, so that its children are as sound as new processes.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import multiprocessing.spawn
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

# Libraries only. Without Ray, which reads its settings from the environment as it is imported, and without decord,
# whose copies of C++'s functions would take the place of those that Ray is made for if it came first.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.utils.data",
    "deepspeed",
    "mlflow",
    "mlflow.tracking",
    "numpy",
    "pyarrow.fs",
    "pyarrow.parquet",
    "safetensors.torch",
    "webdataset",
    "av",
    "matplotlib",
    "psutil",
    "pydantic_settings",
    "yaml",
    "pytest",
    "hypothesis",
    # What those import only once an optimiser is made, an engine is built or a database is opened: seconds a rank.
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    # What Ray's processes import.
    "aiohttp.web",
    "fsspec.implementations.local",
    "jsonschema",
    "prometheus_client",
    "pydantic.v1",
    "setuptools",
)
# Flags of an interpreter that make no difference here, and those among them that take a value.
FLAGS, WITH_VALUE = {"-u", "-B", "-E", "-s", "-I", "-P", "-W", "-X"}, {"-W", "-X"}
HIGH = 400  # file descriptors of the server's own, out of the way of those that a request brings


def serve(folder: Path, owner: int, told: int) -> dict[str, Any]:
    """Forks for each request; returns in the children alone, with the request. Ends with the process `owner`."""
    listener = _high(socket.socket(socket.AF_UNIX))
    listener.bind(str(folder / "server"))
    listener.listen(64)
    os.write(told, b".")
    os.close(told)
    # What libraries open as they are imported, such as a source of random numbers, lies above as well.
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(HIGH)]
    for name in PRELOAD:
        importlib.import_module(name)
    for fd in held:
        os.close(fd)
    assert not {"ray", "decord"} & sys.modules.keys()
    gc.collect()
    gc.freeze()
    end = _high_fd(os.pidfd_open(owner))
    # By what poll gives: the process, and who asked for it.
    running: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(end, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == end:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if fd == listener.fileno():
                asked = _high(listener.accept()[0])
                request = _receive(asked)
                if request is None:
                    asked.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for _, other in running.values():
                        other.close()
                    asked.close()
                    listener.close()
                    return request
                for sent in request["sent"]:
                    os.close(sent)
                with suppress(OSError):  # the stub has been killed, which shows below
                    asked.sendall(struct.pack("!i", pid))
                ended = _high_fd(os.pidfd_open(pid))
                running[ended] = running[asked.fileno()] = (pid, asked)
                poll.register(ended, select.POLLIN)
                poll.register(asked, select.POLLIN)
            elif fd in running:
                _end(fd, running, poll)


def _end(fd: int, running: dict[int, tuple[int, socket.socket]], poll: select.poll) -> None:
    """A process has ended, or its stub has been killed: then the process is killed as well."""
    pid, asked = running[fd]
    if fd == asked.fileno():
        os.kill(pid, signal.SIGKILL)
        poll.unregister(fd)
        del running[fd]
        return
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):  # the stub has been killed
        asked.sendall(struct.pack("!i", code))
    if running.pop(asked.fileno(), None):
        poll.unregister(asked)
    asked.close()
    poll.unregister(fd)
    del running[fd]
    os.close(fd)


def _receive(asked: socket.socket) -> dict[str, Any] | None:
    """What a stub wants, its files as `sent`; None where it went away meanwhile."""
    try:
        size, sent, _, _ = socket.recv_fds(asked, 4, 250)
        text = b""
        while size and len(text) < struct.unpack("!I", size)[0]:
            piece = asked.recv(2**16)
            if not piece:
                break
            text += piece
        return {**json.loads(text), "sent": [_high_fd(fd) for fd in sent]}
    except (OSError, ValueError):
        return None


def _high_fd(fd: int) -> int:
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)
    os.close(fd)
    return moved


def _high(connection: socket.socket) -> socket.socket:
    return socket.socket(fileno=_high_fd(connection.detach()))


def become(request: dict[str, Any], stub: str) -> types.CodeType:
    """Make this process what the request describes; its program."""
    for sent, fd in zip(request["sent"], request["files"], strict=True):
        os.dup2(sent, fd, inheritable=True)
        os.close(sent)
    for fd in {0, 1, 2} - set(request["files"]):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=True)
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    sys.executable = stub
    multiprocessing.spawn.set_executable(stub)
    return _program(request["argv"])


def _program(argv: list[str]) -> types.CodeType:
    """Sets sys.argv, sys.path and the module __main__ as the interpreter does."""
    while argv and argv[0][:2] in FLAGS:
        argv = argv[2:] if argv[0] in WITH_VALUE else argv[1:]
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    server = {"", *filter(None, _SERVER_PATHS)}
    first = os.getcwd() if argv[0] in ("-c", "-m") else os.path.dirname(os.path.abspath(argv[0]))
    sys.path[:] = [first, *paths, *(path for path in sys.path if path not in server)]
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        return compile(argv[1], "<string>", "exec")
    if argv[0] == "-m":
        spec = find_spec(argv[1])
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{argv[1]}.__main__")
        if spec is None or spec.origin is None:
            sys.exit(f"No module named {argv[1]}")
        main.__spec__, main.__package__, main.__file__ = spec, spec.parent, spec.origin
        sys.argv = [spec.origin, *argv[2:]]
        return spec.loader.get_code(spec.name)
    main.__file__ = argv[0]
    sys.argv = argv
    return compile(Path(argv[0]).read_bytes(), argv[0], "exec")


def _run(request: dict[str, Any], stub: str) -> NoReturn:
    """Ends as the interpreter does, but for clearing all modules, which would cost more than most tests."""
    code = 0
    try:
        exec(become(request, stub), sys.modules["__main__"].__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            code = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


_SERVER_PATHS = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]

if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _request = serve(_folder, int(sys.argv[2]), int(sys.argv[3]))
    _run(_request, str(_folder / "python"))
