"""Processes that are killed, and disks that fail, at any operation on files below a folder; in this process."""

import os
import resource
import sys
from contextlib import contextmanager, suppress

CHANGES = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate",
    "tempfile.mkdtemp", "shutil.rmtree", "ctypes.dlopen", "fcntl.flock",
}  # fmt: skip
"""Events of Python's audit hooks before something is changed (and before each file is opened, or locked)."""

_watched = None


class Killed(BaseException):
    """The process is no more: whatever it tries, it does not happen."""


def _audit(event, arguments):
    if _watched is not None and event in CHANGES:
        _watched(event, arguments)


sys.addaudithook(_audit)


@contextmanager
def killed_at(operation, folder):
    """Kill what runs within it before its ``operation``-th operation; the list that is yielded is empty if none was."""
    with _watch(operation, folder, Killed(), afterwards=True) as struck, suppress(Killed):
        yield struck


@contextmanager
def failing_at(operation, folder, error, afterwards):
    """Fail the ``operation``-th operation, and perhaps all ``afterwards`` that need room."""
    with _watch(operation, folder, error, afterwards) as struck:
        yield struck


@contextmanager
def _watch(operation, folder, error, afterwards):
    global _watched
    struck, count, killed = [], 0, isinstance(error, Killed)

    def watched(event, arguments):
        nonlocal count
        name = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes | os.PathLike) else ""
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        frees = event in ("os.remove", "os.rmdir", "shutil.rmtree")  # a full disk lets files be removed
        if not (str(folder) in name or event in ("ctypes.dlopen", "fcntl.flock")):
            return
        if not killed and (frees or not writes):
            return
        count += 1
        if count == operation or (struck and afterwards):
            struck.append((event, name))
            raise error

    _watched = watched
    try:
        yield struck
    finally:
        _watched = None


@contextmanager
def no_file_above(size):
    """Let no file grow above a size, as on a disk that is full: the system refuses, whatever library writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
