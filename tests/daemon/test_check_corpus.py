"""``qsd check`` and ``qemu-img check`` on the same changed images, before and after repairs by each.

What differs is what docs/design.md says: the reference gives up, or harms the image. No repair changes what a guest
sees. QSD_EFFORT=20 tries twenty times as many changes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from qcow2_images import create
from qcow2_mutations import Mutator

from qsd import cli_check
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.layout import parse_header
from qsd.errors import QmpError

EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
# Options, bytes of the disk and of a cluster, snapshots, bitmaps. With both the reference loses the snapshots.
IMAGES: Final = {
    "plain": ("cluster_size=4096", 256 << 10, 4096, 1, 0),
    "bitmaps": ("cluster_size=1024", 128 << 10, 1024, 0, 2),
    "snapshots": ("cluster_size=512", 64 << 10, 512, 3, 0),
    "old": ("compat=0.10,cluster_size=512", 100 << 10, 512, 1, 0),
    "narrow": ("refcount_bits=1,cluster_size=4096", 256 << 10, 4096, 0, 1),
    "wide": ("refcount_bits=64,cluster_size=512", 64 << 10, 512, 1, 0),
    "data": ("data_file=DATA,cluster_size=4096", 256 << 10, 4096, 1, 0),
    "extended": ("extended_l2=on,cluster_size=16384", 512 << 10, 16384, 1, 0),
    "encrypted": (
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size=4096",
        *(256 << 10, 4096, 1, 0),
    ),
}
SEEDS: Final = 9
# What is found, and what was repaired.
FIGURES: Final = (
    *("corruptions", "leaks", "corruptions-fixed", "leaks-fixed", "image-end-offset"),
    *("allocated-clusters", "fragmented-clusters", "compressed-clusters", "total-clusters", "check-errors"),
)
SAME: Final = (
    *(
        "Leaked cluster",
        "ERROR OFLAG_COPIED",
        "ERROR found ",
        "ERROR l2_offset",
        "ERROR offset",
        "ERROR snapshot 1",
    ),
    *("ERROR: coffset", "ERROR compressed cluster 0", "ERROR: Unallocated", "ERROR snapshot table entry"),
)


@pytest.fixture(scope="module")
def bases(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Images the reference has written to."""
    place = tmp_path_factory.mktemp("bases")
    return {name: make(reference.parent, place / name, name) for name in IMAGES}


def words_for(name: str, image: Path) -> tuple[str, ...]:
    """How an image is named to the programs of the reference, and to ``qsd check``."""
    if name != "encrypted":
        return (str(image),)
    opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"
    return ("--object", "secret,id=s,data=abc", "--image-opts", opened)


def make(tools: Path, image: Path, name: str) -> bytes:
    options, length, size, snapshots, bitmaps = IMAGES[name]
    rng = random.Random(name)
    named = words_for(name, image)

    def write() -> None:
        commands = []
        for _ in range(12):
            at = rng.randrange(length // size) * size
            kind = rng.choice((f"write -P {rng.randrange(1, 255)}", "write -z -u", "discard", "write -z"))
            commands += ["-c", f"{kind} {at} {min(rng.choice((1, 2, 3)) * size, length - at)}"]
        run(tools / "qemu-io", *commands, *named)

    options = options.replace("DATA", f"{image}.data")
    create(tools / "qemu-img", "-f", "qcow2", "-o", options, image, str(length))
    if name == "plain":
        packed = [word for at in (0, size) for word in ("-c", f"write -c -P {7 + at % 9} {at} {size}")]
        run(tools / "qemu-io", "-f", "qcow2", *packed, image)
    write()
    for number in range(snapshots):
        run(tools / "qemu-img", "snapshot", "-c", f"s{number}", *named)
        write()
    for number in range(bitmaps):
        run(tools / "qemu-img", "bitmap", "--add", "-g", "512", image, f"b{number}")
        write()
    assert run(tools / "qemu-img", "check", *named).returncode == 0
    return image.read_bytes()


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=60, check=False, errors="replace"
    )


@attrs.frozen
class Answer:
    """What a check came to; ``code`` is negative for a signal."""

    code: int
    output: str
    errors: str

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output or "{}")
        return found

    @property
    def lines(self) -> Set[str]:
        """What is told in the same words."""
        return {line for line in self.errors.splitlines() if line.startswith(SAME)}

    def but(self, names: Set[str] = frozenset()) -> dict[str, Any]:
        figures = {"code": self.code} | {name: self.figures.get(name, 0) for name in FIGURES}
        return {name: figure for name, figure in figures.items() if name not in names}


class Case:
    """One changed image. Both get copies of it."""

    def __init__(self, place: Path, img: Path, data: bytes, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.img, self.data, self.name, self.capsys = place, img, data, name, capsys
        # Something leads nowhere: then what looks leaked is kept.
        self.is_lossy = False
        # With bitmaps, or features it does not know, the reference forgets the snapshots.
        self.loses_snapshots = False
        self._look()

    def ours(self, image: Path, *words: str, output: str = "json") -> Answer:
        code = cli_check.check("qsd", [f"--output={output}", *words, *words_for(self.name, image)])
        told = self.capsys.readouterr()
        return Answer(code, told.out, told.err)

    def theirs(self, image: Path, *words: str, output: str = "json") -> Answer:
        done = run(self.img, "check", f"--output={output}", *words, *words_for(self.name, image))
        return Answer(done.returncode, done.stdout, done.stderr)

    def _look(self) -> None:
        def read(offset: int, length: int) -> bytes:
            return self.data[offset : offset + length].ljust(length, b"\0")

        try:
            header = parse_header(self.data[: 1 << 21], is_for_check=True)
        except QmpError:
            return
        self.is_lossy = Checker(header, read, len(self.data)).run().is_lossy
        self.loses_snapshots = bool(header.autoclear and header.snapshot_count | header.snapshots_offset)

    def seen(self, image: Path) -> Iterator[Any]:
        """What a guest sees: the disk, and the snapshots."""
        for words in ((), *(("-l", f"s{number}") for number in range(IMAGES[self.name][3]))):
            raw = self.place / "raw"
            named = words_for(self.name, image)
            done = run(self.img, "convert", "--salvage", *words, "-O", "raw", *named, raw)
            yield done.returncode or raw.read_bytes()
            if done.returncode and not words:
                return


def gives_up(theirs: Answer) -> bool:
    """Whether the reference does not come to an end; a failure to open is none of that, with one exception."""
    is_refused = "Could not open" in theirs.errors and "overlaps" not in theirs.errors
    return theirs.code < 0 or (theirs.code == 1 and not is_refused)


@pytest.mark.parametrize("name", IMAGES)
def test_changed_images_look_the_same_to_both(
    name: str, bases: dict[str, bytes], reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mutator = Mutator(bases[name])
    different = {}
    for seed in range(SEEDS * EFFORT):
        data, told = mutator.mutate(f"{name} {seed}")
        case = Case(tmp_path, reference.parent / "qemu-img", data, name, capsys)
        problems = list(compare(case))
        if problems:
            different[f"{seed}: {told}"] = problems
    assert not different, "\n".join(f"{what}\n    {text}" for what, texts in different.items() for text in texts)


def compare(case: Case) -> Iterator[str]:
    """What differs and should not."""
    ours, theirs = case.place / "ours", case.place / "theirs"
    ours.write_bytes(case.data)
    before = list(case.seen(ours))
    for words in ((), ("-r", "leaks"), ("-r", "all")):
        ours.write_bytes(case.data)
        theirs.write_bytes(case.data)
        left, right = case.ours(ours, *words), case.theirs(theirs, *words)
        ignored = expected(case, left, right, words[-1] if words else "")
        if left.but(ignored) != right.but(ignored) and not (gives_up(right) and left.code != 1):
            yield f"{words}: {left} instead of {right}"
        if not words:
            if not ignored and not gives_up(right):
                if left.lines != right.lines:
                    yield f"{left.lines ^ right.lines} are told by one"
                for kind in ("json", "human"):
                    shown = case.ours(ours, output=kind).output, case.theirs(ours, output=kind).output
                    if shown[0] != shown[1]:
                        yield f"{shown[0]} instead of {shown[1]}"
            if ours.read_bytes() != case.data:
                yield "a check wrote to the image"
            continue
        after = list(case.seen(ours))
        if after != before and isinstance(before[0], bytes):
            yield f"{words}: a guest sees something else"
        left, right = case.ours(ours), case.theirs(ours)
        ignored = expected(case, left, right, "")
        if left.but(ignored) != right.but(ignored) and not gives_up(right):
            yield f"{words}: what we repaired looks to us like {left}, but {right}"


def expected(case: Case, left: Answer, right: Answer, repairs: str) -> set[str]:
    """Figures that may differ: see docs/design.md."""
    found = set()
    if "overlaps with others" in left.errors:
        # More tables than the file has room for are not looked at.
        return set(FIGURES)
    if "ERROR encryption header" in left.errors:
        # The reference takes its length for nothing, and gives the keys back.
        return {"code", *FIGURES}
    if not repairs:
        return found
    if case.loses_snapshots:
        return {"code", *FIGURES}
    if "ERROR cluster 0 " in left.errors:
        # The header is a table, too: a repair that changes it changes what that says.
        found |= set(FIGURES)
    if case.is_lossy:
        found |= {"leaks", "leaks-fixed", "corruptions-fixed", "image-end-offset"}
        # Where it gives clusters back it makes flags wrong, and other tables are written to them.
        is_harmed = "Rebuilding" in right.errors or "snapshot table at" in left.errors
        found |= {"corruptions"} if repairs == "leaks" or is_harmed else set()
    if "Rebuilding" in right.errors:
        # It puts new refcounts where the old ones were; here they are not built anew for a count.
        found |= {"image-end-offset"}
    if "outside image" in right.errors:
        # It makes the file so long that the block is inside, and counts that, too.
        found |= {"corruptions-fixed", "image-end-offset"}
    lost = ("exceeding the end of the file", "overflow cluster")
    is_mended = any(text in right.errors for text in lost) and left.code == 0
    # Data that is taken for a table, too: it is not written to.
    is_kept = ("\nERROR OFLAG_COPIED" in left.errors or "Repairing offset=" in right.errors) and left.code == 2
    if repairs == "all" and (is_mended or is_kept):
        found |= {"code", *FIGURES}
    return found
