"""Staging folders: where content is written before it gets its name, so that a crash or a full disk loses nothing.

A staging folder is hidden and stands beside what is written:

    .remend-x1y2z3a4/lock             locked by the process that writes, for as long as it lives
    .remend-x1y2z3a4/new              what is being written
    .remend-x1y2z3a4/replaced/NAME    the folder that had the name before, between two renames

One that nobody has locked was left by a process that was killed. Whoever next writes beside it, or looks for a folder
that is missing there, moves the replaced folder back and removes the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from remend.errors import FileError, RemendError

# Windows has none. Without locks, nobody can tell whether a process still writes: staging folders are left alone.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None

PREFIX, LOCK, NEW, REPLACED = ".remend-", "lock", "new", "replaced"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers. Nobody gets one there, so staging folders are left alone."""

_AT_CURRENT_FOLDER, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h


@contextlib.contextmanager
def staging_folder(parent: Path, undo: Callable[[Path], None] = lambda left: None) -> Iterator[Path]:
    """Yield a new staging folder in ``parent`` and remove it afterwards; first remove those of killed processes.

    Args:
        parent: the folder to create it in; it is created too.
        undo: as for :func:`remove_abandoned`.

    Raises:
        OSError: it cannot be created.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, undo)
    folder, lock = _create(parent)
    try:
        yield folder
    finally:
        try:
            _remove(folder)
        finally:
            lock.close()


def remove_abandoned(parent: Path, undo: Callable[[Path], None] = lambda left: None) -> None:
    """Remove the staging folders in ``parent`` whose processes were killed, and move back what these had replaced.

    Args:
        parent: the folder in which they are.
        undo: called with each of them before it is removed.
    """
    for folder in abandoned(parent):
        undo(folder)
        for replaced in (folder / REPLACED).glob("*") if _is_own_folder(folder / REPLACED) else ():
            if not os.path.lexists(parent / replaced.name):
                replaced.rename(parent / replaced.name)
        _remove(folder)


def abandoned(parent: Path) -> Iterator[Path]:
    """Yield the staging folders in ``parent`` whose processes were killed; each is locked until the next one."""
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        named_by_remend = re.fullmatch(r"[a-z0-9_]{8}", folder.name.removeprefix(PREFIX))
        if not named_by_remend or not _is_own_folder(folder):
            continue
        try:
            lock = _open_lock(folder / LOCK)
        except FileNotFoundError:
            # Killed before it created the lock, or after it removed it; another one may be about to create it, which
            # then begins again.
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        except OSError:
            continue
        with lock:
            if _try_to_lock(lock):
                yield folder


def lock_folder(folder: Path) -> BinaryIO | None:
    """Return the lock of a folder, which is this process's until :func:`unlock_folder`; None if another has it.

    Where files cannot be locked, every process gets one.

    Raises:
        OSError: nothing can be written there.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("a+b")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                lock.close()
                if isinstance(error, BlockingIOError):
                    return None
                raise
        if os.fstat(lock.fileno()).st_nlink > 0:  # else it was unlocked, and removed, meanwhile
            return lock
        lock.close()


def unlock_folder(folder: Path, lock: BinaryIO) -> None:
    """Give up the lock of a folder, and remove the folder if it holds nothing else."""
    with lock:
        if fcntl is None:  # Windows removes no open file
            lock.close()
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            folder.rmdir()


def _is_own_folder(path: Path) -> bool:
    """Return whether a path is a folder of this user and no link: in a shared folder, others could lay traps."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (sys.platform == "win32" or status.st_uid == os.geteuid())


def rename_folder(staged: Path, path: Path) -> None:
    """Give a folder of a staging folder its name; a folder that has that name is then in the staging folder.

    Linux exchanges the two in one step. Where that is not possible, a crash between two renames leaves no folder under
    the name, and :func:`remove_abandoned` moves the earlier one back.

    Raises:
        OSError: it cannot be renamed; the earlier folder has its name still.
    """
    if not os.path.lexists(path):
        staged.rename(path)
        return
    if _exchange(staged, path):
        return
    replaced = staged.parent / REPLACED / path.name
    replaced.parent.mkdir()
    path.rename(replaced)
    try:
        staged.rename(path)
    except BaseException:
        replaced.rename(path)
        raise


@contextlib.contextmanager
def readable_write_errors(path: str | Path) -> Iterator[None]:
    """Turn what file systems and the libraries that write files raise into a FileError that names ``path``."""
    try:
        yield
    except Exception as error:
        if (reason := disk_failure(error)) is None:
            raise
        raise FileError(
            f"cannot write {path}: {reason}; what was there before is unchanged. Free some space, or choose another "
            "place"
        ) from None


def disk_failure(error: Exception) -> str | None:
    """Return the reason if an exception says that a file could not be read or written, else None."""
    if isinstance(error, RemendError):
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    # safetensors and tokenizers are written in Rust, and tell the system's errors in classes of their own.
    if isinstance(error, SafetensorError) or re.search(r"\(os error \d+\)", str(error)):
        return str(error)
    return None


def _create(parent: Path) -> tuple[Path, BinaryIO]:
    """Create a staging folder and lock it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(_remove, folder)
            try:
                lock = on_failure.enter_context((folder / LOCK).open("x+b"))
            except FileNotFoundError:  # another process took the folder for one that was left, being empty
                continue
            if fcntl is not None:
                try:  # it waits for a process that is just removing the folder
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
            if (folder / LOCK).exists():
                on_failure.pop_all()
                return folder, lock


def _open_lock(file: Path) -> BinaryIO:
    """Open a lock; for writing where that is possible, since network file systems lock exclusively only then."""
    try:
        return file.open("r+b")
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    return file.open("rb")


def _try_to_lock(lock: BinaryIO) -> bool:
    """Return whether the process that created a lock has ended, so that the lock is this process's now."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return os.fstat(lock.fileno()).st_nlink > 0  # else it was removed meanwhile


def _remove(folder: Path) -> None:
    """Remove a staging folder, its lock last: until then, others know what the rest is."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.name != LOCK:
                remove_entry(entry)
        if [entry.name for entry in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        folder.rmdir()


def remove_entry(path: Path) -> None:
    """Remove a file, a link or a folder; what cannot be removed is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_CURRENT_FOLDER, names[0], _AT_CURRENT_FOLDER, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))
