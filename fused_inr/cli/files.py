"""Writes results: all of them or none, and never half of one."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from . import CliError

#: Exit code of a command whose results are written, and whose picture of them could not be drawn.
NO_PICTURE = 1


def refuse_folders(paths: Iterable[Path]) -> None:
    """Make sure, before any work, that no result has the name of a folder.

    Raises:
        CliError: a folder lies where one of the files is to go.
    """
    for path in paths:
        if path.is_dir():
            raise CliError(f"{path}: is a folder, and a result is to be written there; move it or choose another name")


def prepare_folder(folder: Path, option: str = "--out") -> None:
    """Make `folder` if only its last component is missing; make sure, before any work, that it can be written to."""
    try:
        if not folder.exists():
            if not folder.parent.is_dir():
                raise CliError(f"{option} {folder}: the folder {folder.parent} does not exist; make it first")
            folder.mkdir()
        elif not folder.is_dir():
            raise CliError(f"{option} {folder}: is a file, and a folder is needed")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CliError(f"{option} {folder}: cannot write there: {error.strerror or error}") from error


def write_all(contents: dict[Path, bytes]) -> None:
    """Put every content under its name, or, if any cannot be written (full disk), change none of the files.

    Each content goes to a temporary file in the same folder, onto the disk, and only when all are there over the old
    files (`os.replace` is atomic): a reader, or a killed process, sees a file whole, old or new.
    """
    staged: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            staged.append((temporary, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, path in staged:
            os.replace(temporary, path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}; the files there are unchanged") from error
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def write_picture(path: Path, draw: Callable[[], bytes]) -> bool:
    """Draw a picture of results that are already written, and write it; returns whether that went well.

    Whatever a drawing library objects to becomes a warning: nothing that was computed is lost to it. An older picture
    under this name is then removed, as it shows other results.
    """
    try:
        write_all({path: draw()})
        return True
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(
            f"fused-inr: warning: the results are written, the picture {printable(path)} is not: {reason}",
            file=sys.stderr,
        )
        with contextlib.suppress(OSError):
            path.unlink()
        return False


def printable(text: object) -> str:
    """Return `text` as it can be shown: bytes of a name that are no UTF-8, and control characters, become U+FFFD."""
    shown = os.fsencode(str(text)).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
