"""One run owns a store: a file that only one process can create says which.

The file holds a token. Runs that are given one in TRAK_EXT_STORE_TOKEN, such as the ranks of a job
or a job that is started again, share what that token owns; any other run is refused by name. No
lock of the operating system is relied on, as network disks may have none: all that is needed is
that creating a file which must not exist, and renaming one, happen at once.

A run that was killed leaves its file. On the same machine the next run sees that the process is
gone and takes over; who takes over is decided by a second file, named after the token that is
replaced, which again only one process can create. From another machine nobody can tell a killed run
from one that sleeps: the file must be deleted by hand, as the error says, or the token be given.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import read_whole, with_name, write_whole
from .records import StoreError

TOKEN_VARIABLE = "TRAK_EXT_STORE_TOKEN"
NAME = "owner.json"
HEARTBEAT = 15.0  # seconds between signs of life: the file's time of change

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)


class Owner:
    """Owns the store in a folder for a while."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / NAME
        given = os.environ.get(TOKEN_VARIABLE)
        self.shared = bool(given)  # whether other runs may write, too
        self._token = given or secrets.token_hex(16)
        self._mark = secrets.token_hex(8)  # of this process, whatever the token

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Take the store, and give it back in the end; folders made for it go if still empty."""
        made, process = self._make_folders(), os.getpid()
        try:
            self._take()
            stop = threading.Event()
            beating = threading.Thread(target=self._beat, args=(stop,), daemon=True)
            beating.start()
            try:
                yield
            finally:
                stop.set()
                if os.getpid() == process:  # not a worker that a loader has forked
                    beating.join()
                    if self._said() == self._mark:
                        self._path.unlink(missing_ok=True)
        finally:
            for folder in made if os.getpid() == process else ():
                try:
                    folder.rmdir()
                except OSError:
                    break

    def check(self) -> None:
        """Refuse to write on where another run has taken the store, or the file was deleted."""
        found = _read(self._path)
        if found is None and self.shared and self._create(self._path):
            return  # the run that made the file has ended, this one goes on
        if found is None or found.get("token") != self._token:
            raise StoreError(
                f"store: expected {str(self._path)!r} to say that this run owns the store, got "
                + ("no file" if found is None else f"that {_describe(found)} does")
                + " (was it deleted while this run was alive? call fit again to go on)"
            )

    # --- taking it --------------------------------------------------------------------------------

    def _take(self) -> None:
        for _ in range(3):  # its owner may end between two looks
            if self._create(self._path):
                self._clear_claims()
                return
            found = _read(self._path)
            if found is None:
                continue
            if self.shared and found.get("token") == self._token:
                if not _is_gone(found):
                    return
            elif not _is_gone(found):
                raise self._refusal(found)
            if self._replace(found):
                self._clear_claims()
                return
        found = _read(self._path)
        raise self._refusal(found or {})

    def _replace(self, gone: dict[str, Any]) -> bool:
        """Take over from a run that is gone; False where the owner is another by now.

        Who does is who creates the file named after its mark. A run that was killed in doing so
        stands in the way as an owner does, and is taken over from in the same way.
        """
        claim, last = self._claim(gone), gone
        while not self._create(claim):
            found = _read(claim)
            if found is None:
                return False
            if not _is_gone(found):
                raise self._refusal(found, claim)
            claim, last = self._claim(found), found
        try:
            if _read(self._path) != gone:
                return False
            if last is not gone and _read(self._claim(gone)) is None:
                return False
            write_whole(self._path, [self._text()])
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _claim(self, gone: dict[str, Any]) -> Path:
        return self._folder / f"{NAME}.{gone.get('mark')}.taken"

    def _clear_claims(self) -> None:
        """Delete what runs left that were killed while they took over."""
        for claim in self._folder.glob(f"{NAME}.*.taken"):
            found = _read(claim)
            if found is not None and _is_gone(found):
                claim.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Create a file that says who this run is; False where there is one."""
        try:
            try:
                return self._link(path)
            except FileExistsError:
                return False
            except (NotImplementedError, OSError) as error:
                if getattr(error, "errno", None) in _NO_ROOM:
                    raise
            return self._create_then_write(path)  # a disk without links
        except OSError as error:
            sentence = f"store: expected to write {str(path)!r}, got {error.strerror or error}"
            raise with_name(error, sentence) from error

    def _link(self, path: Path) -> bool:
        """Give a file that says all a name that must not exist."""
        temporary = path.with_name(f"{NAME}.{secrets.token_hex(8)}.tmp")
        try:
            self._create_then_write(temporary)
            os.link(temporary, path, follow_symlinks=False)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_then_write(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, _EXCLUSIVE, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._text())
            os.fsync(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _text(self) -> bytes:
        said = {
            "token": self._token,
            "mark": self._mark,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "process": _process(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }
        return json.dumps(said, indent=2).encode()

    def _refusal(self, found: dict[str, Any], path: Path | None = None) -> StoreError:
        path = self._path if path is None else path
        try:
            age = f", last sign of life {max(0.0, time.time() - path.stat().st_mtime):.0f} s ago"
        except OSError:
            age = ""
        return StoreError(
            f"store: expected no other run that fits the store in {str(self._folder)!r}, got "
            f"{_describe(found)}{age} (wait for its end; delete {str(path)!r} if it is gone; runs "
            f"that share a store are given one {TOKEN_VARIABLE})"
        )

    # --- while it is held -------------------------------------------------------------------------

    def _said(self) -> str | None:
        try:
            found = _read(self._path)
        except StoreError:
            return None
        return None if found is None else found.get("mark")

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT):
            if self._said() == self._mark:
                try:
                    os.utime(self._path)
                except OSError:
                    continue  # the next write will tell

    def _make_folders(self) -> list[Path]:
        """Make the folder and those above it; return those that were made, the innermost first."""
        missing = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise with_name(
                error,
                f"store: expected a folder that can be made at {str(self._folder)!r}, got "
                f"{error.strerror}",
            ) from error
        return missing


def _read(path: Path) -> dict[str, Any] | None:
    """Return what an owner's file says; None where there is none."""
    for _ in range(20):  # whoever creates it writes it at once
        data = read_whole(path)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            time.sleep(0.05)
            continue
        return found if isinstance(found, dict) else {}
    return {}


def _describe(found: dict[str, Any]) -> str:
    if "pid" not in found:
        return "one that has not said which"
    return f"process {found['pid']} of host {found.get('host')}, begun {found.get('since')}"


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether a run's process is known to have ended, which only its own machine can say."""
    machine = _machine()
    if machine is None or found.get("machine") != machine or not found.get("process"):
        return False
    return _process(int(found["pid"])) != found["process"]


def _machine() -> str | None:
    """Return what is the same for all processes that see each other's numbers, until a restart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int) -> str | None:
    """Return when a process began, in the system's ticks; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended
