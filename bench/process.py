"""Child processes of the benches: this Python, with the very package that is running on its path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def python(*arguments: str) -> list[str]:
    """The command of a child; what lies in the current folder is no part of its path."""
    return [sys.executable, "-P", *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the folder that holds `fused_inr` ahead of PYTHONPATH: a plain checkout that was
    never installed has children, too."""
    from .. import __file__ as package

    folder = str(Path(package).resolve().parents[1])
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **more}


def age() -> float:
    """Seconds since this process began, importing included; 0 where the system does not tell, and in a process that has
    done other things before (a minute and more of them)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        seconds = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return seconds if 0 < seconds < 60 else 0.0


def end(process: subprocess.Popen, patience: float = 20.0) -> None:
    """End a child that leads a process group of its own: SIGINT, so that it can report, then the whole group."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            pass
    kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a child that leads a process group of its own, and whatever else is in the group, at once."""
    _signal(process, signal.SIGKILL)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        pass  # a driver may hold a process whose kernel hangs: nobody waits for that


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
