"""Encrypted qcow2 images: made here and there, filled there, written here, and read there again."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from disk_model import Model
from harness import Qmp, RunningDaemon
from libnbd_model import run_model
from nbd_reader import NbdError, NbdReader
from qcow2_images import content, find, run_patiently, write_raw

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

Start = Callable[..., RunningDaemon]

SIZE = 2 << 20
SECRETS = {"s": "pw", "t": "other", "e": ""}
OBJECTS = [word for name, data in SECRETS.items() for word in ("--object", f"secret,id={name},data={data}")]
LUKS = {"format": "luks", "key-secret": "s", "iter-time": 10}
AES = {"format": "qcow", "key-secret": "s"}


def tool(name: str, *words: str | Path) -> str:
    """Run one of the reference's tools with the secrets; its output."""
    # qemu-img takes objects behind its command, qemu-io in front of all.
    first = 1 if name == "qemu-img" else 0
    command = [find(name), *words[:first], *OBJECTS, *map(str, words[first:])]
    done = run_patiently(*command)
    assert done.returncode == 0, f"{name} {' '.join(map(str, words))}: {done.stdout}{done.stderr}"
    assert "failed" not in done.stdout + done.stderr
    return done.stdout


def image_options(path: Path, kind: str, secret: str = "s") -> str:
    return f"driver=qcow2,file.filename={path},encrypt.format={kind},encrypt.key-secret={secret}"


def node_options(path: Path, kind: str, secret: str = "s", node: str = "n") -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "node-name": node,
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(path)},
        "encrypt": {"format": kind, "key-secret": secret},
    }


@attrs.frozen
class Variant:
    """``layers``: images over one another; ``holds_snapshot``: of what it is filled with."""

    encrypt: dict[str, Any]
    options: dict[str, Any] = attrs.field(factory=dict)
    layers: int = 1
    holds_snapshot: bool = False
    has_data_file: bool = False

    @property
    def kind(self) -> str:
        return "luks" if self.encrypt["format"] == "luks" else "aes"


VARIANTS = {
    "luks": Variant(LUKS),
    "luks-512": Variant(LUKS, {"cluster-size": 512}),
    "luks-2M": Variant(LUKS, {"cluster-size": 2 << 20}),
    "luks-extended": Variant(LUKS, {"extended-l2": True, "cluster-size": 16384}),
    "luks-v2": Variant(LUKS, {"version": "v2"}),
    "luks-cbc": Variant({**LUKS, "cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv"}),
    # Not AES: encrypted on a thread.
    "luks-slow": Variant({**LUKS, "cipher-alg": "cast5-128", "cipher-mode": "cbc"}),
    "luks-data-file": Variant(LUKS, has_data_file=True),
    "luks-raw-data-file": Variant(LUKS, {"data-file-raw": True}, has_data_file=True),
    "luks-chain": Variant(LUKS, layers=3),
    "luks-snapshot": Variant(LUKS, holds_snapshot=True),
    "aes": Variant(AES),
    "aes-extended": Variant(AES, {"extended-l2": True, "cluster-size": 16384}),
    "aes-chain": Variant(AES, layers=2),
    "aes-snapshot": Variant(AES, holds_snapshot=True),
}


def create(qmp: Qmp, **options: Any) -> str | None:
    """Run blockdev-create of qcow2 into the node f; the job's error."""
    wanted = {"driver": "qcow2", "file": "f", "size": SIZE, **options}
    qmp.execute_raw("blockdev-create", {"job-id": "j", "options": wanted})
    return qmp.finish_job("j")


def amend(qmp: Qmp, *, force: bool = False, **encrypt: Any) -> str | None:
    """Run x-blockdev-amend of the node n; the job's error."""
    wire = {name.replace("_", "-"): value for name, value in encrypt.items()}
    options = {"driver": "qcow2", "encrypt": {"format": "luks", **wire}}
    qmp.execute("x-blockdev-amend", job_id="j", node_name="n", force=force, options=options)
    return qmp.finish_job("j")


def make(qmp: Qmp, place: Path, variant: Variant, data: bytes) -> Path:
    """Create the image here; let the reference fill the lowest layer with ``data``."""
    source = write_raw(place, "source.raw", data)
    below: Path | None = None
    image = place
    for number in range(variant.layers):
        image = place / f"{number}.qcow2"
        image.touch()
        qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
        options = {"encrypt": variant.encrypt, **variant.options}
        if variant.has_data_file:
            (place / "data").touch()
            qmp.execute("blockdev-add", driver="file", node_name="d", filename=str(place / "data"))
            options["data-file"] = "d"
        if below is not None:
            name = {"driver": "qcow2", "encrypt.key-secret": "s", "file.filename": str(below)}
            options |= {"backing-file": f"json:{json.dumps(name)}", "backing-fmt": "qcow2"}
        assert create(qmp, **options) is None
        for node in ("f", "d") if variant.has_data_file else ("f",):
            qmp.execute("blockdev-del", node_name=node)
        if below is None:
            target = image_options(image, variant.kind)
            tool("qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", source, target)
        below = image
    if variant.holds_snapshot:
        tool("qemu-img", "snapshot", "-c", "one", "--image-opts", image_options(image, variant.kind))
    return image


def assert_holds(place: Path, image: Path, kind: str, data: bytes, secret: str = "s") -> None:
    """The reference finds nothing wrong with the image, and these bytes in it."""
    expected = write_raw(place, "expected.raw", data)
    options = image_options(image, kind, secret)
    tool("qemu-img", "check", "-q", "--image-opts", options)
    tool("qemu-img", "compare", "-q", "--image-opts", options, f"driver=raw,file.filename={expected}")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Qmp, Path]]:
    """A daemon for all tests that leave it as it was."""
    from conftest import MONITOR

    place = tmp_path_factory.mktemp("encrypted")
    running = RunningDaemon(place, [*OBJECTS, "--nbd-server", "addr.type=unix,addr.path=nbd.sock", *MONITOR])
    running.wait_ready()
    yield running.qmp(), place
    running.finish()


@pytest.mark.parametrize("name", VARIANTS)
def test_random_operations(house: tuple[Qmp, Path], tmp_path: Path, name: str) -> None:
    qmp, place = house
    variant = VARIANTS[name]
    data = content(7, SIZE)
    image = make(qmp, tmp_path, variant, data)
    model = Model(data, len(name))
    qmp.execute_raw("blockdev-add", node_options(image, variant.kind))
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    with NbdReader(place / "nbd.sock", "d") as client:
        assert client.read(0, SIZE) == data
        for _ in range(25):
            model.step(client)
        assert client.read(0, SIZE) == model.data
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_holds(tmp_path, image, variant.kind, bytes(model.data))
    if variant.holds_snapshot:
        tool("qemu-img", "snapshot", "-a", "one", "--image-opts", image_options(image, variant.kind))
        assert_holds(tmp_path, image, variant.kind, data)


@pytest.mark.parametrize("name", ["luks-extended", "luks-slow", "aes-chain"])
def test_many_requests_at_once(house: tuple[Qmp, Path], tmp_path: Path, name: str) -> None:
    """libnbd keeps sixteen in flight; what is slow to encrypt is on a thread meanwhile."""
    qmp, place = house
    data = content(11, SIZE)
    image = make(qmp, tmp_path, VARIANTS[name], data)
    qmp.execute_raw("blockdev-add", node_options(image, VARIANTS[name].kind))
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="disk", writable=True)
    (tmp_path / "nbd.sock").symlink_to(place / "nbd.sock")
    data = run_model(tmp_path, data, seed=len(name), depth=16, count=100)
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_holds(tmp_path, image, VARIANTS[name].kind, data)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Images of the reference's, a mebibyte each, empty."""
    place = tmp_path_factory.mktemp("theirs")
    options = {"luks": "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"}
    options["aes"] = "encrypt.format=aes,encrypt.key-secret=s"
    for kind, words in options.items():
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, place / kind, str(1 << 20))
    subprocess.run([find("qemu-img"), "create", "-q", "-f", "qcow2", place / "plain", "1M"], check=True, timeout=60)
    return {kind: (place / kind).read_bytes() for kind in ("luks", "aes", "plain")}


def node(qmp: Qmp, name: str = "n") -> dict[str, Any]:
    (found,) = [each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == name]
    facts: dict[str, Any] = found
    return facts


def test_facts_are_those_of_the_reference(
    house: tuple[Qmp, Path], theirs: dict[str, bytes], tmp_path: Path
) -> None:
    qmp, _place = house
    for kind in ("luks", "aes"):
        image = tmp_path / kind
        image.write_bytes(theirs[kind])
        qmp.execute_raw("blockdev-add", node_options(image, kind))
        facts = node(qmp)
        info = json.loads(
            tool("qemu-img", "info", "-U", "--output=json", "--image-opts", image_options(image, kind))
        )
        assert facts["encrypted"]
        assert facts["image"]["encrypted"]
        assert facts["image"]["limits"]["request-alignment"] == 512
        assert facts["image"]["format-specific"]["data"]["encrypt"] == info["format-specific"]["data"]["encrypt"]
        assert json.loads(facts["file"].removeprefix("json:")) == json.loads(info["filename"].removeprefix("json:"))
        qmp.execute("blockdev-del", node_name="n")


MISSING = "Parameter 'encrypt.key-secret' is required for cipher"


@pytest.mark.parametrize(
    ("kind", "encrypt", "text"),
    [
        ("luks", None, MISSING),
        ("luks", {"format": "luks"}, MISSING),
        ("luks", {"format": "luks", "key-secret": "zz"}, "No secret with id 'zz'"),
        ("luks", {"format": "luks", "key-secret": "t"}, "Invalid password, cannot unlock any keyslot"),
        ("luks", {"format": "aes"}, "Header reported 'luks' encryption format but options specify 'aes'"),
        ("aes", None, MISSING),
        ("aes", {"format": "aes"}, MISSING),
        ("aes", {"format": "aes", "key-secret": "zz"}, "No secret with id 'zz'"),
        (
            "aes",
            {"format": "luks", "key-secret": "s"},
            "Header reported 'aes' encryption format but options specify 'luks'",
        ),
        ("plain", {"format": "luks"}, "No encryption in image header, but options specified format 'luks'"),
        ("plain", {"format": "aes"}, "No encryption in image header, but options specified format 'aes'"),
        ("plain", {"format": "qcow"}, "Parameter 'format' does not accept value 'qcow'"),
    ],
    ids=str,
)
def test_opening_is_refused_in_the_references_words(
    house: tuple[Qmp, Path],
    theirs: dict[str, bytes],
    tmp_path: Path,
    kind: str,
    encrypt: dict[str, Any] | None,
    text: str,
) -> None:
    qmp, _place = house
    (tmp_path / "i").write_bytes(theirs[kind])
    options = node_options(tmp_path / "i", kind) | {"encrypt": encrypt}
    answer = qmp.command("blockdev-add", {key: value for key, value in options.items() if value is not None})
    assert answer["error"]["desc"] == text


# Where the reference's images have what an edit changes.
EXTENSION, HEADER = 0x70, 0x40000
OUTSIDE = "Request for data outside of extension header"


@pytest.mark.parametrize(
    ("where", "data", "text"),
    [
        (72, "0000000000000002", "qcow2: Image is corrupt; cannot be opened read/write"),
        (72, "0000000000000004", "'data-file' is required for this image"),
        (EXTENSION, "12345678", "Missing CRYPTO header for crypt method 2"),
        (EXTENSION + 4, "00000008", "CRYPTO header extension size 8, but expected size 16"),
        (
            EXTENSION + 8,
            f"{HEADER + 1:016x}",
            f"Encryption header offset '{HEADER + 1}' is not a multiple of cluster size '65536'",
        ),
        (EXTENSION + 8, "0000000040000000", "Volume is not in LUKS format"),
        (EXTENSION + 8, "0000000000000000", "Volume is not in LUKS format"),
        (EXTENSION + 8, "7fffffffffff0000", "Could not read encryption header: Input/output error"),
        (EXTENSION + 8, "ffffffffffff0000", "Could not read encryption header: Input/output error"),
        (EXTENSION + 16, "0000000000000000", OUTSIDE),
        (EXTENSION + 16, f"{592:016x}", OUTSIDE),
        (EXTENSION + 16, f"{100_000:016x}", OUTSIDE),
        (HEADER, "00", "Volume is not in LUKS format"),
        (HEADER + 6, "0002", "LUKS version 2 is not supported"),
        (HEADER + 104, "00000000", "LUKS payload is overlapping with the header"),
        (HEADER + 104, "00000064", "Keyslot 0 is overlapping with the encrypted payload"),
        (HEADER + 212, "00000000", "Keyslot 0 iteration count is zero"),
        (HEADER + 248, "00001388", "Keyslot 0 is overlapping with the encrypted payload"),
        (HEADER + 296, "70000000", "Keyslot 1 is overlapping with the encrypted payload"),
        # The reference hashes for hours here, and does nothing else.
        (
            HEADER + 212,
            "ffffffff",
            "PBKDF iterations ",
        ),
    ],
)
def test_hostile_headers(
    house: tuple[Qmp, Path], theirs: dict[str, bytes], tmp_path: Path, where: int, data: str, text: str
) -> None:
    qmp, _place = house
    image = bytearray(theirs["luks"])
    image[where : where + len(data) // 2] = bytes.fromhex(data)
    (tmp_path / "i").write_bytes(image)
    answer = qmp.command("blockdev-add", node_options(tmp_path / "i", "luks"))
    assert answer["error"]["desc"].startswith(text)


def test_creation_is_refused_in_the_references_words(house: tuple[Qmp, Path], tmp_path: Path) -> None:
    qmp, _place = house
    (tmp_path / "f").write_bytes(b"kept")
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(tmp_path / "f"))
    steps: list[tuple[dict[str, Any], str]] = [
        ({"encrypt": {"format": "luks"}}, MISSING),
        ({"encrypt": {"format": "qcow"}}, MISSING),
        ({"encrypt": {**LUKS, "key-secret": "zz"}}, "No secret with id 'zz'"),
        ({"encrypt": {**AES, "key-secret": "zz"}}, "No secret with id 'zz'"),
        ({"encrypt": {"format": "luks"}, "size": 1000}, "Image size must be a multiple of 512 bytes"),
        ({"encrypt": {**LUKS, "cipher-alg": "des"}}, "Algorithm 'des' not supported"),
        ({"encrypt": {**LUKS, "cipher-alg": "cast5-128"}}, "Unsupported cipher mode xts"),
        (
            {"encrypt": {**LUKS, "cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"}},
            "No AES cipher with key size 20 available",
        ),
    ]
    for options, text in steps:
        assert create(qmp, **options) == text, options
    qmp.execute("blockdev-del", node_name="f")
    assert (tmp_path / "f").read_bytes() == b"kept"


def test_preallocated_images_are_sound(house: tuple[Qmp, Path], tmp_path: Path) -> None:
    qmp, place = house
    image = tmp_path / "f"
    image.touch()
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    assert create(qmp, encrypt=LUKS, preallocation="full") is None
    qmp.execute("blockdev-del", node_name="f")
    tool("qemu-img", "check", "-q", "--image-opts", image_options(image, "luks"))
    qmp.execute_raw("blockdev-add", node_options(image, "luks"))
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d")
    # What nobody has written is noise, and is not told to be zeroes.
    served = tool("qemu-img", "map", "--output=json", "-f", "raw", f"nbd+unix:///d?socket={place}/nbd.sock")
    theirs = tool("qemu-img", "map", "--output=json", "-U", "--image-opts", image_options(image, "luks"))
    for (whole,) in (json.loads(served), json.loads(theirs)):
        assert (whole["length"], whole["zero"], whole["data"]) == (SIZE, False, True)
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")


def active(qmp: Qmp) -> list[int]:
    """The active key slots."""
    slots = node(qmp)["image"]["format-specific"]["data"]["encrypt"]["slots"]
    return [index for index, slot in enumerate(slots) if slot["active"]]


def test_key_slots(house: tuple[Qmp, Path], theirs: dict[str, bytes], tmp_path: Path) -> None:
    """Passwords are changed while the image is in use; the reference opens it with what is left."""
    qmp, _place = house
    image = tmp_path / "i"
    image.write_bytes(theirs["luks"])
    qmp.execute_raw("blockdev-add", node_options(image, "luks"))
    qmp.execute("x-blockdev-amend", job_id="j", node_name="n", options={"driver": "qcow2"})
    assert qmp.finish_job("j") is None
    quick = {"iter_time": 0}
    assert amend(qmp, state="active") == "'new-secret' is required to activate a keyslot"
    assert amend(qmp, state="active", new_secret="zz") == "No secret with id 'zz'"
    assert amend(qmp, state="active", new_secret="t", **quick) is None
    assert amend(qmp, state="active", new_secret="e", keyslot=7, secret="t", **quick) is None
    assert active(qmp) == [0, 1, 7]
    assert amend(qmp, state="inactive", old_secret="s") is None
    assert amend(qmp, state="inactive", old_secret="s") == (
        "No keyslots match given (old) password for erase operation"
    )
    assert active(qmp) == [1, 7]
    options = {"driver": "qcow2", "encrypt": {"format": "qcow"}}
    qmp.execute("x-blockdev-amend", job_id="j", node_name="n", options=options)
    assert qmp.finish_job("j") == "Amend can't be used to change the qcow2 encryption format"
    qmp.execute("blockdev-del", node_name="n")
    data = bytes(1 << 20)
    for secret in ("t", "e"):
        assert_holds(tmp_path, image, "luks", data, secret)
    assert qmp.command("blockdev-add", node_options(image, "luks"))["error"]["desc"] == (
        "Invalid password, cannot unlock any keyslot"
    )
    # The reference dies of this one (11.1: an assertion about write permission).
    qmp.execute_raw("blockdev-add", node_options(image, "luks", "t") | {"read-only": True})
    options = {"driver": "qcow2", "encrypt": {"format": "luks", "state": "active", "new-secret": "s"}}
    refusal = qmp.refusal("x-blockdev-amend", job_id="j", node_name="n", options=options)
    assert refusal == "Block node is read-only"
    qmp.execute("blockdev-del", node_name="n")
    refusals = {
        "aes": "Only LUKS encryption options can be amended for qcow2 with blockdev-amend",
        "plain": "image is not encrypted, can't amend",
    }
    for kind, text in refusals.items():
        image.write_bytes(theirs[kind])
        wanted = node_options(image, kind)
        if kind == "plain":
            del wanted["encrypt"]
        qmp.execute_raw("blockdev-add", wanted)
        assert amend(qmp, state="active", new_secret="t") == text
        qmp.execute("blockdev-del", node_name="n")


def test_reopened_images_keep_their_key(house: tuple[Qmp, Path], theirs: dict[str, bytes], tmp_path: Path) -> None:
    qmp, place = house
    image = tmp_path / "i"
    for kind in ("luks", "aes"):
        image.write_bytes(theirs[kind])
        options = node_options(image, kind)
        qmp.execute_raw("blockdev-add", options)
        other = "aes" if kind == "luks" else "luks"
        steps: list[tuple[dict[str, Any] | None, str]] = [
            (None, "Option 'encrypt.format' cannot be reset to its default value"),
            ({"format": kind}, "Option 'encrypt.key-secret' cannot be reset to its default value"),
            ({"format": other}, f"Header reported '{kind}' encryption format but options specify '{other}'"),
            # What the new secret is, nobody asks.
            ({"format": kind, "key-secret": "t"}, ""),
        ]
        for encrypt, text in steps:
            wanted = {key: value for key, value in {**options, "encrypt": encrypt}.items() if value is not None}
            answer = qmp.command("blockdev-reopen", {"options": [wanted]})
            assert answer.get("error", {}).get("desc", "") == text, encrypt
        qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
        with NbdReader(place / "nbd.sock", "d") as client:
            client.write(1000, b"after all")
        qmp.execute("block-export-del", id="e")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", node_name="n")
        assert_holds(tmp_path, image, kind, bytes(1000) + b"after all" + bytes((1 << 20) - 1009))


@pytest.mark.parametrize("name", ["luks", "luks-raw-data-file", "aes-extended"])
def test_new_space_reads_as_zeroes(house: tuple[Qmp, Path], tmp_path: Path, name: str) -> None:
    """Also in a data file, where the reference shows what zero bytes decrypt to."""
    qmp, place = house
    data = content(9, SIZE)
    image = make(qmp, tmp_path, VARIANTS[name], data)
    qmp.execute_raw("blockdev-add", node_options(image, VARIANTS[name].kind))
    for size in (SIZE - 66_048, SIZE + 300_032):
        qmp.execute("block_resize", node_name="n", size=size)
        data = data[:size].ljust(size, b"\0")
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    with NbdReader(place / "nbd.sock", "d") as client:
        assert client.read(0, len(data)) == data
        client.write(SIZE + 1000, b"new")
        data = data[: SIZE + 1000] + b"new" + data[SIZE + 1003 :]
        assert client.read(0, len(data)) == data
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_holds(tmp_path, image, VARIANTS[name].kind, data)


def test_wrong_counts_do_not_cost_the_key(daemon: Start, theirs: dict[str, bytes], tmp_path: Path) -> None:
    """The clusters of the LUKS header are counted as free: what would be written there is refused."""
    image = bytearray(theirs["luks"])
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    first = HEADER // 65536
    image[block + 2 * first : block + 2 * first + 64] = bytes(64)
    (tmp_path / "i").write_bytes(image)
    running = daemon(*OBJECTS, "--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    running.expected_stderr.append("qcow2: Marking image as corrupt: Preventing invalid write on metadata")
    running.expected_stderr.append("flushing node n while closing: .* Input/output error")
    qmp = running.qmp()
    qmp.execute_raw("blockdev-add", node_options(tmp_path / "i", "luks"))
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    with NbdReader(tmp_path / "nbd.sock", "d") as client, pytest.raises(NbdError):
        client.write(0, b"x" * (1 << 20))
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert (tmp_path / "i").read_bytes()[HEADER : HEADER + 4096] == image[HEADER : HEADER + 4096]


def test_own_check_knows_the_encryption_header(theirs: dict[str, bytes], tmp_path: Path) -> None:
    """No password is needed: what is checked is not encrypted."""
    for kind in ("luks", "aes"):
        (tmp_path / kind).write_bytes(theirs[kind])
        command = [sys.executable, "-m", "qsd", "check", str(tmp_path / kind)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_compressed_clusters(house: tuple[Qmp, Path], theirs: dict[str, bytes], tmp_path: Path) -> None:
    """The reference's lie open in the file and are read; ours are encrypted, and not compressed."""
    qmp, place = house
    image = tmp_path / "i"
    image.write_bytes(theirs["luks"])
    above = f"driver=compress,{image_options(image, 'luks').replace('driver=', 'file.driver=', 1)}"
    above = above.replace(",file.filename", ",file.file.filename").replace(",encrypt", ",file.encrypt")
    tool("qemu-io", "-c", "write -P 120 64k 128k", "--image-opts", above)
    data = bytearray(1 << 20)
    data[65536:196608] = b"x" * 131072
    options = node_options(image, "luks", node="below")
    qmp.execute_raw("blockdev-add", {"driver": "compress", "node-name": "n", "file": options})
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    with NbdReader(place / "nbd.sock", "d") as client:
        assert client.read(0, len(data)) == data
        for offset in (0, 100_000, 300_000):
            client.write(offset, b"secret " * 20_000)
            data[offset : offset + 140_000] = b"secret " * 20_000
        assert client.read(0, len(data)) == data
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_holds(tmp_path, image, "luks", bytes(data))
    assert b"secret" not in image.read_bytes()
