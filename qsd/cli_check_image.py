"""The image that ``qsd check`` looks at: which file it is, opened and locked, and the key that opens it.

An image is given by name, or as a list of options (``--image-opts``, ``json:``) of which those that say where it is
and how it is encrypted mean something here; the others are taken where the reference knows them, and flags and
numbers have to be such.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any, Final

import attrs

from qsd.block.permissions import Perm
from qsd.cli_check_options import Options
from qsd.drivers.qcow2.examining import Repairs
from qsd.drivers.qcow2.layout import CRYPT_LUKS, Header
from qsd.errors import QmpError, errno_text
from qsd.host.locks import ByteLocks
from qsd.qapi.schema.block import BlockdevDriver, BlockdevOptionsFile, BlockdevOptionsRaw
from qsd.qapi.schema.luks import BlockdevOptionsLUKS
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2
from qsd.wire import keyval
from qsd.wire.qemuopts import OptionKind, check_value
from qsd.wire.qmp_json import parse_one

FindSecret = Callable[[str], bytes]
_FILES: Final = ("file", "host_device")
# Of others, those of qcow2 are taken.
_OPTIONS: Final[dict[str, type]] = {"luks": BlockdevOptionsLUKS, "raw": BlockdevOptionsRaw}


@attrs.frozen(kw_only=True)
class Place:
    """Where an image is. ``format``: None to look at the first bytes; ``file``: the bytes themselves, no image.

    ``encryption`` and ``key_secret``: what the options say about the encryption.
    """

    filename: str
    format: str | None = None
    encryption: str | None = None
    key_secret: str | None = None
    read_only: bool = False
    force_share: bool = False
    direct: bool = False


def place_of(options: Options) -> Place:
    """Where the image is. Raises QmpError."""
    name = options.image
    if options.image_opts:
        place = _place_in(keyval.parse(name, "file").tree)
    elif name.startswith("json:"):
        place = _place_in(parse_one(name.removeprefix("json:")))
    else:
        place = Place(filename=name.removeprefix("file:"))
    if options.format is not None:
        place = attrs.evolve(place, format=_known(options.format))
    is_shared = place.force_share or options.force_share
    is_direct = place.direct or options.cache in ("none", "off", "directsync")
    if options.repairs is not Repairs.NONE:
        if is_shared:
            raise QmpError("force-share=on can only be used with read-only images")
        if place.read_only:
            raise QmpError("Block node is read-only")
    return attrs.evolve(place, force_share=is_shared, direct=is_direct)


def _known(driver: str) -> str:
    if driver not in [known.value for known in BlockdevDriver]:
        raise QmpError(f"Unknown driver '{driver}'")
    return driver


def _place_in(tree: dict[str, Any]) -> Place:
    driver = tree.get("driver")
    if driver is not None:
        _known(str(driver))
    elif "file" not in tree:
        raise QmpError("Must specify either driver or file")
    if driver in _FILES:
        return Place(filename=_filename(tree), format=driver)
    file = tree.get("file")
    if file is None:
        raise QmpError('A block device must be specified for "file"')
    if not isinstance(file, dict):
        raise QmpError(f"Cannot find device='{file}' nor node-name='{file}'")
    kind = _OPTIONS.get(str(driver), BlockdevOptionsQcow2)
    allowed = _names(kind)
    for name in tree:
        if name not in allowed:
            raise QmpError(f"Block format '{driver or 'qcow2'}' does not support the option '{name}'")
    _check_values(tree, kind)
    cache, encrypt = _branch(tree, "cache"), _branch(tree, "encrypt")
    for name in encrypt:
        if name not in ("format", "key-secret"):
            raise QmpError(f"Parameter '{name}' is unexpected")
    return Place(
        filename=_filename(file),
        format=driver,
        encryption=_text(encrypt, "format"),
        key_secret=_text(tree if driver == "luks" and "header" not in tree else encrypt, "key-secret"),
        read_only=_bool(tree, "read-only"),
        force_share=_bool(tree, "force-share"),
        direct=_bool(cache, "direct", "cache."),
    )


def _filename(file: dict[str, Any]) -> str:
    driver = _known(str(file.get("driver", "file")))
    if driver not in _FILES:
        raise QmpError(f"Only images in files can be checked, not in '{driver}'")
    for name in file:
        if name not in _names(BlockdevOptionsFile):
            raise QmpError(f"Block protocol '{driver}' doesn't support the option '{name}'")
    _check_values(file, BlockdevOptionsFile)
    if "filename" not in file:
        raise QmpError(f"The '{driver}' block driver requires a file name")
    return str(file["filename"])


def _names(options: type) -> set[str]:
    return {field.name.replace("_", "-") for field in attrs.fields(options)}


def _check_values(tree: dict[str, Any], options: type) -> None:
    for field in attrs.fields(options):
        name, kind = field.name.replace("_", "-"), str(field.type)
        if isinstance(value := tree.get(name), str):
            if kind.startswith("bool"):
                check_value(OptionKind.BOOL, name, value)
            elif kind.startswith("int"):
                is_size = name.endswith(("size", "offset"))
                check_value(OptionKind.SIZE if is_size else OptionKind.NUMBER, name, value)


def _branch(tree: dict[str, Any], name: str) -> dict[str, Any]:
    branch = tree.get(name, {})
    if not isinstance(branch, dict):
        raise QmpError(f"Invalid parameter type for '{name}', expected: object")
    return branch


def _text(tree: dict[str, Any], name: str) -> str | None:
    return str(tree[name]) if name in tree else None


def _bool(tree: dict[str, Any], name: str, path: str = "") -> bool:
    value = tree.get(name, False)
    if value not in ("on", "off") and not isinstance(value, bool):
        raise QmpError(f"Parameter '{path}{name}' expects 'on' or 'off'")
    return value in ("on", True)


class Image:
    """An image file, locked against writers (and for repairs against everybody) unless all is shared by force.

    ``is_hasty``: nobody waits for the disk.
    """

    def __init__(self, place: Place, *, writable: bool, is_hasty: bool = False) -> None:
        filename = place.filename
        self._is_hasty, self._is_direct = is_hasty, place.direct
        try:
            mode = os.stat(filename).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise QmpError(f"'file' driver requires '{filename}' to be a regular file")
            self.fd = os.open(filename, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise QmpError(f"Could not open '{filename}': {errno_text(error.errno or 0)}") from None
        except ValueError:
            raise QmpError(f"Could not open '{filename!r}': no file has such a name") from None
        perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if writable else Perm.NONE)
        shared = Perm.ALL if place.force_share else Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        try:
            ByteLocks(filename).acquire(self.fd, perm, shared)
        except BaseException:
            os.close(self.fd)
            raise
        self.length = os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset, wherever an image says that something is; zeroes beyond the end."""
        found, end = b"", min(offset + length, self.length)
        while offset + len(found) < end:
            # A read that comes to a broken sector ends before it; what is there are no zeroes.
            part = os.pread(self.fd, end - offset - len(found), offset + len(found))
            if not part:
                break
            found += part
        return found.ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""
        while data:
            count = os.pwrite(self.fd, data, offset)
            offset, data = offset + count, data[count:]
        self.length = max(self.length, offset)

    def flush(self) -> None:
        """Return when everything is on the disk."""
        if not self._is_hasty:
            os.fsync(self.fd)

    def close(self) -> None:
        """Let go of the file, and of what the page cache has of it if that was asked for.

        A check reads metadata by whatever bytes it needs, which O_DIRECT could not.
        """
        if self._is_direct:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self.fd)


@attrs.frozen
class _Keys:
    """The part of an image file that holds a LUKS header and its keys."""

    image: Image
    start: int
    size: int

    async def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise QmpError("Request for data outside of extension header")
        return self.image.read(self.start + offset, length)


def unlock(image: Image, header: Header, place: Place, find_secret: FindSecret) -> None:
    """Raise QmpError unless the secret that was named opens the qcow2 image.

    A check needs no key. The reference asks for one.
    """
    from qsd.drivers.qcow2.encryption import check_wanted

    check_wanted(header, place.encryption)
    if not header.crypt_method or place.key_secret is None:
        return
    password = find_secret(place.key_secret)
    extension = header.crypto_extension()
    if header.crypt_method == CRYPT_LUKS and extension is not None:
        _find_key(_Keys(image, extension.offset, extension.length), password)


def unlock_volume(image: Image, place: Place, find_secret: FindSecret) -> None:
    """The same of an image of another format, which is encrypted if that is luks."""
    if place.format == "luks" and place.key_secret is not None:
        _find_key(_Keys(image, 0, image.length), find_secret(place.key_secret))


def _find_key(keys: _Keys, password: bytes) -> None:
    import trio

    from qsd.drivers.luks.volume import find_key

    trio.run(find_key, keys, password)
