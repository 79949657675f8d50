"""Planning a write: which host range each part of it goes to, and what has to be filled around it.

On the spot, with the L2 slice in memory: clusters that are this image's alone are written in place; others get new
host clusters here, which the plan gives back when it cannot be finished. New clusters at the end of the file read
as zeroes already and need no filling with zeroes.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import attrs

from qsd.drivers.qcow2.geometry import ALL_ALLOCATED, COMPRESSED, COPIED, ODD, OFFSET_MASK, zero_words
from qsd.drivers.runs import UNALLOCATED, ZERO

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image

# What goes into the rest of a new cluster, before and behind the data.
NOTHING: Final = 0
ZEROES: Final = 1
CONTENT: Final = 2


@attrs.define(eq=False)
class Target:
    """Guest clusters and the host clusters that become theirs. ``bits``: the subclusters that become allocated."""

    cluster: int
    count: int
    host: int
    is_new: bool
    bits: int = ALL_ALLOCATED


@attrs.define(eq=False)
class Plan:
    """Where a write goes. ``runs``: guest start, guest end, host start, in order, over [low, high)."""

    runs: list[tuple[int, int, int]]
    targets: list[Target]
    low: int
    high: int
    head: int = NOTHING
    tail: int = NOTHING


class Planner:
    """See the module. The caller has the slice's table in memory and exclusive."""

    def __init__(self, driver: Qcow2Driver, image: Image) -> None:
        self._driver = driver
        self._image = image
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._mask = geometry.cluster_size - 1
        self._slice_mask = geometry.slice_mask
        self._odd = ODD | self._mask
        self.plan = self._plan if geometry.words == 1 else self._plan_subclusters

    def _plan(self, table: array[int], first: int, last: int, offset: int, end: int) -> Plan:
        """The plan for clusters with plain entries. Raises Cold and OSError with nothing changed."""
        bits, size, odd = self._bits, self._mask + 1, self._odd
        low_index = first & self._slice_mask
        stop = low_index + last - first + 1
        index = low_index
        plan = Plan([], [], offset, end)
        guest = offset
        try:
            while index < stop:
                entry = table[index]
                cluster = first + index - low_index
                if entry & COPIED and not entry & odd:
                    host = entry & OFFSET_MASK
                    count = 1
                    while index + count < stop and table[index + count] == entry + count * size:
                        count += 1
                    self._check(host, count)
                else:
                    host, count, is_fresh = self._target(plan, table, index, stop, cluster)
                    if index == low_index and guest & self._mask:
                        self._fill_head(plan, cluster << bits, is_fresh)
                    if index + count == stop and end & self._mask:
                        self._fill_tail(plan, last + 1 << bits, is_fresh)
                index += count
                guest_end = min(end, cluster + count << bits)
                _append(plan.runs, guest, guest_end, host + (guest - (cluster << bits)))
                guest = guest_end
            self._complete(plan)
        except Exception:
            self.give_back(plan)
            raise
        return plan

    def _target(self, plan: Plan, table: array[int], index: int, stop: int, cluster: int) -> tuple[int, int, bool]:
        """Host clusters for entries that cannot be written in place: offset, how many, whether they are zeroes."""
        entry = table[index]
        if self._image.geometry.has_data_file:
            host = cluster << self._bits
            plan.targets.append(Target(cluster, 1, host, is_new=False))
            return host, 1, host >= self._image.map.data.length
        if entry & COPIED:
            # Reserved, and reads as zeroes.
            self._image.map.check_entry(entry, cluster, index)
            host = entry & OFFSET_MASK
            if not host or entry & COMPRESSED:
                raise self._image.corrupt(f"Invalid cluster entry found  (L2 index: {index:#x})")
            self._check(host, 1)
            plan.targets.append(Target(cluster, 1, host, is_new=False))
            return host, 1, False
        count = zero_words(table, index, stop)
        if not count or index + count < stop:
            # What is stored elsewhere is freed there.
            self._image.make_way()
            while index + count < stop and not table[index + count] & COPIED:
                count += 1
        host, got, is_fresh = self._image.allocate(count)
        plan.targets.append(Target(cluster, got, host, is_new=True))
        return host, got, is_fresh

    def _check(self, host: int, count: int) -> None:
        """Refuse to write over metadata. Raises OSError."""
        known = self._image.metadata.clusters
        if known and not self._image.geometry.has_data_file:
            first = host >> self._bits
            for cluster in range(first, first + count):
                if cluster in known:
                    self._image.overlap(known[cluster], host, count << self._bits)

    def _fill_head(self, plan: Plan, low: int, is_fresh: bool) -> None:
        plan.head = self._filling(low, plan.low - low, is_fresh)
        if plan.head:
            plan.low = low

    def _fill_tail(self, plan: Plan, high: int, is_fresh: bool) -> None:
        plan.tail = self._filling(plan.high, high - plan.high, is_fresh)
        if plan.tail:
            plan.high = high

    def _filling(self, offset: int, length: int, is_fresh: bool) -> int:
        """What the guest sees in a part of a cluster now. Raises Cold, OSError."""
        end = offset + length
        backing = self._driver.backing
        lookup = self._image.map.lookup
        while offset < end:
            kind, run, _where, _child = lookup(offset, end - offset)
            if kind == UNALLOCATED:
                if backing is not None and offset < backing.length:
                    return CONTENT
            elif kind != ZERO:
                return CONTENT
            offset += run
        # Zero bytes of the file are no zeroes once they are decrypted.
        return NOTHING if is_fresh and not self._image.is_encrypted else ZEROES

    def _plan_subclusters(self, table: array[int], first: int, last: int, offset: int, end: int) -> Plan:
        """The plan for clusters with extended entries. Raises Cold and OSError with nothing changed."""
        bits, sub_bits = self._bits, self._image.geometry.subcluster_bits
        sub_mask = (1 << sub_bits) - 1
        plan = Plan([], [], offset, end)
        guest = offset
        try:
            for cluster in range(first, last + 1):
                index = cluster & self._slice_mask
                entry, bitmap = table[2 * index], table[2 * index + 1]
                base = cluster << bits
                guest_end = min(end, base + self._mask + 1)
                touched = subclusters(guest - base >> sub_bits, guest_end - 1 - base >> sub_bits)
                if entry & COPIED and not entry & self._odd:
                    host, is_fresh = entry & OFFSET_MASK, False
                    self._check(host, 1)
                    if bitmap & touched != touched:
                        plan.targets.append(Target(cluster, 1, host, False, touched))
                    head = 0 if bitmap >> (guest - base >> sub_bits) & 1 else guest & sub_mask
                    tail = 0 if bitmap >> (guest_end - 1 - base >> sub_bits) & 1 else -guest_end & sub_mask
                elif self._image.geometry.has_data_file:
                    host = base
                    is_fresh = host >= self._image.map.data.length
                    plan.targets.append(Target(cluster, 1, host, False, touched))
                    head, tail = guest & sub_mask, -guest_end & sub_mask
                else:
                    if entry:
                        self._image.make_way()
                    host, _count, is_fresh = self._image.allocate(1)
                    if entry & COMPRESSED:
                        touched = ALL_ALLOCATED
                    elif entry & OFFSET_MASK:
                        # Shared: what it has stored moves, with whatever lies between that and the data.
                        touched = _spanned(touched | bitmap & ALL_ALLOCATED)
                    head = guest - base - (_lowest(touched) << sub_bits)
                    tail = (touched.bit_length() << sub_bits) - (guest_end - base)
                    plan.targets.append(Target(cluster, 1, host, True, touched))
                if cluster == first and head:
                    self._fill_head(plan, guest - head, is_fresh)
                if cluster == last and tail:
                    self._fill_tail(plan, guest_end + tail, is_fresh)
                _append(plan.runs, guest, guest_end, host + guest - base)
                guest = guest_end
            self._complete(plan)
        except Exception:
            self.give_back(plan)
            raise
        return plan

    def _complete(self, plan: Plan) -> None:
        """Take the fillings into the runs, and let the file reach as far as they do. Raises Cold, OSError."""
        _widen(plan)
        data = self._image.map.data
        for start, stop, host in plan.runs:
            self._image.reach(data, host + stop - start)

    def give_back(self, plan: Plan) -> None:
        """Free the clusters of a plan that was not carried out."""
        for target in plan.targets:
            if target.is_new:
                self._image.give_back(target.host, target.count)


def _append(runs: list[tuple[int, int, int]], start: int, stop: int, host: int) -> None:
    """Add a run, joined to the last where that goes on in the file."""
    if runs:
        first, last, at = runs[-1]
        if at + last - first == host:
            runs[-1] = (first, stop, at)
            return
    runs.append((start, stop, host))


def _widen(plan: Plan) -> None:
    """Let the first and the last run take in the fillings."""
    runs = plan.runs
    start, stop, host = runs[0]
    runs[0] = (plan.low, stop, host - (start - plan.low))
    start, stop, host = runs[-1]
    runs[-1] = (start, plan.high, host)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _spanned(bits: int) -> int:
    """The bits from the lowest to the highest that is set."""
    return subclusters(_lowest(bits), bits.bit_length() - 1)


def subclusters(first: int, last: int) -> int:
    """The bits of subclusters ``first`` to ``last`` (included)."""
    return (2 << last) - (1 << first)
