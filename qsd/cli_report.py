"""Messages on stderr in the reference's form: program, place, text, and hints on lines of their own."""

from __future__ import annotations

import attrs

from qsd.errors import QmpError
from qsd.host.console import write_stderr, write_stdout


def tell(text: str, code: int = 0) -> int:
    """Print what was asked for; the exit code that goes with it: ``code``, or 1 when nobody takes the text."""
    return code if write_stdout(text) else 1


@attrs.frozen
class Report:
    """Prints about one place, usually an option as it was typed; without a place, about the program."""

    prog: str
    where: str | None = None

    def error(self, error: QmpError) -> None:
        """Print an error and its hint."""
        self._print(f"{self._place}{error.desc}")
        if error.hint:
            write_stderr(error.hint.rstrip("\n") + "\n")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(f"{self._place}warning: {text}")

    def info(self, text: str) -> None:
        """Print something that is neither."""
        self._print(f"{self._place}info: {text}")

    def plain(self, text: str) -> None:
        """Print a line that names its own place, a file and line, right behind the program's name."""
        write_stderr(f"{self.prog}:{text}\n")

    @property
    def _place(self) -> str:
        return "" if self.where is None else f"{self.where}: "

    def _print(self, text: str) -> None:
        write_stderr(f"{self.prog}: {text}\n")
