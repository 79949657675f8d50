"""``x-blockdev-amend`` of a LUKS volume, alone or inside qcow2: adding and erasing key slots.

``options`` has the members of QAPI's ``QCryptoBlockAmendOptionsLUKS``. The order of the checks and the texts are
the reference's; ``force`` lets a slot be overwritten and the last key be thrown away.
"""

from __future__ import annotations

from typing import Any

from qsd.drivers.luks.header import SLOTS
from qsd.drivers.luks.volume import FindSecret, InThread, Volume, add_key, erase_key, find_slots, in_thread, unlock
from qsd.errors import QmpError

_ALL_THE_DATA = "which will erase all the data in the image irreversibly - refusing operation"


async def amend_volume(
    volume: Volume,
    options: Any,
    *,
    force: bool,
    secret: FindSecret,
    opened_with: str,
    run: InThread = in_thread,
) -> None:
    """Do it. ``opened_with``: id of the secret that opens the volume unless ``options.secret`` names another.

    Raises QmpError and OSError; then the volume can be opened as before.
    """
    if options.state.value == "active":
        await _activate(volume, options, force, secret, opened_with, run)
    else:
        await _erase(volume, options, force, secret, run)


async def _activate(
    volume: Volume, options: Any, force: bool, secret: FindSecret, opened_with: str, run: InThread
) -> None:
    if options.new_secret is None:
        raise QmpError("'new-secret' is required to activate a keyslot")
    if options.old_secret is not None:
        raise QmpError("'old-secret' must not be given when activating keyslots")
    index = _slot_to_fill(volume, options.keyslot, force)
    old = secret(opened_with if options.secret is None else options.secret)
    master = await unlock(volume.area, volume.header, volume.spec, old, run)
    await add_key(volume, index, master, secret(options.new_secret), options.iter_time, run)


def _slot_to_fill(volume: Volume, wanted: int | None, force: bool) -> int:
    slots = volume.header.slots
    if wanted is None:
        free = [index for index in range(SLOTS) if not slots[index].is_active]
        if not free:
            raise QmpError("Can't add a keyslot - all keyslots are in use")
        return free[0]
    # The reference prints an unsigned number here and a signed one below.
    _check_number(wanted, wanted % (1 << 32))
    if slots[wanted].is_active and not force:
        raise QmpError(f"Refusing to overwrite active keyslot {wanted} - please erase it first")
    return wanted


def _check_number(index: int, shown: int) -> None:
    if not 0 <= index < SLOTS:
        raise QmpError(f"Invalid keyslot {shown} specified, must be between 0 and {SLOTS - 1}")


async def _erase(volume: Volume, options: Any, force: bool, secret: FindSecret, run: InThread) -> None:
    for name in ("new_secret", "iter_time", "secret"):
        if getattr(options, name) is not None:
            raise QmpError(f"'{name.replace('_', '-')}' must not be given when erasing keyslots")
    password = None if options.old_secret is None else secret(options.old_secret)
    if options.keyslot is not None:
        await _erase_one(volume, options.keyslot, password, force, run)
    elif password is not None:
        await _erase_matching(volume, password, force, run)
    else:
        raise QmpError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them "
            "must be given"
        )


async def _erase_one(volume: Volume, index: int, password: bytes | None, force: bool, run: InThread) -> None:
    _check_number(index, index)
    if password is not None and index not in await find_slots(volume, password, run):
        raise QmpError(f"Given keyslot {index} doesn't contain the given old password for erase operation")
    active = volume.header.active_slots
    if not force and index not in active:
        raise QmpError(f"Given keyslot {index} is already erased (inactive) ")
    if not force and active == (index,):
        raise QmpError(f"Attempt to erase the only active keyslot {index} {_ALL_THE_DATA}")
    await erase_key(volume, index)


async def _erase_matching(volume: Volume, password: bytes, force: bool, run: InThread) -> None:
    matching = await find_slots(volume, password, run)
    if not matching:
        raise QmpError("No keyslots match given (old) password for erase operation")
    if not force and len(matching) == len(volume.header.active_slots):
        raise QmpError(
            "All the active keyslots match the (old) password that was given and erasing them will erase all "
            "the data in the image irreversibly - refusing operation"
        )
    for index in matching:
        await erase_key(volume, index)
