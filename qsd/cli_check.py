"""``qsd check``: the consistency of an image file, in the words and with the exit codes of ``qemu-img check``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qsd.cli_check_image import FindSecret, Image, Place, place_of, unlock, unlock_volume
from qsd.cli_check_options import Options, check_together, help_text, parse
from qsd.cli_getopt import UsageError
from qsd.cli_report import tell
from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.examining import CannotCheck, Examined, Repairs, examine, read_header
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings
from qsd.drivers.qcow2.repair import Repaired
from qsd.errors import QmpError, errno_text

CLEAN, FAILED, CORRUPT, LEAKING, UNSUPPORTED = 0, 1, 2, 3, 63


class _Done(Exception):
    """There is nothing to check. ``code``: the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def check(prog: str, words: Sequence[str]) -> int:
    """Run the sub-command; its exit code: 0 clean, 1 not checked, 2 corrupt, 3 leaks only, 63 not supported."""
    prog = f"{prog} check"
    try:
        options = parse(words)
        if options.wants_help:
            return tell(help_text(prog))
        find_secret = _make_objects(options.objects)
        check_together(options)
        return _check_image(prog, options, find_secret)
    except UsageError as error:
        sys.stderr.write(f"{prog}: {error}\nTry '{prog} --help' for more information\n")
    except QmpError as error:
        hint = f"{error.hint}\n" if error.hint else ""
        sys.stderr.write(f"{prog}: {error.desc}\n{hint}")
    except _Done as done:
        return done.code
    return FAILED


def _make_objects(arguments: Sequence[str]) -> FindSecret:
    """Make what ``--object`` says; how its secrets are found. Raises QmpError, _Done when help was asked for."""
    if not arguments:
        return _no_secret
    # It takes some time to import all that a daemon consists of.
    import trio

    from qsd.actors.objects import Objects
    from qsd.cli_options import Finish, object_options

    objects = Objects()
    try:
        for argument in arguments:
            trio.run(objects.add, object_options(argument))
    except Finish as finish:
        raise _Done(finish.code) from None
    return objects.secrets.password


def _no_secret(name: str) -> bytes:
    raise QmpError(f"No secret with id '{name}'")


def _check_image(prog: str, options: Options, find_secret: FindSecret) -> int:
    try:
        place = place_of(options)
        is_writable = options.repairs is not Repairs.NONE
        image = Image(place, writable=is_writable, is_hasty=options.cache == "unsafe")
    except QmpError as error:
        raise _could_not_open(options, error) from None
    try:
        if not _is_supported(image, place):
            unlock_volume(image, place, find_secret)
            sys.stderr.write(f"{prog}: This image format does not support checks\n")
            return UNSUPPORTED
        unlock(image, _header(image), place, find_secret)
        progress = _show_progress if options.progress and not options.quiet else _ignore
        examined = examine(image, options.repairs, progress, _tell_problems)
    except QmpError as error:
        raise _could_not_open(options, error) from None
    except CannotCheck as error:
        sys.stderr.write(f"{prog}: ERROR {error.text}\n{error.hint}")
        raise QmpError(f"Check failed: {errno_text(error.errno or 0)}") from None
    except OSError as error:
        raise QmpError(f"Check failed: {errno_text(error.errno or 0)}") from None
    finally:
        image.close()
    return _tell_findings(options, examined)


def _could_not_open(options: Options, error: QmpError) -> QmpError:
    return error.prefixed(f"Could not open '{options.image}': ")


def _is_supported(image: Image, place: Place) -> bool:
    """Whether it is a qcow2 image. Raises QmpError when it was said to be one, and is none."""
    if place.format not in (None, "qcow2"):
        return False
    try:
        start = image.read(0, layout.PROBE_LENGTH)
    except OSError as error:
        text = "Could not read " + ("qcow2 header" if place.format else "image for determining its format")
        raise QmpError(f"{text}: {errno_text(error.errno or 0)}") from None
    if place.format == "qcow2":
        if not start.startswith(layout.MAGIC):
            raise QmpError("Image is not in qcow2 format")
        return True
    # Version 1 is another format, which cannot be checked.
    return start.startswith(layout.MAGIC) and int.from_bytes(start[4:8], "big") >= 2


def _header(image: Image) -> Header:
    try:
        return read_header(image)
    except OSError as error:
        raise QmpError(f"Could not read qcow2 header: {errno_text(error.errno or 0)}") from None


def _tell_findings(options: Options, examined: Examined) -> int:
    found, fixed = examined.found, examined.fixed
    if options.output == "json" and not options.quiet:
        print(json.dumps(_as_json(options.image, found, fixed), indent=4))
    elif not options.quiet:
        print(_as_text(found, fixed))
    return CORRUPT if found.corruptions else LEAKING if found.leaks else CLEAN


def _tell_problems(found: Findings) -> None:
    """At once: the repair may fail."""
    sys.stderr.writelines(f"{problem}\n" for problem in found.problems)


def _ignore(_done: int, _total: int) -> None:
    """Nobody wants to know."""


def _show_progress(done: int, total: int) -> None:
    sys.stderr.write(f"    ({100 * done / total if total else 100:.2f}/100%)\r")
    if done == total:
        sys.stderr.write("\n")


def _as_json(filename: str, found: Findings, fixed: Repaired) -> dict[str, Any]:
    # In the reference's order.
    shown = {
        "image-end-offset": found.image_end,
        "compressed-clusters": found.compressed_clusters,
        "total-clusters": found.total_clusters,
        "corruptions": found.corruptions,
        "corruptions-fixed": fixed.corruptions,
        "check-errors": 0,
        "leaks": found.leaks,
        "leaks-fixed": fixed.leaks,
        "allocated-clusters": found.allocated_clusters,
        "filename": filename,
        "format": "qcow2",
        "fragmented-clusters": found.fragmented_clusters,
    }
    always = ("image-end-offset", "check-errors", "filename", "format")
    return {key: value for key, value in shown.items() if value or key in always}


def _as_text(found: Findings, fixed: Repaired) -> str:
    lines: list[str] = []
    add: Callable[[str], None] = lines.append
    if fixed.leaks or fixed.corruptions:
        add(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {fixed.leaks} leaked clusters\n    {fixed.corruptions} corruptions\n\n"
            "Double checking the fixed image now..."
        )
    if not found.corruptions and not found.leaks:
        add("No errors were found on the image.")
    if found.corruptions:
        add(
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if found.leaks:
        add(
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if found.total_clusters and found.allocated_clusters:
        total, used = found.total_clusters, found.allocated_clusters
        add(
            f"{used}/{total} = {100 * used / total:.2f}% allocated, "
            f"{100 * found.fragmented_clusters / used:.2f}% fragmented, "
            f"{100 * found.compressed_clusters / used:.2f}% compressed clusters"
        )
    add(f"Image end offset: {found.image_end}")
    return "\n".join(lines)
