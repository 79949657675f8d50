"""LUKS volumes with the programs that have them: qemu-img, qemu-io, cryptsetup and the reference daemon."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdError, NbdReader
from qcow2_images import find, run_patiently

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

Start = Callable[..., RunningDaemon]
Volume = tuple[Qmp, Path]

SIZE = 640 << 10
SECRETS = {"s": "pw", "t": "other", "u": "third", "e": ""}
FAST = {"iter-time": 10}

# What the reference can make: cipher-alg, cipher-mode, ivgen-alg, ivgen-hash-alg, hash-alg.
COMBINATIONS: list[dict[str, str]] = [
    {},
    *({"hash-alg": name} for name in ("md5", "sha1", "sha224", "sha384", "sha512", "ripemd160", "sm3")),
    {"cipher-alg": "aes-128"},
    {"cipher-alg": "aes-192", "ivgen-alg": "plain"},
    {"ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
    {"cipher-mode": "cbc"},
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain"},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv"},
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
    {"cipher-mode": "ctr", "ivgen-alg": "essiv"},
    {"cipher-alg": "aes-128", "cipher-mode": "ctr"},
    {"cipher-mode": "ecb"},
    {"cipher-alg": "cast5-128", "cipher-mode": "cbc"},
    {"cipher-alg": "cast5-128", "cipher-mode": "ctr", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
    {"cipher-alg": "sm4", "cipher-mode": "ecb"},
]


def with_secrets(daemon: Start, *arguments: str, **options: Any) -> RunningDaemon:
    objects = [word for name, data in SECRETS.items() for word in ("--object", f"secret,id={name},data={data}")]
    return daemon(*objects, "--nbd-server", "addr.type=unix,addr.path=nbd.sock", *arguments, **options)


def run_tool(name: str, *arguments: str | Path, secret: str = "pw") -> str:
    done = run_patiently(find(name), *arguments)
    assert done.returncode == 0, f"{name} {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
    assert "failed" not in done.stdout + done.stderr
    return done.stdout


DATA = random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Volumes of the reference's that hold ``DATA``: it takes seconds to measure how fast it hashes."""
    place = tmp_path_factory.mktemp("theirs")
    (place / "raw").write_bytes(DATA)
    kinds = {"xts": "", "essiv": ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv"}
    words = ("convert", "-q", "-f", "raw", "-O", "luks", "--object", "secret,id=s,data=pw")
    for kind, more in kinds.items():
        run_tool("qemu-img", *words, "-o", f"key-secret=s,iter-time=10{more}", place / "raw", place / kind)
    return {kind: (place / kind).read_bytes() for kind in kinds}


def image_options(path: Path, **more: str) -> str:
    return ",".join(
        ["driver=luks", "key-secret=s", f"file.filename={path}", *(f"{k}={v}" for k, v in more.items())]
    )


def content_of(path: Path, out: Path, secret: str = "pw", **more: str) -> bytes:
    """What the reference finds in a volume."""
    run_tool(
        *("qemu-img", "convert", "-q", "--object", f"secret,id=s,data={secret}", "--image-opts", "-O", "raw"),
        *(image_options(path, **more), out),
    )
    return out.read_bytes()


def create(qmp: Qmp, **options: Any) -> str | None:
    """Create an image; the job's error."""
    qmp.execute("blockdev-create", job_id="j", options=options)
    return qmp.finish_job("j")


def amend(qmp: Qmp, *, force: bool = False, **options: Any) -> str | None:
    """Amend the node l; the job's error."""
    wire = {name.replace("_", "-"): value for name, value in options.items()}
    qmp.execute("x-blockdev-amend", job_id="j", node_name="l", force=force, options={"driver": "luks", **wire})
    return qmp.finish_job("j")


def add(qmp: Qmp, path: Path | str, **options: Any) -> None:
    """Open ``path`` as the node l on the node f."""
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(path))
    qmp.execute("blockdev-add", **{"driver": "luks", "node_name": "l", "file": "f", "key_secret": "s", **options})


def remove(qmp: Qmp) -> None:
    qmp.execute("blockdev-del", node_name="l")
    qmp.execute("blockdev-del", node_name="f")


def slots(qmp: Qmp) -> list[int]:
    """The active key slots."""
    nodes = qmp.execute("query-named-block-nodes")
    (image,) = [node["image"] for node in nodes if node["node-name"] == "l"]
    return [index for index, slot in enumerate(image["format-specific"]["data"]["slots"]) if slot["active"]]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon for all tests that leave it as it was."""
    from conftest import MONITOR

    place = tmp_path_factory.mktemp("luks")
    objects = [word for name, data in SECRETS.items() for word in ("--object", f"secret,id={name},data={data}")]
    running = RunningDaemon(place, [*objects, *MONITOR, "--nbd-server", "addr.type=unix,addr.path=nbd.sock"])
    try:
        running.wait_ready()
        yield running.qmp(), place
    finally:
        running.finish()


def put_content(path: Path, raw: Path) -> None:
    """Let the reference write the bytes of ``raw`` into a volume."""
    target = image_options(path)
    run_tool(
        "qemu-img", "convert", "-q", "-n", "--object", "secret,id=s,data=pw", "--target-image-opts", raw, target
    )


@contextmanager
def exported(qmp: Qmp, place: Path, *, writable: bool = False) -> Iterator[NbdReader]:
    """The node l as seen by a client."""
    qmp.execute("block-export-add", type="nbd", id="e", node_name="l", name="disk", writable=writable)
    try:
        with NbdReader(place / "nbd.sock", "disk") as client:
            yield client
    finally:
        qmp.execute("block-export-del", id="e", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")


@pytest.mark.parametrize("kind", ["xts", "essiv"])
def test_volume_of_the_reference_is_read(volume: Volume, theirs: dict[str, bytes], kind: str) -> None:
    qmp, place = volume
    (place / kind).write_bytes(theirs[kind])
    add(qmp, place / kind)
    with exported(qmp, place) as client:
        assert client.size == SIZE
        assert client.read(0, SIZE) == DATA
    remove(qmp)


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(options.values()) or "default")
def test_volume_is_read_and_written_by_both(volume: Volume, tmp_path: Path, options: dict[str, str]) -> None:
    """Made here; what one writes the other reads."""
    qmp, place = volume
    image, raw = tmp_path / "image", tmp_path / "raw"
    image.touch()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    assert (
        create(qmp, **{"driver": "luks", "file": "f", "size": SIZE, "key-secret": "s", **FAST, **options}) is None
    )
    qmp.execute("blockdev-del", node_name="f")
    add(qmp, image)
    with exported(qmp, place, writable=True) as client:
        for start in range(0, SIZE, 100_000):
            client.write(start, DATA[start : start + 100_000])
    remove(qmp)
    assert content_of(image, tmp_path / "out") == DATA
    raw.write_bytes(DATA[::-1])
    put_content(image, raw)
    add(qmp, image)
    with exported(qmp, place) as client:
        assert client.read(0, SIZE) == DATA[::-1]
    remove(qmp)


def test_detached_header_both_ways(volume: Volume, tmp_path: Path) -> None:
    qmp, place = volume
    for name in ("h", "d"):
        (tmp_path / name).touch()
    for name in ("h", "d"):
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
    assert create(qmp, driver="luks", file="d", header="h", size=SIZE, **{"key-secret": "s"}, **FAST) is None
    assert ((tmp_path / "d").stat().st_size, (tmp_path / "h").stat().st_size) == (SIZE, 2068480)
    qmp.execute("blockdev-add", driver="luks", node_name="l", file="d", header="h", key_secret="s")
    (info,) = [node for node in qmp.execute("query-named-block-nodes") if node["node-name"] == "l"]
    specific = info["image"]["format-specific"]["data"]
    assert (specific["detached-header"], specific["payload-offset"]) == (True, 0)
    assert json.loads(info["file"].removeprefix("json:")) == {
        "driver": "luks",
        "key-secret": "s",
        "file": {"driver": "file", "filename": str(tmp_path / "d")},
        "header": {"driver": "file", "filename": str(tmp_path / "h")},
    }
    with exported(qmp, place, writable=True) as client:
        client.write(0, DATA)
        # The reference dies of this one.
        assert amend(qmp, state="active", new_secret="t", iter_time=10) is None
    assert slots(qmp) == [0, 1]
    qmp.execute("blockdev-del", node_name="l")
    # A node that is only read, and readers of its data, do not keep the header from being changed.
    qmp.execute("blockdev-add", driver="luks", node_name="l", file="d", header="h", key_secret="s", read_only=True)
    qmp.execute("block-export-add", type="nbd", id="d", node_name="d", name="data")
    assert amend(qmp, state="inactive", keyslot=0) is None
    assert slots(qmp) == [1]
    assert amend(qmp, state="active", new_secret="s", secret="t", iter_time=10) is None
    qmp.execute("block-export-add", type="nbd", id="h", node_name="h", name="header")
    asked = {"job_id": "j", "node_name": "l", "options": {"driver": "luks", "state": "inactive", "keyslot": 1}}
    assert qmp.refusal("x-blockdev-amend", **asked).startswith("Permission conflict on node 'h'")
    for name in ("d", "h"):
        qmp.execute("block-export-del", id=name)
        qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data, name=name: data["id"] == name)
    qmp.execute("blockdev-del", node_name="l")
    for secret in ("pw", "other"):
        more = {"header.driver": "file", "header.filename": str(tmp_path / "h")}
        assert content_of(tmp_path / "d", tmp_path / "out", secret, **more) == DATA
    for file, text in (("h", "LUKS payload is overlapping with the header"), ("d", "Volume is not in LUKS format")):
        assert qmp.refusal("blockdev-add", driver="luks", node_name="x", file=file, key_secret="s") == text
    for name in ("h", "d"):
        qmp.execute("blockdev-del", node_name=name)


@pytest.mark.parametrize("start", [512, 4096])
def test_detached_data_begins_where_the_header_says(volume: Volume, tmp_path: Path, start: int) -> None:
    """Within what would be the header's own place, too: that is another file."""
    qmp, place = volume
    for name in ("h", "d"):
        (tmp_path / name).touch()
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
    assert create(qmp, driver="luks", file="d", header="h", size=SIZE, **{"key-secret": "s"}, **FAST) is None
    qmp.execute("blockdev-add", driver="luks", node_name="l", file="d", header="h", key_secret="s")
    with exported(qmp, place, writable=True) as client:
        client.write(0, DATA)
    for name in ("l", "h", "d"):
        qmp.execute("blockdev-del", node_name=name)
    header = (tmp_path / "h").read_bytes()
    (tmp_path / "h").write_bytes(header[:104] + (start // 512).to_bytes(4, "big") + header[108:])
    (tmp_path / "d").write_bytes(bytes(start) + (tmp_path / "d").read_bytes())
    for name in ("h", "d"):
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
    qmp.execute("blockdev-add", driver="luks", node_name="l", file="d", header="h", key_secret="s")
    with exported(qmp, place) as client:
        assert client.read(0, SIZE) == DATA
    for name in ("l", "h", "d"):
        qmp.execute("blockdev-del", node_name=name)
    more = {"header.driver": "file", "header.filename": str(tmp_path / "h")}
    assert content_of(tmp_path / "d", tmp_path / "out", **more) == DATA


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"key-secret": None}, "Parameter 'key-secret' is required for cipher"),
        ({"key-secret": "zz"}, "No secret with id 'zz'"),
        ({"file": None}, "Either the parameter 'header' or 'file' must be specified"),
        (
            {"file": None, "header": "f", "preallocation": "full"},
            "Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk",
        ),
        ({"size": -1}, "The requested file size is too large"),
        ({"size": (1 << 63) - 1}, "The requested file size is too large"),
        ({"size": 1 << 62}, "The requested file size is too large"),
        ({"cipher-alg": "des"}, "Algorithm 'des' not supported"),
        ({"cipher-alg": "3des"}, "Algorithm '3des' not supported"),
        ({"cipher-alg": "serpent-128"}, "Algorithm 'serpent-128' not supported"),
        ({"cipher-alg": "twofish-192"}, "Algorithm 'twofish-192' not supported"),
        ({"cipher-alg": "cast5-128"}, "Unsupported cipher mode xts"),
        ({"cipher-alg": "cast5-128", "ivgen-alg": "essiv"}, "Cipher cast5-128 not supported with essiv"),
        (
            {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"},
            "No AES cipher with key size 20 available",
        ),
        (
            {"cipher-alg": "cast5-128", "cipher-mode": "cbc", "ivgen-alg": "essiv"},
            "Cipher cast5-128 not supported with essiv",
        ),
    ],
    ids=str,
)
def test_creation_is_refused_in_the_references_words(volume: Volume, options: dict[str, Any], error: str) -> None:
    qmp, place = volume
    (place / "new").touch()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(place / "new"))
    wanted = {"driver": "luks", "file": "f", "size": SIZE, "key-secret": "s", **FAST, **options}
    assert create(qmp, **{key: value for key, value in wanted.items() if value is not None}) == error
    qmp.execute("blockdev-del", node_name="f")
    assert not (place / "new").stat().st_size, "nothing is written before everything is known"


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_preallocation(volume: Volume, preallocation: str) -> None:
    qmp, place = volume
    image = place / preallocation
    # What stood there; it is cut off where no space has to be taken.
    image.write_bytes(b"x" * (1 << 20 if preallocation in ("falloc", "full") else 8 << 20))
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    options = {"size": SIZE, "key-secret": "s", "preallocation": preallocation, "cipher-alg": "aes-128", **FAST}
    assert create(qmp, driver="luks", file="f", **options) is None
    qmp.execute("blockdev-del", node_name="f")
    assert image.stat().st_size == 2056 * 512 + SIZE
    add(qmp, image)
    remove(qmp)
    fresh = place / f"{preallocation}-fresh"
    fresh.touch()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(fresh))
    assert create(qmp, driver="luks", file="f", **options) is None
    qmp.execute("blockdev-del", node_name="f")
    is_allocated = fresh.stat().st_blocks * 512 >= SIZE
    assert is_allocated == (preallocation in ("falloc", "full"))


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_preallocation_takes_space_for_what_is_new(volume: Volume, tmp_path: Path, preallocation: str) -> None:
    """Data beside a detached header is there already, maybe; and there is nothing to take where a file shrinks."""
    qmp, _place = volume
    options = {"driver": "luks", "key-secret": "s", "preallocation": preallocation, **FAST}
    data, header = tmp_path / "d", tmp_path / "h"
    data.write_bytes(b"x" * 4096)
    header.touch()
    for name, path in (("d", data), ("h", header)):
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(path))
    text = create(qmp, file="d", header="h", size=512, **options)
    assert (text, header.stat().st_size) == ("Operation not supported", 0)
    assert create(qmp, file="d", header="h", size=SIZE, **options) is None
    assert data.read_bytes() == b"x" * 4096 + bytes(SIZE - 4096)
    assert data.stat().st_blocks * 512 >= SIZE
    qmp.execute("blockdev-del", node_name="d")
    data.write_bytes(b"x" * 4 * SIZE)
    qmp.execute("blockdev-add", driver="file", node_name="d", filename=str(data))
    assert create(qmp, file="d", size=512, **options) == "Cannot use preallocation for shrinking files"
    assert data.read_bytes()[:4096] == b"x" * 4096
    for name in ("d", "h"):
        qmp.execute("blockdev-del", node_name=name)


def test_key_slots(volume: Volume, theirs: dict[str, bytes], tmp_path: Path) -> None:
    """Added, erased, refused: step by step as the reference answered (11.1)."""
    qmp, _place = volume
    image = tmp_path / "image"
    image.write_bytes(theirs["xts"])
    add(qmp, image)
    missing = "irreversibly - refusing operation"
    quick = {"iter_time": 10}
    steps: list[tuple[dict[str, Any], str | None, list[int]]] = [
        ({"state": "active"}, "'new-secret' is required to activate a keyslot", [0]),
        ({"state": "active", "new_secret": "zz"}, "No secret with id 'zz'", [0]),
        (
            {"state": "active", "new_secret": "zz", "old_secret": "s"},
            "'old-secret' must not be given when activating keyslots",
            [0],
        ),
        (
            {"state": "inactive", "keyslot": 0},
            f"Attempt to erase the only active keyslot 0 which will erase all the data in the image {missing}",
            [0],
        ),
        (
            {"state": "inactive", "old_secret": "s"},
            "All the active keyslots match the (old) password that was given and erasing them will erase all the "
            f"data in the image {missing}",
            [0],
        ),
        ({"state": "active", "new_secret": "t", **quick}, None, [0, 1]),
        ({"state": "active", "new_secret": "t", **quick}, None, [0, 1, 2]),
        (
            {"state": "active", "new_secret": "zz", "keyslot": 1},
            "Refusing to overwrite active keyslot 1 - please erase it first",
            [0, 1, 2],
        ),
        ({"state": "active", "new_secret": "u", "keyslot": 1, "force": True, **quick}, None, [0, 1, 2]),
        (
            {"state": "active", "new_secret": "u", "keyslot": 8},
            "Invalid keyslot 8 specified, must be between 0 and 7",
            [0, 1, 2],
        ),
        (
            {"state": "active", "new_secret": "u", "keyslot": -1},
            "Invalid keyslot 4294967295 specified, must be between 0 and 7",
            [0, 1, 2],
        ),
        (
            {"state": "active", "new_secret": "u", "secret": "e"},
            "Invalid password, cannot unlock any keyslot",
            [0, 1, 2],
        ),
        ({"state": "active", "new_secret": "e", "secret": "u", "keyslot": 7, **quick}, None, [0, 1, 2, 7]),
        (
            {"state": "inactive"},
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must "
            "be given",
            [0, 1, 2, 7],
        ),
        ({"state": "inactive", "keyslot": 6}, "Given keyslot 6 is already erased (inactive) ", [0, 1, 2, 7]),
        ({"state": "inactive", "keyslot": 6, "force": True}, None, [0, 1, 2, 7]),
        (
            {"state": "inactive", "keyslot": -1},
            "Invalid keyslot -1 specified, must be between 0 and 7",
            [0, 1, 2, 7],
        ),
        (
            {"state": "inactive", "keyslot": 2, "old_secret": "s"},
            "Given keyslot 2 doesn't contain the given old password for erase operation",
            [0, 1, 2, 7],
        ),
        *(
            (
                {"state": "inactive", "keyslot": 2, name: value},
                f"'{name.replace('_', '-')}' must not be given when erasing keyslots",
                [0, 1, 2, 7],
            )
            for name, value in (("new_secret", "t"), ("iter_time", 3), ("secret", "s"))
        ),
        ({"state": "inactive", "keyslot": 2, "old_secret": "t"}, None, [0, 1, 7]),
        (
            {"state": "inactive", "old_secret": "t"},
            "No keyslots match given (old) password for erase operation",
            [0, 1, 7],
        ),
        ({"state": "inactive", "keyslot": 0}, None, [1, 7]),
        # The node was opened with a password that opens nothing any more.
        ({"state": "active", "new_secret": "t"}, "Invalid password, cannot unlock any keyslot", [1, 7]),
        ({"state": "inactive", "old_secret": "u"}, None, [7]),
        ({"state": "inactive", "old_secret": "e", "force": True}, None, []),
    ]
    for options, error, active in steps:
        asked = dict(options)
        assert amend(qmp, force=asked.pop("force", False), **asked) == error, options
        assert slots(qmp) == active, options
        if active:
            password = next(SECRETS[name] for name, slot in (("s", 0), ("u", 1), ("e", 7)) if slot in active)
            run_tool(
                *("qemu-io", "--object", f"secret,id=s,data={password}", "-r", "-c", "read 0 4096"),
                *("--image-opts", image_options(image)),
            )
    remove(qmp)
    # Nothing of the key material is left.
    assert image.read_bytes().count(b"LUKS\xba\xbe") == 1
    text = qmp.refusal
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    for secret in ("s", "t", "u", "e"):
        assert text("blockdev-add", driver="luks", node_name="l", file="f", key_secret=secret) == (
            "Invalid password, cannot unlock any keyslot"
        )
    qmp.execute("blockdev-del", node_name="f")


def test_amending_needs_the_header_for_itself(volume: Volume, theirs: dict[str, bytes], tmp_path: Path) -> None:
    """Readers of the volume do not matter, nor that it is read-only; readers of the file do."""
    qmp, place = volume
    image = tmp_path / "image"
    image.write_bytes(theirs["xts"])
    add(qmp, image, read_only=True)
    qmp.execute("block-export-add", type="nbd", id="e", node_name="l", name="disk")
    with NbdReader(place / "nbd.sock", "disk") as client:
        assert amend(qmp, state="active", new_secret="t", iter_time=0) is None
        assert client.read(0, SIZE) == DATA
    asked = {"job_id": "j", "node_name": "l"}
    options = {"driver": "luks", "state": "active", "new-secret": "t", "iter-time": 0}
    qmp.execute("block-export-add", type="nbd", id="f", node_name="f", name="file")
    assert qmp.refusal("x-blockdev-amend", **asked, options=options) == (
        "Permission conflict on node 'f': permissions 'consistent read' are both required by an unnamed block "
        "device (uses node 'f' as 'root' child) and unshared by node 'l' (uses node 'f' as 'file' child)."
    )
    assert qmp.execute("query-jobs") == []
    qmp.execute("block-export-del", id="f")
    qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == "f")
    command = [find("qemu-io"), "-r", "-f", "raw", "-U", image]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        print("read 0 512", file=other.stdin, flush=True)
        assert "read 512/512" in other.stdout.readline()
        assert qmp.refusal("x-blockdev-amend", **asked, options=options) == (
            'Failed to get shared "consistent read" lock'
        )
        other.stdin.close()
    assert amend(qmp, state="active", new_secret="t", iter_time=0) is None
    assert slots(qmp) == [0, 1, 2]
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == "e")
    remove(qmp)
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image), read_only=True)
    qmp.execute("blockdev-add", driver="luks", node_name="l", file="f", key_secret="s", read_only=True)
    assert qmp.refusal("x-blockdev-amend", **asked, options=options) == "Block node is read-only"
    remove(qmp)


def test_eight_slots_are_all_there_are(volume: Volume, theirs: dict[str, bytes], tmp_path: Path) -> None:
    qmp, _place = volume
    image = tmp_path / "image"
    image.write_bytes(theirs["essiv"])
    add(qmp, image)
    for _ in range(7):
        assert amend(qmp, state="active", new_secret="t", iter_time=0) is None
    assert amend(qmp, state="active", new_secret="t") == "Can't add a keyslot - all keyslots are in use"
    assert slots(qmp) == list(range(8))
    remove(qmp)
    assert content_of(image, tmp_path / "out", "other") == DATA


def test_daemon_answers_while_keys_are_derived(volume: Volume, tmp_path: Path) -> None:
    """The reference blocks for as long as that takes."""
    qmp, _place = volume
    image = tmp_path / "image"
    image.touch()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    options = {"driver": "luks", "file": "f", "size": SIZE, "key-secret": "s", "iter-time": 400}
    qmp.execute("blockdev-create", job_id="j", options=options)
    (job,) = qmp.execute("query-jobs")
    assert job["status"] == "running"
    assert qmp.finish_job("j") is None
    qmp.execute("blockdev-del", node_name="f")


def test_hostile_counts_are_refused_at_once(volume: Volume, theirs: dict[str, bytes], tmp_path: Path) -> None:
    """2**32 - 1 rounds would take the reference an hour, in which it does nothing else."""
    qmp, _place = volume
    image = tmp_path / "image"
    image.write_bytes(theirs["xts"])
    good = image.read_bytes()
    for place in (164, 212):
        image.write_bytes(good[:place] + b"\xff\xff\xff\xff" + good[place + 4 :])
        qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
        text = qmp.refusal("blockdev-add", driver="luks", node_name="l", file="f", key_secret="s")
        assert text.startswith("PBKDF iterations ")
        qmp.execute("blockdev-del", node_name="f")


@pytest.mark.parametrize(
    ("cipher", "bits"), [("aes-xts-plain64", "512"), ("aes-cbc-essiv:sha256", "256"), ("aes-cbc-plain64", "192")]
)
def test_cryptsetup_both_ways(volume: Volume, tmp_path: Path, cipher: str, bits: str) -> None:
    """The 192-bit key's material is no whole number of sectors: the reference dies of that one."""
    qmp, _place = volume
    program = find("cryptsetup")
    password = tmp_path / "password"
    password.write_bytes(b"pw")

    def cryptsetup(*words: str | Path) -> str:
        command = [program, *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )
        assert not done.returncode, done.stderr
        return done.stdout

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with theirs.open("wb") as file:
        file.truncate(8 << 20)
    cryptsetup(
        *("luksFormat", "-q", "--type", "luks1", "--cipher", cipher, "--key-size", bits),
        *("--pbkdf-force-iterations", "1000", "--key-file", password, theirs),
    )
    add(qmp, theirs)
    assert amend(qmp, state="active", new_secret="t", iter_time=0, keyslot=5) is None
    remove(qmp)
    cryptsetup("open", "--test-passphrase", "--key-file", password, theirs)
    password.write_bytes(b"other")
    cryptsetup("open", "--test-passphrase", "--key-slot", "5", "--key-file", password, theirs)

    ours.touch()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(ours))
    mode, generator = cipher.split("-")[1:]
    generator, _colon, iv_hash = generator.partition(":")
    options = {
        "cipher-alg": f"aes-{int(bits) // (2 if mode == 'xts' else 1)}",
        "cipher-mode": mode,
        "ivgen-alg": generator,
        **({"ivgen-hash-alg": iv_hash} if iv_hash else {}),
    }
    assert create(qmp, driver="luks", file="f", size=SIZE, **{"key-secret": "t"}, **FAST, **options) is None
    qmp.execute("blockdev-del", node_name="f")
    cryptsetup("open", "--test-passphrase", "--key-file", password, ours)
    assert f"MK bits:       \t{bits}" in cryptsetup("luksDump", ours)


@pytest.mark.parametrize("cache", ["", ",cache.direct=on"])
def test_qemu_io_against_a_model(daemon: Start, theirs: dict[str, bytes], tmp_path: Path, cache: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(theirs["xts"])
    rng = random.Random(3)
    model = bytearray(DATA)
    running = with_secrets(
        daemon,
        *("--blockdev", f"driver=file,node-name=f,filename={image}{cache}"),
        *("--blockdev", "driver=luks,node-name=l,file=f,key-secret=s,detect-zeroes=on"),
        *("--export", "type=nbd,id=e,node-name=l,name=disk,writable=on"),
    )
    commands: list[str] = []
    for _ in range(100):
        offset, length = rng.randrange(SIZE - 70_000), rng.randrange(1, 70_000)
        kind = rng.choice(["write -P {0}", "write -f -P {0}", "write -z", "write -z -u", "discard", "read", "read"])
        pattern = 0 if "-z" in kind else rng.randrange(256)
        if kind == "read":
            commands += ["-c", f"read {offset} {length}"]
            continue
        if kind != "discard":
            model[offset : offset + length] = bytes([pattern]) * length
        commands += ["-c", f"{kind.format(pattern)} {offset} {length}"]
    run_tool("qemu-io", "-f", "raw", *commands, "-c", "flush", f"nbd+unix:///disk?socket={tmp_path}/nbd.sock")
    with NbdReader(tmp_path / "nbd.sock", "disk") as client:
        assert client.read(0, SIZE) == model
        with pytest.raises(NbdError):
            client.read(SIZE, 512)
    assert running.terminate() == 0
    assert content_of(image, tmp_path / "out") == model


def test_missing_extra_is_named(daemon: Start, theirs: dict[str, bytes], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(theirs["xts"])
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "numpy.py").write_text("raise ImportError('no numpy here')\n")
    qmp = with_secrets(daemon, env={"PYTHONPATH": str(tmp_path / "hidden")}).qmp()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    needed = "Encryption needs the extra qsd[crypto], which is not installed"
    assert qmp.refusal("blockdev-add", driver="luks", node_name="l", file="f", key_secret="s") == needed
    options = {"driver": "luks", "file": "f", "size": SIZE, "key-secret": "s"}
    before = image.read_bytes()
    assert create(qmp, **options) == needed
    assert image.read_bytes() == before
