"""Files that are whole or not there: written under a name that nobody knows, synced and renamed."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .records import StoreError

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_TEMPORARY = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}\.tmp")


def read_whole(path: Path) -> bytearray | None:
    """Return a file's bytes, None where there is none.

    Raises:
        StoreError: what cannot be read, by name.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            done = 0
            while done < len(data):
                count = file.readinto(memoryview(data)[done:])
                if not count:
                    break
                done += count
            return data[:done] if done < len(data) else data
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"store: expected a file that can be read in {str(path)!r}, got {_reason(error)}"
        ) from error


def write_whole(path: Path, pieces: Iterable[Any]) -> None:
    """Write a file under its own name, whole or not at all.

    Raises:
        OSError: where it cannot be written (a full disk), with the file's name; nothing is left.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    made = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW
        descriptor = os.open(temporary, create, 0o666)
        made = True
        with open(descriptor, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece)
                while len(view):
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
        made = False
        sync_folder(path.parent)
    except OSError as error:
        sentence = f"store: expected to write {str(path)!r}, got {_reason(error)}"
        raise with_name(error, sentence) from error
    finally:
        if made:
            temporary.unlink(missing_ok=True)


def with_name(error: OSError, sentence: str) -> OSError:
    """Return an error of the same kind and number that says a sentence."""
    named = type(error)(sentence)
    named.errno = error.errno
    return named


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def sync_folder(path: Path) -> None:
    """Have the names of a folder's files reach the disk."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def clear_temporaries(folder: Path, name: re.Pattern[str]) -> None:
    """Delete what killed writes of files whose names match left in a folder; links are left."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        found = _TEMPORARY.fullmatch(entry.name)
        if found and name.fullmatch(found["name"]) and entry.is_file(follow_symlinks=False):
            Path(entry.path).unlink(missing_ok=True)
