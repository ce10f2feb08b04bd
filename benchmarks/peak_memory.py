"""Runs a command and prints the peak resident memory of it and of all its children together.

    python benchmarks/peak_memory.py ov3 train demo --stage1.samples 1920 --stage2.samples 960 --out /tmp/memory

Resident sizes are added up every 0.2 s from /proc (Linux), as proportional set sizes, so that pages which processes
share count once.
"""

import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Returns the command's exit code."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    process = subprocess.Popen(sys.argv[1:])
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(proportional_size(pid) for pid in family(process.pid)))
        time.sleep(0.2)
    print(f"peak memory {peak / 2**30:.2f} GiB, exit code {process.returncode}")
    return process.returncode


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it ended meanwhile
                continue
    return found


def proportional_size(pid: int) -> int:
    """Bytes of memory that a process holds, shared pages divided by the number of their holders."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
