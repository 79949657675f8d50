"""Hostile LUKS headers, in a volume of their own and in qcow2: opened, read, written, amended, checked, closed.

Whatever a header says, there is an answer or one of the documented errors, after bounded work; and where no error
is told, nothing else in the image has changed, and the passwords open it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

from qcow2_fakes import MemoryFile, examine, file_node, new_image, read, write
from qcow2_mended import mend

from qsd.drivers.base import Mode
from qsd.drivers.calls import call
from qsd.drivers.luks import keys
from qsd.drivers.luks.driver import LuksDriver
from qsd.drivers.luks.header import LENGTH, parse_header
from qsd.drivers.luks.volume import FormatOptions, Formatted, find_slots, format_volume, read_again
from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.extensions import CryptoExtension
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK
from qsd.drivers.qcow2.new_image import NewImage, header_cluster, metadata, place
from qsd.drivers.qcow2.resizing import resize
from qsd.errors import QmpError
from qsd.messages import Op, Request
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2, BlockdevQcow2EncryptionFormat, BlockdevQcow2EncryptionLuks

EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
CLUSTER: Final = 4096
SIZE: Final = 1 << 20
# Small keys: their material is, too.
OPTIONS: Final = FormatOptions(cipher_alg="aes-128", cipher_mode="cbc", iter_time=0)
DATA: Final = bytes(range(256)) * 32
MOST_GROWTH: Final = 8 << 20
MOST_REQUESTS: Final = 300


class Disk(MemoryFile):
    """A file that cannot be long; counts what an image costs."""

    requests = 0

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data)
        self.node = file_node("f")

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self.requests += 1
            assert self.requests < MOST_REQUESTS, "the image keeps us busy"
            assert request.offset >= 0
            assert request.length >= 0
            if request.op in (Op.WRITE, Op.WRITE_ZEROES) and request.offset + request.length > MOST_GROWTH:
                request.complete(errno.EFBIG)
            else:
                super().submit([request])

    def grow(self, size: int) -> bool:
        if size > MOST_GROWTH:
            raise OSError(errno.EFBIG, "no file is that long")
        return super().grow(size)


class Host:
    """Lends a driver what it needs; every secret is its own name."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.aio = SimpleNamespace(defer=lambda work: work(), call=lambda work, done: done(work()))
        self.warnings: list[str] = []

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        self._nursery.start_soon(function, *args, name=name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Nobody listens."""

    def secret(self, name: str) -> bytes:
        return name.encode()


class Bytes:
    """An ``Area`` in a larger image."""

    def __init__(self, data: bytearray, start: int) -> None:
        self.data = data
        self.start = start

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[self.start + offset :][:length]).ljust(length, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        self.data[self.start + offset : self.start + offset + len(data)] = data

    async def flush(self) -> None:
        """Nothing is held back."""


def amendment(**members: Any) -> Any:
    names = ("new_secret", "old_secret", "keyslot", "iter_time", "secret")
    state = SimpleNamespace(value=members.pop("state"))
    format_ = SimpleNamespace(value="luks")
    return SimpleNamespace(state=state, format=format_, **{name: members.get(name) for name in names})


ADD: Final = amendment(state="active", new_secret="t", iter_time=0)
ERASE: Final = amendment(state="inactive", old_secret="s")


@asynccontextmanager
async def lent_host() -> AsyncIterator[Any]:
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield Host(nursery)
        except Exception as error:  # noqa: BLE001  raised outside, where no group is made of it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


# -- volumes ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def volume(disk: Disk, header: Disk | None = None, secret: str = "s") -> AsyncIterator[LuksDriver]:
    async with lent_host() as host:
        options = SimpleNamespace(key_secret=secret, header=None if header is None else "header")
        driver = LuksDriver("l", options, Mode(discard_unmap=True), host)
        children: dict[str, Any] = {"file": disk} if header is None else {"file": disk, "header": header}
        driver.children.update(children)
        await driver.open()
        yield driver


_formatted: dict[bool, Formatted] = {}


async def formatted(*, is_detached: bool = False) -> Formatted:
    if is_detached not in _formatted:
        _formatted[is_detached] = await format_volume(OPTIONS, b"s", is_detached=is_detached)
    return _formatted[is_detached]


async def new_volume(*, is_detached: bool = False) -> tuple[bytearray, bytearray]:
    """The bytes of header area and payload, which may be one file."""
    made = await formatted(is_detached=is_detached)
    area = bytearray(made.header.area_bytes)
    await made.write(Bytes(area, 0))
    return (area, bytearray(SIZE)) if is_detached else (area + bytes(SIZE), bytearray())


# Where a header has numbers, and text.
NUMBERS: Final = (
    *(104, 108, 164),
    *(208 + 48 * index + at for index in (0, 1, 7) for at in (0, 4, 40, 44)),
)
VALUES: Final = (
    *(0, 1, 7, 8, 9, 16, 20, 24, 32, 64, 65, 512, 1000, 3999, 4000, 4001, 0xDEAD, 0xAC71F3),
    *(1 << 12, 1 << 16, 1 << 24, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 8),
)
TEXTS: Final = ((8, 32), (40, 32), (72, 32), (168, 40))
WORDS: Final = (
    *(b"", b"aes", b"cast5", b"serpent", b"sm4", b"des", b"\xff\xfe", b"\0x", b"x" * 40),
    *(b"xts-plain64", b"cbc-plain", b"cbc-essiv:sha256", b"cbc-essiv", b"ctr-plain64", b"ecb-", b"-", b"cbc"),
    *(b"sha1", b"sha512", b"md5", b"sha256\0junk", b"SHA256", b"ripemd160"),
)


@st.composite
def edits(draw: st.DrawFn, at: int = 0) -> list[tuple[int, bytes]]:
    """What is written into a LUKS header that stands at ``at``."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 2)):
            offset = draw(st.sampled_from(NUMBERS))
            value = draw(st.one_of(st.sampled_from(VALUES), st.integers(0, 4000), st.integers(0, (1 << 32) - 1)))
            found.append((at + offset, struct.pack(">I", value)))
        else:
            offset, length = draw(st.sampled_from(TEXTS))
            word = draw(st.one_of(st.sampled_from(WORDS), st.binary(max_size=length)))
            found.append((at + offset, word[:length].ljust(length, draw(st.sampled_from((b"\0", b"\xff"))))))
    return found


def edited(image: bytes | bytearray, changes: list[tuple[int, bytes]]) -> bytearray:
    found = bytearray(image)
    for offset, data in changes:
        found[offset : offset + len(data)] = data
    return found


@pytest.fixture
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of a second of hashing is the most that an image may ask for."""
    monkeypatch.setattr(keys, "MAX_WORK", 30_000)
    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)


FUZZ: Final = settings(
    max_examples=60 * EFFORT,
    deadline=None,
    derandomize=EFFORT == 1,
    phases=(Phase.generate,),
    suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
)


async def answer(function: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> str:
    """Nothing, or the error told."""
    try:
        await function(*args, **options)
    except QmpError as error:
        return error.desc or "?"
    except OSError as error:
        if not error.errno:
            raise
        return str(error)
    return ""


@pytest.mark.usefixtures("_little_work")
@FUZZ
@given(edits(), st.booleans(), st.one_of(st.none(), st.integers(0, 600_000)))
def test_any_header_of_a_volume_is_survived(
    changes: list[tuple[int, bytes]], is_detached: bool, length: int | None
) -> None:
    async def suffer() -> None:
        area, payload = await new_volume(is_detached=is_detached)
        first = Disk(edited(area, changes)[:length])
        second = Disk(payload) if is_detached else None
        files = (first, None) if second is None else (second, first)
        said: list[str] = []
        before = b""
        try:
            async with volume(*files) as driver:
                driver.format_specific()
                some = min(driver.length // 512 * 512, len(DATA))
                if some:
                    said.append(await answer(write, driver, 0, DATA[:some]))
                    before = await read(driver, 0, some)
                said += [
                    await answer(driver.amend, ADD, force=False),
                    await answer(driver.amend, ERASE, force=False),
                ]
        except (QmpError, OSError):
            return
        if any(said):
            return
        async with volume(*files, secret="t") as driver:
            assert await read(driver, 0, len(before)) == before == DATA[: len(before)]
        with pytest.raises(QmpError, match="Invalid password"):
            async with volume(*files):
                pass

    trio.run(suffer)


@pytest.mark.usefixtures("_little_work")
async def test_amending_keeps_what_the_header_says_of_itself() -> None:
    """The UUID may be any bytes; it was written back as the text it was shown as."""
    area, _payload = await new_volume()
    wild = b"\xff\xfe" + b"u" * 20 + b"\0" + b"junk" * 4 + b"\xff"
    disk = Disk(edited(area, [(168, wild)]))
    async with volume(disk) as driver:
        await driver.amend(ADD, force=False)
        facts = driver.format_specific()
        assert facts is not None
        assert facts["data"]["uuid"] == "\ufffd\ufffd" + "u" * 20
    assert disk.data[168:208] == wild


async def test_counts_are_bounded_when_the_header_is_read_again() -> None:
    """Somebody else may have changed it since: the limit is not only that of opening."""
    area, _payload = await new_volume()
    disk = Disk(area)
    async with volume(disk) as driver:
        disk.data[212:216] = b"\xff" * 4
        again = await read_again(driver.volume, driver.volume.area)
        assert again is not None
        driver.volume.renew(driver.volume.header, again)
        with pytest.raises(QmpError, match="PBKDF iterations"):
            await find_slots(driver.volume, b"s")


@pytest.mark.parametrize("milliseconds", [300_000, 500_000])
async def test_no_time_is_spent_on_a_volume_that_could_not_be_opened(
    monkeypatch: pytest.MonkeyPatch, milliseconds: int
) -> None:
    """It was made, in minutes, and refused then; from 2**31 rounds on the library dies instead."""

    def never(*_args: Any) -> bytes:
        raise AssertionError("this takes minutes")

    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 8_000_000)
    monkeypatch.setattr(keys, "pbkdf2", never)
    with pytest.raises(QmpError, match="PBKDF iterations"):
        await format_volume(attrs.evolve(OPTIONS, iter_time=milliseconds), b"s")


# -- in qcow2 ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Encrypted:
    """An image with data in its first clusters. ``pointer``: where the header says where the LUKS header is."""

    image: bytes
    pointer: int
    luks: CryptoExtension

    @property
    def header(self) -> layout.Header:
        return layout.parse_header(self.image[:CLUSTER])

    @property
    def l2(self) -> int:
        (entry,) = struct.unpack_from(">Q", self.image, self.header.l1_offset)
        return int(entry) & OFFSET_MASK

    def slot(self, index: int) -> int:
        """The first whole cluster of a slot's key material."""
        found = parse_header(self.image[self.luks.offset :][:LENGTH]).slots[index]
        return -(-(self.luks.offset + found.offset) // CLUSTER) * CLUSTER


@asynccontextmanager
async def opened(disk: Disk, secret: str = "s", **options: Any) -> AsyncIterator[tuple[Qcow2Driver, Host]]:
    async with lent_host() as host:
        encrypt = BlockdevQcow2EncryptionLuks(format=BlockdevQcow2EncryptionFormat.LUKS, key_secret=secret)
        if not layout.parse_header(bytes(disk.data[:CLUSTER])).crypt_method:
            encrypt = None  # type: ignore[assignment]
        asked = BlockdevOptionsQcow2(driver=BlockdevDriver.QCOW2, file="file", encrypt=encrypt, **options)
        driver = Qcow2Driver("n", asked, Mode(discard_unmap=True), host)
        child: Any = disk
        driver.children["file"] = child
        await driver.open()
        yield driver, host
        await driver.close()


_encrypted: list[Encrypted] = []


async def encrypted() -> Encrypted:
    if not _encrypted:
        made = await formatted()
        header = layout.Header(cluster_bits=12, size=SIZE, crypt_method=layout.CRYPT_LUKS)
        placement = place(NewImage(header=header, crypto_bytes=OPTIONS.area_bytes))
        luks = placement.header.crypto_extension()
        assert luks is not None
        data = bytearray(placement.end * CLUSTER)
        for offset, part in ((0, header_cluster(placement.header)), *metadata(placement)):
            data[offset : offset + len(part)] = part
        await made.write(Bytes(data, luks.offset))
        disk = Disk(data)
        async with opened(disk) as (driver, _host):
            await write(driver, 0, DATA)
        _encrypted.append(Encrypted(bytes(disk.data), disk.data.index(luks.serialise()), luks))
    return _encrypted[0]


@st.composite
def hostile(draw: st.DrawFn) -> tuple[list[tuple[str, int, bytes]], int | None]:
    """Changes of the pointer, the method, and the LUKS header; and how long the file is then."""
    words = st.one_of(
        st.sampled_from((0, 1, 591, 592, 4096, 8192, 69632, 1 << 20, 1 << 31, 1 << 40, 1 << 55)),
        st.sampled_from(((1 << 62), (1 << 63) - 4096, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)),
        st.integers(0, 300).map(lambda cluster: cluster * CLUSTER),
    )
    found: list[tuple[str, int, bytes]] = []
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(("pointer", "length", "size", "method", "luks", "luks")))
        if kind == "luks":
            found += [("luks", offset, data) for offset, data in draw(edits())]
        elif kind in ("pointer", "length"):
            found.append(("pointer", 0 if kind == "pointer" else 8, struct.pack(">Q", draw(words))))
        elif kind == "size":
            found.append(("pointer", -4, struct.pack(">I", draw(st.sampled_from((0, 8, 15, 17, 24, 1 << 31))))))
        else:
            method = draw(st.sampled_from((0, 1, 2, 3, 1 << 31, (1 << 32) - 1)))
            found.append(("start", 32, struct.pack(">I", method)))
    return found, draw(st.integers(0, 700_000)) if draw(st.integers(0, 4)) == 0 else None


async def do_everything(driver: Qcow2Driver) -> list[str]:
    driver.image_facts()
    driver.format_specific()
    said = [await answer(write, driver, 8192, DATA), await answer(read, driver, 0, SIZE)]
    said += [await answer(write, driver, SIZE // 2, DATA), await answer(call, driver, Op.FLUSH, 0, 0, None)]
    change = SimpleNamespace(encrypt=ADD)
    said.append(await answer(driver.amend, change, force=False))
    said.append(await answer(driver.amend, SimpleNamespace(encrypt=ERASE), force=False))
    said.append(await answer(call, driver, Op.DISCARD, SIZE // 2, len(DATA), None))
    said.append(await answer(call, driver, Op.FLUSH, 0, 0, None))
    return said


@pytest.mark.usefixtures("_little_work")
@FUZZ
@given(hostile())
def test_any_encryption_header_of_an_image_is_survived(
    change: tuple[list[tuple[str, int, bytes]], int | None],
) -> None:
    async def suffer() -> None:
        made = await encrypted()
        bases = {"pointer": made.pointer, "luks": made.luks.offset, "start": 0}
        changes, length = change
        image = edited(made.image, [(bases[where] + offset, data) for where, offset, data in changes])[:length]
        try:
            is_sound = not examine(image).corruptions
        except QmpError:
            is_sound = False
        disk = Disk(image)
        try:
            async with opened(disk, pass_discard_request=True) as (driver, _host):
                said = await do_everything(driver)
        except (QmpError, OSError):
            return
        if any(said) or not is_sound:
            return
        assert not examine(disk.data).corruptions
        async with opened(disk, secret="t") as (driver, _host):
            assert await read(driver, 0, 8192) + await read(driver, 8192, 8192) == DATA + DATA

    trio.run(suffer)


@pytest.mark.parametrize("what", ["active L1 table", "refcount table"])
async def test_keys_are_not_written_over_other_metadata(what: str) -> None:
    """The reference writes them there, and the image is lost."""
    made = await encrypted()
    image, slot = bytearray(made.image), made.slot(1)
    field = {"active L1 table": 40, "refcount table": 48}[what]
    (old,) = struct.unpack_from(">Q", image, field)
    image[slot : slot + CLUSTER] = image[old : old + CLUSTER]
    struct.pack_into(">Q", image, field, slot)
    disk = Disk(image)
    async with opened(disk) as (driver, host):
        said = await answer(driver.amend, SimpleNamespace(encrypt=ADD), force=False)
        assert said == "Could not write encryption header: Input/output error"
        assert host.warnings[0].startswith(
            f"qcow2: Marking image as corrupt: Preventing invalid write on metadata (overlaps with {what})"
        )
    assert disk.data[slot : slot + CLUSTER] == image[slot : slot + CLUSTER]
    # Read-only it still shows what it holds.
    assert disk.data[made.luks.offset :][:LENGTH] == image[made.luks.offset :][:LENGTH]


@pytest.mark.parametrize("leads_to", ["luks", "l1", "table"])
async def test_discard_makes_no_hole_in_metadata(leads_to: str) -> None:
    """An entry of a broken image leads there, and nothing else is counted: the keys, or all the data, were lost."""
    made = await encrypted()
    target = {
        "luks": made.luks.offset,
        "l1": made.header.l1_offset,
        "table": made.header.refcount_table_offset,
    }[leads_to]
    disk = Disk(edited(made.image, [(made.l2, struct.pack(">Q", target | COPIED))]))
    async with opened(disk, pass_discard_request=True) as (driver, host):
        await call(driver, Op.DISCARD, 0, CLUSTER, None)
        await call(driver, Op.FLUSH, 0, 0, None)
    assert host.warnings[0].startswith("qcow2: Marking image as corrupt: Preventing freeing of metadata")
    assert disk.data[target : target + CLUSTER] == made.image[target : target + CLUSTER]


async def test_kept_clusters_are_no_hole_in_metadata() -> None:
    """The same where a discard keeps the cluster and only empties it (discard-no-unref)."""
    disk = Disk(new_image(layout.Header(cluster_bits=12, size=SIZE), allocates=True))
    header = layout.parse_header(bytes(disk.data[:CLUSTER]))
    (l2,) = struct.unpack_from(">Q", disk.data, header.l1_offset)
    struct.pack_into(">Q", disk.data, l2 & OFFSET_MASK, header.l1_offset | COPIED)
    before = disk.data[header.l1_offset :][:CLUSTER]
    async with opened(disk, pass_discard_request=True, discard_no_unref=True) as (driver, host):
        with pytest.raises(OSError, match="Input/output error"):
            await call(driver, Op.DISCARD, 0, CLUSTER, None)
        assert "overlaps with active L1 table" in host.warnings[0]
    assert disk.data[header.l1_offset :][:CLUSTER] == before


async def test_shrinking_does_not_cut_off_the_keys() -> None:
    """They stand behind everything that is counted, because the counts are wrong."""
    made = await encrypted()
    header = made.header
    (block,) = struct.unpack_from(">Q", made.image, header.refcount_table_offset)
    first = made.luks.offset // CLUSTER
    nothing = bytes(2 * (len(made.image) // CLUSTER - first))
    disk = Disk(edited(made.image, [(block + 2 * first, nothing), (header.l1_offset, bytes(8))]))
    async with opened(disk) as (driver, _host):
        await resize(driver, SIZE // 2, exact=True)
    end = made.luks.offset + parse_header(made.image[made.luks.offset :][:LENGTH]).area_bytes
    assert disk.length >= end - CLUSTER
    assert disk.data[made.luks.offset : end - CLUSTER] == made.image[made.luks.offset : end - CLUSTER]


@pytest.mark.usefixtures("_little_work")
async def test_closing_does_not_cut_off_a_key() -> None:
    """A slot far behind the file's end is filled while the file has room ahead."""
    made = await encrypted()
    far = (2 << 20) // 512
    at = made.luks.offset
    disk = Disk(
        edited(
            made.image,
            [(at + 208 + 48 + 40, struct.pack(">I", far)), (made.pointer + 8, struct.pack(">Q", 4 << 20))],
        )
    )
    disk.data[at + 104 : at + 108] = struct.pack(">I", far * 2)
    async with opened(disk) as (driver, _host):
        await write(driver, SIZE // 2, DATA)
        await driver.amend(SimpleNamespace(encrypt=ADD), force=False)
    async with opened(disk, secret="t") as (driver, _host):
        assert await read(driver, 0, len(DATA)) == DATA


class _HoldingDisk(Disk):
    """Keeps the first write waiting."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data)
        self.held: list[Request] = []
        self.has_begun = trio.Event()
        self.holds = False

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if self.holds and request.op == Op.WRITE:
                self.held.append(request)
                self.has_begun.set()
            else:
                super().submit([request])

    def go_on(self) -> None:
        self.holds = False
        held, self.held = self.held, []
        self.submit(held)


@pytest.mark.usefixtures("_little_work")
async def test_a_reopened_image_knows_of_the_key_that_was_being_added() -> None:
    """The next key took the same slot, and the password before it opened nothing any more."""
    made = await encrypted()
    disk = _HoldingDisk(made.image)
    async with opened(disk) as (driver, _host):
        disk.holds = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(driver.amend, SimpleNamespace(encrypt=ADD), force=False))
            await disk.has_begun.wait()
            await driver.prepare_reopen(driver.options, driver.mode)
            driver.commit_reopen(driver.options, driver.mode)
            disk.go_on()
        facts: Any = driver.format_specific()
        slots = facts["data"]["encrypt"]["slots"]
        assert [slot["active"] for slot in slots[:3]] == [True, True, False]
        another = amendment(state="active", new_secret="u", iter_time=0)
        await driver.amend(SimpleNamespace(encrypt=another), force=False)
    for secret in "stu":
        async with opened(Disk(disk.data), secret) as (driver, _host):
            assert await read(driver, 0, len(DATA)) == DATA


async def test_of_two_pointers_the_last_counts() -> None:
    """As in the reference: another key would decrypt to something else, and nobody would know."""
    made = await encrypted()
    one = struct.pack(">II", layout.EXT_CRYPTO, 16)
    wrong = CryptoExtension(0, CLUSTER).serialise()
    right = made.luks.serialise()
    for first, second, is_right in ((wrong, right, True), (right, wrong, False)):
        disk = Disk(edited(made.image, [(made.pointer - 8, one + first + one + second + bytes(8))]))
        if is_right:
            async with opened(disk) as (driver, _host):
                assert await read(driver, 0, len(DATA)) == DATA
        else:
            with pytest.raises(QmpError, match="Volume is not in LUKS format"):
                async with opened(disk):
                    pass


async def test_check_does_not_go_through_a_file_that_is_all_encryption_header() -> None:
    """A sparse file of many terabytes, one number in its header: hours, and gigabytes of counts."""
    made = await encrypted()
    image = edited(made.image, [(made.pointer + 8, struct.pack(">Q", 1 << 60))])

    def look(offset: int, length: int) -> bytes:
        return bytes(image[offset : offset + length]).ljust(length, b"\0")

    found = Checker(layout.parse_header(bytes(image[:CLUSTER])), look, 1 << 61).run()
    assert found.corruptions == 1
    assert found.problems[0] == f"ERROR encryption header at {made.luks.offset:#x} has {1 << 60} bytes"
    assert found.is_lossy, "what it may be is not given up"


async def test_new_refcounts_are_not_written_over_keys_that_are_cut_off() -> None:
    """The end of the key slots is missing, the refcounts are lost: what is left of the keys is no free space."""
    made = await encrypted()
    header = made.header
    broken = edited(made.image, [(header.refcount_table_offset, struct.pack(">Q", 1 << 40))])
    disk = Disk(broken[: made.slot(7) + CLUSTER])
    before = bytes(disk.data)

    assert mend(disk.data).fixed.corruptions
    assert disk.data[made.luks.offset : len(before)] == before[made.luks.offset :]
    async with opened(disk) as (driver, _host):
        for at in range(4):
            assert not await answer(write, driver, SIZE // 2 + at * CLUSTER, DATA)
    assert disk.data[made.luks.offset :][:LENGTH] == before[made.luks.offset :][:LENGTH]
