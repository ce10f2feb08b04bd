"""Python programs in processes of their own that begin with PyTorch imported, which takes seconds of each otherwise.

They are forked from a server that has imported what they need, and done nothing else (multiprocessing's fork server).
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard", "openvision3.training.loop",
     "openvision3.evaluation.evaluate", "openvision3.vlm.train"]
)  # fmt: skip


class Fork:
    """`python ARGUMENTS` with an environment (a script, or "-m" and a module), with what tests use of `Popen`."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self._said = [tempfile.NamedTemporaryFile("r", prefix="ov3-fork-") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._said]
        method = multiprocessing.get_start_method()  # of the program's own workers; else they would need another server
        self._process = _SERVER.Process(target=_run, args=(list(arguments), dict(env), names, method))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; what it wrote on stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("fork", timeout or 0)
        said = []
        for file in self._said:
            file.seek(0)
            said.append(file.read())
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], env: dict[str, str], files: list[str], method: str) -> None:
    multiprocessing.set_start_method(method, force=True)
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    if threads := env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # OpenMP has read the server's variable, not this one
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
