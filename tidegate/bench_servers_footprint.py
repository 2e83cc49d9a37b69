"""What processes cost, read from Linux' /proc: memory and processor time of a process and all that it started."""

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def descendants(root: int) -> list[int]:
    """Process ids of all children of `root`, their children, and so on."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: list[int] = []
    ahead = [root]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def cpu_s(pids: list[int]) -> float:
    """Processor seconds that these have used so far, with those of their children that ended."""
    return sum(sum(map(int, fields[11:15])) for pid in pids if (fields := _stat(pid))) / _TICKS_PER_S


def memory_mb(pids: list[int]) -> tuple[float, float]:
    """(proportional, resident) memory in MiB: pages that several share are split among them, or counted for each."""
    totals = {"Pss:": 0, "Rss:": 0}
    for pid in pids:
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        for line in lines:
            name, *rest = line.split()
            if name in totals:
                totals[name] += int(rest[0])
    return totals["Pss:"] / 1024, totals["Rss:"] / 1024


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, which may hold anything; empty if it has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
