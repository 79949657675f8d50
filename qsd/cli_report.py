"""Messages on stderr in the reference's form: program, place, text, and hints on lines of their own."""

from __future__ import annotations

import sys

import attrs

from qsd.errors import QmpError


@attrs.frozen
class Report:
    """Prints about one place, usually an option as it was typed; without a place, about the program."""

    prog: str
    where: str | None = None

    def error(self, error: QmpError) -> None:
        """Print an error and its hint."""
        self._print(f"{self._place}{error.desc}")
        if error.hint:
            self._write(error.hint.rstrip("\n") + "\n")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(f"{self._place}warning: {text}")

    def info(self, text: str) -> None:
        """Print something that is neither."""
        self._print(f"{self._place}info: {text}")

    def plain(self, text: str) -> None:
        """Print a line that names its own place, a file and line, right behind the program's name."""
        self._write(f"{self.prog}:{text}\n")

    @property
    def _place(self) -> str:
        return "" if self.where is None else f"{self.where}: "

    def _print(self, text: str) -> None:
        self._write(f"{self.prog}: {text}\n")

    def _write(self, text: str) -> None:
        # Arguments are arbitrary bytes: they come out as they came in.
        sys.stderr.flush()
        sys.stderr.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stderr.buffer.flush()
