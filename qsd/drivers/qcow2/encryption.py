"""Encrypted qcow2 images: unlocking them, and the child through which the guest's data is read and written.

Follows the qcow2 specification ("crypt_method", "Full disk encryption header pointer"). With ``luks`` the image
holds a LUKS header, and a sector's number is its place in the file that holds the data; with ``aes``, the old
way, the password itself is the key and a sector's number is the guest's. Compressed clusters are not encrypted,
nor is metadata.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from qsd.drivers.base import Child, Driver
from qsd.drivers.luks.algorithms import is_library_loaded, load_library
from qsd.drivers.luks.amend import amend_volume
from qsd.drivers.luks.header import LENGTH
from qsd.drivers.luks.sealed import SealedChild, Sealer
from qsd.drivers.luks.volume import ChildArea, Volume, in_thread, open_volume, read_again, volume_info
from qsd.drivers.qcow2.layout import CRYPT_AES, CRYPT_LUKS, CRYPT_NONE, Header
from qsd.errors import QmpError, errno_text

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.mapping import ClusterMap

FORMATS: Final = {CRYPT_AES: "aes", CRYPT_LUKS: "luks"}
# The most bytes a block device may have in the reference.
_MAX_LENGTH: Final = 0x7FFF_FFFF_C000_0000


@attrs.define(eq=False)
class Encryption:
    """What an open image is encrypted with. ``volume``: of ``luks``.

    ``overlap``: other metadata that stands where the LUKS header or a key slot is: its kind, and the offset and
    bytes of that place. Known when the image can be written.
    """

    format: str
    sealer: Sealer
    volume: Volume | None = None
    overlap: tuple[str, int, int] | None = None

    def cover(self, mapping: ClusterMap) -> None:
        """Let the guest's data be read and written through the cipher."""
        sealed = SealedChild(self.sealer, mapping.data)
        mapping.data = sealed
        if self.volume is None:
            mapping.numbered = sealed.shifted

    def places(self, header: Header) -> list[tuple[int, int]]:
        """Host offset and bytes of what opens the image: the LUKS header and its key slots.

        Not the whole area that the image says is theirs: it may say anything.
        """
        extension = header.crypto_extension()
        if self.volume is None or extension is None:
            return []
        luks, start = self.volume.header, extension.offset
        slots = [(start + slot.offset, luks.material_bytes) for slot in luks.slots]
        return [(start, LENGTH), *slots]

    def facts(self) -> dict[str, Any]:
        """``ImageInfoSpecificQCow2Encryption``."""
        return {"format": self.format, **(volume_info(self.volume) if self.volume is not None else {})}


def check_wanted(header: Header, wanted: str | None) -> None:
    """Raise QmpError if another encryption is ``wanted`` than the image has."""
    name = FORMATS.get(header.crypt_method)
    if wanted is not None and header.crypt_method == CRYPT_NONE:
        raise QmpError(f"No encryption in image header, but options specified format '{wanted}'")
    if wanted is not None and wanted != name:
        raise QmpError(f"Header reported '{name}' encryption format but options specify '{wanted}'")


def check_format(header: Header, options: Any, *, is_reopening: bool) -> None:
    """Raise QmpError unless the options mean the encryption the image has; saying nothing is answered later."""
    wanted = None if options.encrypt is None else options.encrypt.format.value
    check_wanted(header, wanted)
    if header.crypt_method != CRYPT_NONE and is_reopening:
        if wanted is None:
            raise QmpError("Option 'encrypt.format' cannot be reset to its default value")
        if options.encrypt.key_secret is None:
            raise QmpError("Option 'encrypt.key-secret' cannot be reset to its default value")


def _secret_name(options: Any) -> str:
    name: str | None = None if options.encrypt is None else options.encrypt.key_secret
    if name is None:
        raise QmpError("Parameter 'encrypt.key-secret' is required for cipher")
    return name


async def unlock_luks(driver: Driver, header: Header, options: Any, known: Encryption | None) -> Encryption | None:
    """What a LUKS image is encrypted with; None for other images.

    ``known``: from before, when the image is looked at anew. Its key goes on to be used if it is the same still.
    Raises QmpError, OSError.
    """
    if known is not None and known.format == FORMATS.get(header.crypt_method):
        found = await _look_again(known, header, driver.children["file"])
        if found is not None:
            return found
    if header.crypt_method != CRYPT_LUKS:
        return None
    password = driver.host.secret(_secret_name(options))
    try:
        volume = await open_volume(crypto_area(header, driver.children["file"]), password)
    except OSError as error:
        raise QmpError(f"Could not read encryption header: {errno_text(error.errno or 0)}") from None
    return Encryption("luks", Sealer(driver, volume.cipher), volume)


async def _look_again(known: Encryption, header: Header, file: Child) -> Encryption | None:
    volume = known.volume
    if volume is None:
        return known
    before = volume.header
    found = await read_again(volume, crypto_area(header, file))
    if found is None:
        return None
    # The volume stays the same one: an amendment may be at work on its slots.
    volume.renew(before, found)
    return attrs.evolve(known)


async def unlock_aes(driver: Driver, options: Any) -> Encryption:
    """Take the password for the key: no password is wrong. Raises QmpError."""
    password = driver.host.secret(_secret_name(options))
    if not is_library_loaded():
        await in_thread(load_library)
    from qsd.drivers.luks.sectors import legacy_aes_cipher

    return Encryption("aes", Sealer(driver, legacy_aes_cipher(password)))


def crypto_area(header: Header, file: Child) -> ChildArea:
    """The clusters of the LUKS header. Raises QmpError."""
    extension = header.crypto_extension()
    assert extension is not None
    if extension.offset > _MAX_LENGTH:
        raise QmpError("Could not read encryption header: Input/output error")
    return ChildArea(file, extension.offset, extension.length)


async def amend_encryption(
    encryption: Encryption | None, options: Any, *, force: bool, driver: Qcow2Driver
) -> None:
    """Add or erase key slots: ``options`` is ``QCryptoBlockAmendOptions``. Raises QmpError, OSError.

    Where an image says that a key slot is other metadata too, that would be destroyed (by the reference it is).
    """
    if encryption is None:
        raise QmpError("image is not encrypted, can't amend")
    if options.format.value != "luks":
        raise QmpError("Amend can't be used to change the qcow2 encryption format")
    if encryption.volume is None:
        raise QmpError("Only LUKS encryption options can be amended for qcow2 with blockdev-amend")
    if encryption.overlap is not None:
        driver.image.overlap(*encryption.overlap)
    opened_with = _secret_name(driver.options)
    # The file may be another node since the volume was opened.
    encryption.volume.area = crypto_area(driver.image.header, driver.image.file)
    await amend_volume(encryption.volume, options, force=force, secret=driver.host.secret, opened_with=opened_with)
