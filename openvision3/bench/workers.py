"""A process for each side of a comparison, so that their memory is apart while their turns alternate."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

from openvision3.config import OpenVisionError


class Side(Protocol):
    """What a process holds: built once, then called in turns."""

    def turn(self) -> dict[str, Any]:
        """One turn; figures that can be pickled."""
        ...


class Worker:
    """A side in its own process. `build` and its arguments must be picklable; it runs in the process.

    Raises `OpenVisionError` where the side does, or where its process dies.
    """

    def __init__(self, name: str, build: Callable[..., Side], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, build, arguments), daemon=True)
        self.process.start()
        other.close()

    def __enter__(self) -> "Worker":
        return self

    def turn(self) -> dict[str, Any]:
        """Asks for one turn and waits for its figures."""
        try:
            self.connection.send("turn")
            kind, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            raise OpenVisionError(
                f"{self.name}: its process died with exit code {code}; a smaller --batch-size needs less memory"
            ) from None
        if kind == "error":
            raise OpenVisionError(f"{self.name}: {answer}")
        if kind == "fault":
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()  # which ends the process
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, build: Callable[..., Side], arguments: tuple[Any, ...]) -> None:
    side: Side | None = None
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        try:
            side = side or build(*arguments)
            answer = ("figures", side.turn())
        except OpenVisionError as error:
            answer = ("error", str(error))
        except Exception:
            answer = ("fault", traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:  # no one waits any more
            return
