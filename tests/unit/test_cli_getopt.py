"""The option rules of the C library."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.cli_getopt import Given, Option, UsageError, options


def read(*words: str) -> list[tuple[str | None, str, str]]:
    return [(item.option and item.option.value, item.argument, item.where) for item in options(words)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--object", "a"], [("object", "a", "--object a")]),
        (["--object=a"], [("object", "a", "--object=a")]),
        (["--obj", "a"], [("object", "a", "--obj a")]),
        (["--o="], [("object", "", "--o=")]),
        (["--object", "--version"], [("object", "--version", "--object --version")]),
        (["--object", ""], [("object", "", "--object ")]),
        (["--vers"], [("version", "", "--vers")]),
        (["-hV"], [("help", "", "-hV"), ("version", "", "-hV")]),
        (["-Tnope"], [("trace", "nope", "-Tnope")]),
        (["-T", "x"], [("trace", "x", "-T x")]),
        (["-VTx"], [("version", "", "-VTx"), ("trace", "x", "-VTx")]),
        (["x", "-h"], [(None, "x", "x"), ("help", "", "-h")]),
        (["-"], [(None, "-", "-")]),
        ([""], [(None, "", "")]),
        (["--", "x", "--version"], []),
        (["--daemonize", "--pidfile", "p"], [("daemonize", "", "--daemonize"), ("pidfile", "p", "--pidfile p")]),
    ],
)
def test_words_become_options(words: list[str], found: list[tuple[str | None, str, str]]) -> None:
    assert read(*words) == found


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--bogus"], "unrecognized option '--bogus'"),
        (["--bogus=1"], "unrecognized option '--bogus=1'"),
        (["-x"], "invalid option -- 'x'"),
        (["-blockdev", "x"], "invalid option -- 'b'"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
        (["--h=1"], "option '--help' doesn't allow an argument"),
        (["-T"], "option requires an argument -- 'T'"),
        (
            ["--=x"],
            "option '--=x' is ambiguous; possibilities: '--blockdev' '--chardev' '--daemonize' '--export' '--help' "
            "'--monitor' '--nbd-server' '--object' '--pidfile' '--trace' '--version'",
        ),
    ],
)
def test_refused_in_the_c_librarys_words(words: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert str(caught.value) == text


def test_error_comes_after_what_was_before_it() -> None:
    found = options(["--version", "--bogus"])
    assert next(found) == Given(Option.VERSION, "", "--version")
    with pytest.raises(UsageError):
        next(found)


@given(st.lists(st.text(alphabet="-=hTVobx ", max_size=8), max_size=6))
def test_any_words_are_read_or_refused(words: list[str]) -> None:
    try:
        read(*words)
    except UsageError as error:
        assert str(error)  # noqa: PT017  # either outcome is right
