"""Random requests through libnbd against a model; run by the interpreter that has libnbd's Python binding.

Environment: SOCKET, SEED, IMAGE (bytes the export begins with), COUNT, DEPTH (requests in flight at once, which
then touch disjoint ranges). Prints ``agreed`` at the end; the export's bytes at the end go to RESULT.
"""

import os
import random

import nbd

chance = random.Random(int(os.environ["SEED"]))
with open(os.environ["IMAGE"], "rb") as file:
    model = bytearray(file.read())
h = nbd.NBD()
h.set_export_name("disk")
h.add_meta_context("base:allocation")
# The server takes what is not aligned; the library would refuse to send it.
h.set_strict_mode(0)
h.connect_unix(os.environ["SOCKET"])
assert h.get_size() == len(model), (h.get_size(), len(model))
depth = int(os.environ["DEPTH"])
LARGEST = 200_000


def piece(low, high):
    start = chance.randrange(low, high)
    length = chance.randrange(1, min(LARGEST, high - start) + 1)
    if chance.random() < 0.4:
        start = start // 4096 * 4096
        start = max(low, start)
        length = min(high - start, -(-length // 4096) * 4096)
    return start, length


def one(low, high):
    """Start one request inside [low, high); what to check when it has ended."""
    start, length = piece(low, high)
    end = start + length
    action = chance.choice(("read", "read", "write", "write", "zero", "trim", "cache", "flush", "status"))
    flags = nbd.CMD_FLAG_FUA if chance.random() < 0.2 else 0
    if action == "read":
        expected = bytes(model[start:end])
        buffer = nbd.Buffer(length)
        cookie = h.aio_pread(buffer, start)
        return cookie, lambda: bytes(buffer.to_bytearray()) == expected
    if action == "write":
        data = chance.randbytes(length)
        model[start:end] = data
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        return h.aio_pwrite(buffer, start, flags=flags), lambda: buffer is not None
    if action == "zero":
        model[start:end] = bytes(length)
        hole = chance.choice((0, nbd.CMD_FLAG_NO_HOLE))
        return h.aio_zero(length, start, flags=flags | hole), lambda: True
    if action == "trim":
        # What it leaves is not promised: it is made known again.
        h.trim(length, start, flags=flags)
        model[start:end] = h.pread(length, start)
        return None, lambda: True
    if action == "cache":
        return h.aio_cache(length, start), lambda: True
    if action == "flush":
        return h.aio_flush(), lambda: True
    known = bytes(model[start:end])

    def check(metacontext, offset, entries, error):
        at = start
        for size, state in zip(entries[::2], entries[1::2], strict=True):
            part = known[at - start : at - start + size]
            assert not state & nbd.STATE_ZERO or not any(part), (at, size, state)
            at += size
        assert at > start
        return 0

    h.block_status(length, start, check)
    return None, lambda: True


done = 0
while done < int(os.environ["COUNT"]):
    # Each of the requests in flight has a part of the disk to itself.
    share = len(model) // depth
    order = list(range(depth))
    chance.shuffle(order)
    started = [one(number * share, (number + 1) * share) for number in order]
    for cookie, check in started:
        while cookie is not None and not h.aio_command_completed(cookie):
            h.poll(-1)
        assert check(), done
        done += 1
h.flush()
step = 1 << 20
whole = b"".join(h.pread(min(step, len(model) - at), at) for at in range(0, len(model), step))
assert whole == bytes(model), "the export differs from the model"
with open(os.environ["RESULT"], "wb") as file:
    file.write(model)
h.shutdown()
print("agreed")
