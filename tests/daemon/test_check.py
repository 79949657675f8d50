"""``qsd check`` beside ``qemu-img check``: the same figures and exit codes for sound and damaged images."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import attrs
import pytest
from harness import PROGRAM
from qcow2_images import create

from qsd import cli_check
from qsd.cli_check_image import Image, Place
from qsd.drivers.qcow2 import examining, snapshot_table
from qsd.drivers.qcow2.examining import Repairs
from qsd.drivers.qcow2.layout import Header, marking, parse_header, serialise_header, unmarking

FIGURES = (
    *("corruptions", "leaks", "allocated-clusters", "total-clusters", "compressed-clusters"),
    *("fragmented-clusters", "image-end-offset"),
)
VARIANTS = {
    "plain": "",
    "small": "cluster_size=512",
    "extended": "extended_l2=on",
    "narrow": "refcount_bits=1",
    "wide": "refcount_bits=64",
    "old": "compat=0.10",
    "data": "data_file=DATA",
}


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=60, check=False)


def figures(*program: str | Path) -> tuple[int, tuple[Any, ...]]:
    """Exit code and figures of a check."""
    done = run(*program)
    found = json.loads(done.stdout)
    return done.returncode, tuple(found.get(name, 0) for name in FIGURES)


def ours(image: Path) -> tuple[int, tuple[Any, ...]]:
    return figures(*PROGRAM, "check", "--output=json", image)


def theirs(image: Path) -> tuple[int, tuple[Any, ...]]:
    return figures(tool("qemu-img"), "check", "--output=json", image)


def make(place: Path, variant: str) -> Path:
    """An image that has been written to, with zeroes, discards, a snapshot and a bitmap where it can have them."""
    chance = random.Random(variant)
    image = place / "image.qcow2"
    options = ["-o", VARIANTS[variant].replace("DATA", f"{place}/data")] if VARIANTS[variant] else []
    assert run(tool("qemu-img"), "create", "-q", "-f", "qcow2", *options, image, "4M").returncode == 0
    commands = []
    for _ in range(16):
        at, length = chance.randrange(3800) * 1024, chance.randrange(1, 90) * 1024
        commands += ["-c", f"write -P {chance.randrange(1, 255)} {at} {length}"]
        commands += ["-c", f"{chance.choice(('discard', 'write -z -u'))} {chance.randrange(63) * 65536} 65536"]
    assert run(tool("qemu-io"), "-f", "qcow2", *commands, image).returncode == 0
    if variant not in ("narrow", "data"):
        assert run(tool("qemu-img"), "snapshot", "-c", "s", image).returncode == 0
        assert run(tool("qemu-io"), "-f", "qcow2", "-c", "write -P 7 1M 1M", image).returncode == 0
    if variant not in ("old", "small"):
        assert run(tool("qemu-img"), "bitmap", "--add", image, "b").returncode == 0
    return image


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_images_look_the_same_to_both(tmp_path: Path, variant: str) -> None:
    image = make(tmp_path, variant)
    assert ours(image) == theirs(image)
    assert ours(image)[0] == 0


def test_damaged_images_look_the_same_to_both(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = image.read_bytes()
    chance = random.Random(3)
    l1 = int.from_bytes(data[40:48], "big")
    table = int.from_bytes(data[48:56], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    block = int.from_bytes(data[table : table + 8], "big")
    seen = set()
    for _ in range(12):
        damaged = bytearray(data)
        damaged[chance.choice((l1, l2, l2, block)) + chance.randrange(256)] ^= 1 << chance.randrange(8)
        image.write_bytes(damaged)
        answer = ours(image)
        assert answer == theirs(image)
        seen.add(answer[0])
    assert {0, 2} <= seen


# What is written where: bytes of a value at an offset from the start of the table, or of the header.
DAMAGES = {
    "L1 entry of nothing but reserved bits": ("plain", "l1", 0, 8, 3),
    "L1 entry that leads between clusters": ("plain", "l1", 0, 8, 1 << 63 | 0x4200),
    "L1 entry that leads into its own table": ("small", "l1", 8, 8, 1 << 63 | 0x200),
    "L1 table that reaches beyond the end": ("small", "header", 36, 4, 0x10000),
    "refcount table entry with reserved bits": ("plain", "refcounts", 8, 8, 1 << 50 | 1),
    "refcount table entry with no other bits": ("plain", "refcounts", 8, 8, 1),
    "two entries for one refcount block": ("plain", "refcounts", 8, 8, 0x20000),
    "snapshot without extra data of version 3": ("plain", "snapshots", 36, 4, 15),
    "snapshot of version 2 without extra data": ("old", "snapshots", 36, 4, 15),
    "snapshot table beyond the end": ("plain", "header", 64, 8, 1 << 40),
    "snapshot's L1 table off its place": ("plain", "snapshots", 0, 8, 0x4200),
    "snapshot's L1 table that reaches beyond the end": ("small", "snapshots", 8, 4, 0x10000),
    "compressed cluster with a data file": ("data", "l2", 0, 8, 1 << 62 | 0x5000),
    "compressed cluster with subclusters": ("extended", "l2", 0, 16, 1 << 126 | 0x8000 << 64 | 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_damage_has_the_figures_of_the_other(tmp_path: Path, damage: str) -> None:
    variant, table, offset, length, value = DAMAGES[damage]
    image = make(tmp_path, variant)
    data = bytearray(image.read_bytes())

    def word(at: int) -> int:
        return int.from_bytes(data[at : at + 8], "big") & 0x00FFFFFFFFFFFE00

    places = {"header": 0, "l1": word(40), "refcounts": word(48), "snapshots": word(64), "l2": word(word(40))}
    at = places[table] + offset
    data[at : at + length] = value.to_bytes(length, "big")
    image.write_bytes(data)
    answer = ours(image)
    assert answer == theirs(image)
    assert answer[0] == (0 if variant == "old" else 2)
    run(*PROGRAM, "check", "-r", "all", image)
    assert ours(image) == theirs(image), "of what the repair left"


@pytest.mark.parametrize(
    ("offset", "length", "value", "text"),
    [
        (8, 4, 7, "Could not read bitmap 'b' from image: Invalid argument"),
        (20, 4, 0x400, "Broken bitmap directory"),
        (20, 4, 8, "Broken bitmap directory"),
    ],
)
def test_bitmap_that_keeps_the_image_from_opening_is_told(
    tmp_path: Path, offset: int, length: int, value: int, text: str
) -> None:
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    at = data.index((1).to_bytes(2, "big") + b"\0\0\0\0b\0\0\0") - 18 + offset
    data[at : at + length] = value.to_bytes(length, "big")
    image.write_bytes(data)
    for program in (PROGRAM, (tool("qemu-img"),)):
        done = run(*program, "check", image)
        assert (done.returncode, text in done.stderr) == (1, True), done.stderr


def test_snapshot_that_keeps_the_image_from_opening_is_told(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    at = int.from_bytes(data[64:72], "big") + 36
    data[at : at + 4] = (1025).to_bytes(4, "big")
    image.write_bytes(data)
    for program in (PROGRAM, (tool("qemu-img"),)):
        done = run(*program, "check", image)
        assert done.returncode == 1
        assert "Too much extra metadata in snapshot table entry 0" in done.stderr


def test_repairs_satisfy_the_other(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    block = int.from_bytes(data[(table := int.from_bytes(data[48:56], "big")) : table + 8], "big")
    used = [at for at in range(l2, l2 + 512, 8) if any(data[at : at + 8])]
    data[used[0] : used[0] + 8] = bytes(8)
    data[block + 2 * 3 : block + 2 * 3 + 2] = bytes(2)
    image.write_bytes(data)
    assert ours(image)[0] == 2
    done = run(*PROGRAM, "check", "-r", "all", image)
    assert done.returncode == 0, done.stdout
    assert "Double checking" in done.stdout
    assert theirs(image)[0] == 0


@pytest.mark.parametrize("damage", ["no block", "low counts", "block is data too", "leaks", "flags"])
def test_rebuilt_images_hold_what_the_other_makes_of_them(tmp_path: Path, damage: str) -> None:
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    table, l1 = int.from_bytes(data[48:56], "big"), int.from_bytes(data[40:48], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    used = next(at for at in range(l2 + 8, l2 + 512, 8) if any(data[at : at + 8]))
    if damage == "no block":
        data[table : table + 8] = bytes(8)
    elif damage == "low counts":
        data[block + 2 * 8 : block + 2 * 16] = bytes(16)
    elif damage == "block is data too":
        data[used : used + 8] = (block | 1 << 63).to_bytes(8, "big")
    elif damage == "leaks":
        data[used : used + 8] = bytes(8)
    else:
        data[used] ^= 0x80
    theirs_image = tmp_path / "theirs.qcow2"
    for path in (image, theirs_image):
        path.write_bytes(data)
    assert run(*PROGRAM, "check", "-r", "all", image).returncode == 0
    assert run(tool("qemu-img"), "check", "-q", "-r", "all", theirs_image).returncode == 0
    assert theirs(image)[0] == ours(image)[0] == 0
    if damage != "block is data too":  # in that block the two count differently
        done = run(tool("qemu-img"), "compare", "-f", "qcow2", "-F", "qcow2", image, theirs_image)
        assert done.returncode == 0, done.stdout


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 4096)
    done = run(*PROGRAM, "check", tmp_path / "raw")
    assert (done.returncode, done.stderr) == (63, "qsd check: This image format does not support checks\n")
    done = run(*PROGRAM, "check", tmp_path / "nobody")
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr


def test_what_is_older_than_version_2_is_another_format(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = image.read_bytes()
    image.write_bytes(data[:4] + bytes(4) + data[8:])
    for words, code in ((), 63), (("-f", "qcow2"), 1):
        for program in (PROGRAM, (tool("qemu-img"),)):
            assert run(*program, "check", *words, image).returncode == code


def test_image_in_use_is_not_checked(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    qemu = subprocess.Popen(
        [tool("qemu-io"), "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert qemu.stdin is not None
    assert qemu.stdout is not None
    qemu.stdin.write("length\n")
    qemu.stdin.flush()
    assert "MiB" in qemu.stdout.readline()
    done = run(*PROGRAM, "check", image)
    qemu.stdin.close()
    qemu.wait(60)
    qemu.stdout.close()
    assert done.returncode == 1
    assert done.stderr.endswith(f"lock\nIs another process using the image [{image}]?\n")


def test_image_whose_bitmaps_keep_it_from_opening_is_not_called_clean(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = image.read_bytes()
    directory = data.index((1).to_bytes(2, "big") + b"\0\0\0\0b\0\0\0") - 18
    table = int.from_bytes(data[directory : directory + 8], "big")
    for place, value, text in [
        (directory, 512, "Bitmap 'b' doesn't satisfy the constraints"),
        (table, 512, "Could not read bitmap_table table from image for bitmap 'b': Invalid argument"),
        # A disk of no sector, whose bitmap is one of no bits.
        (24, 31, "Could not read bitmap 'b' from image: Invalid argument"),
    ]:
        damaged = bytearray(data)
        damaged[place : place + 8] = value.to_bytes(8, "big")
        image.write_bytes(damaged)
        for program in (PROGRAM, (tool("qemu-img"),)):
            done = run(*program, "check", image)
            assert done.returncode == 1
            assert text in done.stderr


# Words whose answer is the same to the letter, but for the program's name. Q: an image; L: one encrypted with LUKS;
# V: a LUKS volume.
SAME = (
    *("-r some Q", "--output=xml Q", "--nothing Q", "--nothing=x Q", "-Z Q", "-f", "--repair Q", "--quiet=x Q"),
    *("", "a b", "-T bad Q", "-T none Q", "-T unsafe Q", "-T bad nobody", "-rall Q", "-qU Q", "-- Q", "Q -q"),
    *("-f bad Q", "-f bad -T bad Q", "nobody", "/", "file:Q", "--rep=all Q", "--o=x Q", "-U -r all Q"),
    *("json:{}", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"Q"}}'),
    *("--image-opts Q", "--image-opts file.filename=Q", "--image-opts -f qcow2 file.filename=Q"),
    *("--image-opts driver=qcow2,file.filename=nobody", "--image-opts driver=qcow2,file=x", "--image-opts q=1"),
    *("--image-opts driver=qcow2", "--image-opts driver=qcow2,file.driver=file", "--image-opts driver=bad"),
    *("--image-opts driver=qcow2,file.driver=bad,file.filename=Q", "--image-opts driver=raw,file.filename=Q"),
    *("--image-opts driver=qcow2,bad=1,file.filename=Q", "--image-opts driver=qcow2,file.filename=Q,file.bad=1"),
    *("--image-opts driver=qcow2,file.filename=Q,force-share=on -r all", "--image-opts driver=file,filename=Q"),
    *("--image-opts driver=qcow2,file.filename=Q,read-only=on -r leaks",),
    *(
        f"--image-opts driver=qcow2,file.filename=Q,{option}"
        for option in (
            *("lazy-refcounts=x", "lazy-refcounts=yes", "discard-no-unref=1", "auto-read-only=x", "active=x"),
            *("l2-cache-size=x", "l2-cache-size=-1", "cache-size=1.5M", "refcount-cache-size=99999999999999999999"),
            *("cache-clean-interval=x", "cache-clean-interval=5", "file.drop-cache=x", "file.aio-max-batch=x"),
        )
    ),
    *(
        "--image-opts driver=qcow2,file.filename=Q,cache.direct=x",
        "--object secret,data=x Q",
        "--object bad,id=s Q",
    ),
    *("--object secret,id=s Q", "--object secret,id=s,data=x --object secret,id=s,data=y Q", "--object x= Q"),
    '--object {"qom-type":"secret","id":"s","data":"abc"} Q',
    *("--output=json Q", "--output json -q Q", "--output=json -r all Q", "--output=human -U Q", "-p Q"),
    "--output=json --image-opts file.filename=Q",
    "--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=L",
    "--object secret,id=s,data=bad --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=L",
    "--object secret,id=s,data=abc --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=L",
    "--object secret,id=s,data=abc --image-opts driver=qcow2,encrypt.bad=s,file.filename=L",
    "--object secret,id=s,data=abc --image-opts driver=qcow2,encrypt.format=aes,file.filename=L",
    "--image-opts driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=Q",
    *(
        f"--object secret,id=s,data=abc --image-opts {words}driver=qcow2,encrypt.key-secret=s,file.filename=L"
        for words in ("-q ", "-U ", "-r all ", "-r leaks ")
    ),
    *("-f raw V", "-f qcow2 V", "-f luks nobody", "--image-opts driver=raw,offset=512,size=x,file.filename=Q"),
    *("--image-opts driver=raw,offset=512,file.filename=Q", "--image-opts driver=raw,key-secret=s,file.filename=Q"),
    *("--image-opts driver=luks,key-secret=s", "--image-opts driver=luks,key-secret=s,file=x"),
    *(
        f"--object secret,id=s,data={data} --image-opts driver=luks,key-secret={name},{more}"
        for data, name, more in (
            *(("abc", "s", "file.filename=V"), ("bad", "s", "file.filename=V"), ("abc", "t", "file.filename=V")),
            *(("abc", "s", "file.filename=L"), ("abc", "s", "bad=1,file.filename=V")),
            *(("abc", "s", "header.filename=V,file.filename=V"), ("abc", "s", "offset=1,file.filename=V")),
        )
    ),
)


@pytest.fixture(scope="module")
def luks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that the secret "abc" opens."""
    image = tmp_path_factory.mktemp("luks") / "image"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    create(tool("qemu-img"), "-f", "qcow2", "-o", options, image, "1M")
    return image


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LUKS volume that the secret "abc" opens."""
    image = tmp_path_factory.mktemp("volume") / "image"
    create(tool("qemu-img"), "-f", "luks", "-o", "key-secret=s,iter-time=10", image, "1M")
    return image


def test_answers_to_words_are_the_others(
    reference: Path,
    luks: Path,
    volume: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = reference.parent / "qemu-img"
    if not program.exists():
        pytest.skip("the reference's other programs are not there")
    monkeypatch.chdir(tmp_path)
    assert run(program, "create", "-q", "-f", "qcow2", "Q", "1M").returncode == 0
    shutil.copy(luks, "L")
    shutil.copy(volume, "V")
    different = {}
    for words in SAME:
        theirs = run(program, "check", *words.split())
        # Usage errors of the C library have the command's name, others have not: ours all have.
        expected = theirs.stderr.replace("qemu-img check", "qemu-img").replace("qemu-img", "qsd check")
        code = cli_check.check("qsd", words.split())
        told = capsys.readouterr()
        if (theirs.returncode, theirs.stdout, expected) != (code, told.out, told.err):
            different[words] = (theirs, code, told)
    assert not different


def test_encrypted_image_is_checked_without_its_key(luks: Path, volume: Path) -> None:
    """The reference wants the key, which it does not need either."""
    assert ours(luks)[0] == 0
    done = run(*PROGRAM, "check", volume)
    assert (done.returncode, done.stderr) == (63, "qsd check: This image format does not support checks\n")


def test_quiet_repair_tells_what_was_wrong(tmp_path: Path) -> None:
    """It told what was left, which was nothing."""
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block + 2 * 5 + 1] += 1
    image.write_bytes(data)
    done = run(*PROGRAM, "check", "-q", "-r", "leaks", image)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "Leaked cluster 5 refcount=3 reference=2\n"


OPTIONS = {
    "quiet": ["-q"],
    "quiet in JSON": ["-q", "--output=json"],
    "format": ["-f", "qcow2"],
    "another format": ["-f", "raw"],
    "unknown format": ["-f", "nothing"],
    "shared": ["-U"],
    "shared repair": ["-U", "-r", "all"],
    "unknown repair": ["-r", "some"],
    "unknown output": ["--output=xml"],
    "unknown option": ["--nothing"],
    "two images": ["another"],
}


@pytest.mark.parametrize(
    ("image_is", "words"),
    [
        (kind, name)
        for name in OPTIONS
        for kind in ("clean", "leaking", "raw")[: 3 if "quiet" in name or "format" in name else 1]
    ],
)
def test_options_mean_the_same_to_both(tmp_path: Path, image_is: str, words: str) -> None:
    image = tmp_path / "image"
    assert run(tool("qemu-img"), "create", "-q", "-f", "qcow2", image, "1M").returncode == 0
    data = bytearray(image.read_bytes())
    if image_is == "leaking":
        table = int.from_bytes(data[48:56], "big")
        block = int.from_bytes(data[table : table + 8], "big")
        data[block + 2 * 9 + 1] = 1
        data = data.ljust(10 << 16, b"\0")
    elif image_is == "raw":
        data = bytearray(1 << 20)
    image.write_bytes(data)
    done, expected = (run(*program, "check", *OPTIONS[words], image) for program in (PROGRAM, (tool("qemu-img"),)))
    assert done.returncode == expected.returncode
    assert bool(done.stdout) == bool(expected.stdout)
    if "-q" in OPTIONS[words]:
        assert done.stderr.removeprefix("qsd check") == expected.stderr.removeprefix("qemu-img")
    assert image.read_bytes() == data


def test_shared_beside_a_writer(tmp_path: Path, daemon: Any) -> None:
    image = make(tmp_path, "plain")
    options = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(image)}}
    qmp = daemon().qmp()
    qmp.execute_raw("blockdev-add", options)
    export = {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    qmp.execute("nbd-server-start", addr=address)
    qmp.execute_raw("block-export-add", export)
    for program in (PROGRAM, (tool("qemu-img"),)):
        refused = run(*program, "check", image)
        assert refused.returncode == 1
        assert "lock" in refused.stderr
        assert run(*program, "check", "-U", image).returncode == 0


def test_long_snapshot_tables_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 60000 entries was read 3600 times over: 132 KB for each of them."""
    count = 60000
    entry = snapshot_table.pack(
        [snapshot_table.StoredSnapshot(l1_offset=0, l1_size=0, id=b"1", name=b"n", date_ns=0, vm_clock_ns=0)], 0
    )
    path = tmp_path / "table"
    table = entry * count
    path.write_bytes(table)
    header = Header(version=3, refcount_table_clusters=1, snapshots_offset=0, snapshot_count=count)
    image = Image(Place(filename=str(path)), writable=False)
    taken = []

    def read(offset: int, length: int) -> bytes:
        taken.append(length)
        return table[offset : offset + length].ljust(length, b"\0")

    monkeypatch.setattr(image, "read", read)
    examining._check_snapshots(header, image, Repairs.NONE)
    assert sum(taken) < 2 * len(table)


@pytest.mark.parametrize("by", ["check", "opening", "qemu-img"])
def test_version_2_that_was_marked_meanwhile(tmp_path: Path, daemon: Any, by: str) -> None:
    """A snapshot command that was cut off leaves an image of version 3; whoever repairs it reads the same."""
    image = make(tmp_path, "old")
    expected = tmp_path / "expected.raw"
    assert run(tool("qemu-img"), "convert", "-O", "raw", image, expected).returncode == 0
    data = bytearray(image.read_bytes())
    header = parse_header(bytes(data[: 1 << 16]))
    marked = serialise_header(attrs.evolve(header, **marking(header)))
    assert len(marked) <= 512
    data[: len(marked)] = marked
    data[header.l1_offset] ^= 0x80
    image.write_bytes(data)
    assert theirs(image) == ours(image)
    assert theirs(image)[0] == 2
    if by == "check":
        assert run(*PROGRAM, "check", "-r", "all", image).returncode == 0
    elif by == "qemu-img":
        assert run(tool("qemu-img"), "check", "-q", "-r", "all", image).returncode == 0
    else:
        qmp = daemon().qmp()
        options = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(image)}}
        qmp.execute_raw("blockdev-add", options)
        (info,) = [each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "n"]
        assert info["image"]["format-specific"]["data"] == {
            "compat": "0.10",
            "compression-type": "zlib",
            "refcount-bits": 16,
        }
        qmp.execute("blockdev-del", node_name="n")
    assert parse_header(image.read_bytes()[: 1 << 16]).version == (3 if by == "qemu-img" else 2)
    assert theirs(image)[0] == 0
    assert run(tool("qemu-img"), "compare", "-f", "qcow2", "-F", "raw", image, expected).returncode == 0


def test_no_mark_where_it_could_be_torn() -> None:
    header = Header(version=2, header_length=72, refcount_table_clusters=1, backing_file=b"x" * 500)
    assert marking(header) == {}
    short = attrs.evolve(header, backing_file=b"x" * 300)
    marked = attrs.evolve(short, **marking(short))
    again = parse_header(serialise_header(marked).ljust(1 << 16, b"\0"))
    assert (again.version, again.content_version) == (3, 2)
    assert attrs.evolve(again, **unmarking(again)) == short
