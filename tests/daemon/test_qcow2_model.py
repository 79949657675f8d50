"""A qcow2 image's life as hypothesis thinks it up, in every variant: used, resized, closed, reopened, amended, with
bitmaps, snapshots inside and overlays above.

One daemon serves them all. After each life the reference finds the image clean, and sees in it what the guest does;
in between it amends images, and goes back to snapshots.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from disk_model import Model
from harness import Qmp, RunningDaemon
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from nbd_reader import NbdReader
from qcow2_images import VARIANTS, Made, img, write_raw
from soak import ENCRYPTION, SECRET, encrypted
from watching import noted

# More of it when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
Start = Callable[..., RunningDaemon]
GRANULARITY: Final = 65536
TINY_CACHES: Final = {"l2-cache-size": 1, "l2-cache-entry-size": 512, "refcount-cache-size": 1}
STEPS: Final = (
    *("use", "use", "use", "use", "reopen", "read-only", "close and open", "resize", "resize"),
    *("bitmap", "bitmap", "merge", "snapshot", "snapshot", "drop", "revert", "amend", "amend", "keys"),
    *("overlay", "overlay", "stream", "rename"),
)
# What an overlay may be.
OVERLAYS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"cluster-size": 512},
    {"cluster-size": 16384, "extended-l2": True},
    {"cluster-size": 4096, "lazy-refcounts": True},
    {"version": "v2"},
    {"cluster-size": 4096, "refcount-bits": 64},
)
# Each makes its image where it lives: the image names a file by its path.
FIXED: Final = ("data-file", "data-file-raw")
OBJECTS: Final = ("--object", SECRET, "--object", "secret,id=t,data=other")


@attrs.define(eq=False)
class Life:
    """An image in a daemon, and what is known about it."""

    qmp: Qmp
    # Where the daemon is, and where the images are.
    house: Path
    place: Path
    image: Path
    model: Model
    key: dict[str, Any]
    top: str = "n"
    options: dict[str, Any] = attrs.field(factory=dict)
    # Bitmap -> the granules written since; snapshot -> what it holds.
    bitmaps: dict[str, set[int]] = attrs.field(factory=dict)
    snapshots: dict[str, bytes] = attrs.field(factory=dict)
    # The nodes of the user's, from the top down, and the images there have been.
    nodes: list[str] = attrs.field(factory=list)
    images: list[Path] = attrs.field(factory=list)

    def node(self, **more: Any) -> dict[str, Any]:
        file = {"driver": "file", "filename": str(self.image)}
        encrypt = {"encrypt": {"format": "luks", **self.key}} if self.key else {}
        shown = {"driver": "qcow2", "node-name": self.top, "discard": "unmap", "file": file}
        return {**shown, **encrypt, **self.options, **more}

    def open(self) -> None:
        self.qmp.execute_raw("blockdev-add", self.node())
        self.nodes = [self.top]
        self.compare_bitmaps()

    def close(self) -> None:
        for name in self.nodes:
            self.qmp.execute("blockdev-del", node_name=name)

    def info(self) -> dict[str, Any]:
        """What the daemon says of the node."""
        nodes = self.qmp.execute("query-named-block-nodes")
        found: dict[str, Any] = next(each for each in nodes if each["node-name"] == self.top)
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What it says of its format."""
        found: dict[str, Any] = self.info()["image"]["format-specific"]["data"]
        return found

    @property
    def spec(self) -> str:
        """The image for the reference's tools."""
        key = f",{ENCRYPTION.replace('=s', '=' + self.key['key-secret'])}" if self.key else ""
        return f"driver=qcow2,file.filename={self.image}{key}"

    def img(self, command: str, *words: str) -> None:
        """One of them, on the image."""
        img(command, *OBJECTS, "--image-opts", *words, self.spec)

    def use(self, number: int) -> None:
        """Let a client work."""
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name=self.top, name="d", writable=True)
        with NbdReader(self.house / "nbd.sock", "d") as client:
            self.work(client, number % 12 + 1)
            self.assert_shown(client)
        self.qmp.execute("block-export-del", id="e")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def work(self, client: NbdReader, steps: int) -> None:
        for _ in range(steps):
            changed = self.model.step(client)
            if changed is not None:
                offset, length = changed
                for granules in self.bitmaps.values():
                    granules.update(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))

    def assert_shown(self, client: NbdReader) -> None:
        size = len(self.model.data)
        for start in range(0, size, 1 << 24):
            length = min(1 << 24, size - start)
            assert client.read(start, length) == self.model.data[start : start + length]

    def step(self, what: str, number: int) -> bool:
        """One turn of its life; False if it is one that it cannot take."""
        del self.qmp.events[:]
        take: Callable[[int], Any] = getattr(self, what.replace("-", "_").replace(" ", "_"))
        return take(number) is not NotImplemented

    # -- the node ---------------------------------------------------------------------------------------------

    def reopen(self, number: int) -> None:
        self.options = TINY_CACHES if number % 2 else {}
        self.do_reopen()

    def close_and_open(self, _number: int) -> None:
        self.close()
        self.open()

    def read_only(self, _number: int) -> None:
        self.do_reopen(**{"read-only": True})
        refusal = self.qmp.refusal("block-export-add", type="nbd", id="e", node_name=self.top, writable=True)
        assert refusal == "Cannot export read-only node as writable"
        self.compare_bitmaps()
        self.do_reopen()

    def do_reopen(self, **more: Any) -> None:
        described = self.node(**more)
        for child in self.info()["children"]:
            if child["child"] != "file":
                described[child["child"]] = child["node-name"]
        self.qmp.execute("blockdev-reopen", options=[described])

    def resize(self, number: int) -> Any:
        data = self.model.data
        if self.facts["compat"] == "0.10" and (self.snapshots or "backing-image" in self.info()["image"]):
            return NotImplemented
        size = max(512, len(data) + (number * 12345 % (1 << 20) - (1 << 19)) // 512 * 512)
        self.qmp.execute("block_resize", node_name=self.top, size=size)
        self.take_size(size)
        self.compare_bitmaps()
        return None

    def take_size(self, size: int) -> None:
        """Let the model have that size."""
        data = self.model.data
        del data[size:]
        data.extend(bytes(size - len(data)))
        for granules in self.bitmaps.values():
            granules.intersection_update(range(-(-size // GRANULARITY)))

    # -- bitmaps ----------------------------------------------------------------------------------------------

    def bitmap(self, number: int) -> Any:
        if self.facts["compat"] == "0.10":
            return NotImplemented
        name = f"b{number % 3}"
        if name in self.bitmaps:
            self.qmp.execute("block-dirty-bitmap-remove", node=self.top, name=name)
            del self.bitmaps[name]
        else:
            self.qmp.execute(
                "block-dirty-bitmap-add", node=self.top, name=name, persistent=True, granularity=GRANULARITY
            )
            self.bitmaps[name] = set()
        self.compare_bitmaps()
        return None

    def merge(self, number: int) -> Any:
        names = list(self.bitmaps)
        if len(names) < 2:
            return NotImplemented
        target = names.pop(number % len(names))
        self.qmp.execute("block-dirty-bitmap-merge", node=self.top, target=target, bitmaps=names)
        self.bitmaps[target].update(*(self.bitmaps[name] for name in names))
        self.compare_bitmaps()
        return None

    def compare_bitmaps(self) -> None:
        """The daemon's bitmaps say what was written."""
        found = {each["name"]: each["count"] for each in self.info().get("dirty-bitmaps", ())}
        # The last granule may reach beyond the disk.
        size = -(-len(self.model.data) // 512) * 512
        wanted = {
            name: sum(min(GRANULARITY, size - granule * GRANULARITY) for granule in granules)
            for name, granules in self.bitmaps.items()
        }
        assert found == wanted

    # -- snapshots inside -------------------------------------------------------------------------------------

    def snapshot(self, number: int) -> Any:
        facts = self.facts
        if "data-file" in facts or facts["refcount-bits"] == 1 or f"s{number % 4}" in self.snapshots:
            return NotImplemented
        name = f"s{number % 4}"
        self.qmp.execute("blockdev-snapshot-internal-sync", device=self.top, name=name)
        self.snapshots[name] = bytes(self.model.data)
        return None

    def drop(self, number: int) -> Any:
        if not self.snapshots:
            return NotImplemented
        name = list(self.snapshots)[number % len(self.snapshots)]
        self.qmp.execute("blockdev-snapshot-delete-internal-sync", device=self.top, name=name)
        del self.snapshots[name]
        return None

    def revert(self, number: int) -> Any:
        """The reference lets the disk be what a snapshot holds."""
        names = [name for name, data in self.snapshots.items() if len(data) == len(self.model.data)]
        if not names or self.bitmaps:
            return NotImplemented
        name = names[number % len(names)]
        self.close()
        self.img("snapshot", "-a", name)
        self.model.data[:] = self.snapshots[name]
        self.open()
        return None

    # -- what is closed meanwhile, or not ---------------------------------------------------------------------

    def amend(self, number: int) -> Any:
        """The reference changes what the image is."""
        facts = self.facts
        is_new = facts["compat"] != "0.10"
        size = len(self.model.data) + 512 * (number % 300)
        wanted = [f"refcount_bits={bits}" for bits in (16, 8, 32, 64)] if is_new else ["compat=1.1"]
        if self.info()["image"]["cluster-size"] > 1 << 16:
            # Blocks of so many counts keep the reference busy for minutes.
            del wanted[:]
        if is_new:
            wanted += ["lazy_refcounts=on", "lazy_refcounts=off", "compat=0.10", "compat=0.10"]
        is_even = len(self.model.data) % self.info()["image"]["cluster-size"] == 0
        if not self.snapshots and not self.bitmaps and is_new and is_even:
            # Where the disk ends within a cluster, the reference lets what was cut off there be seen again.
            wanted.append(f"size={size}")
        option = wanted[number % len(wanted)] if wanted else "compat=0.10"
        if option == "compat=0.10" and ("snapshots" in self.info()["image"] or not self.can_be_old(facts)):
            return NotImplemented
        self.close()
        self.img("amend", "-o", option)
        if option.startswith("size"):
            self.take_size(size)
        self.open()
        return None

    def can_be_old(self, facts: dict[str, Any]) -> bool:
        if facts["compat"] == "0.10" or facts["extended-l2"] or facts["lazy-refcounts"] or "data-file" in facts:
            return False
        return facts["refcount-bits"] == 16 and facts["compression-type"] == "zlib" and not self.bitmaps

    def keys(self, number: int) -> Any:
        """Another password: a slot for it, the old slot erased."""
        if not self.key:
            return NotImplemented
        old = self.key["key-secret"]
        new = "t" if old == "s" else "s"
        change: dict[str, Any] = {"state": "active", "new-secret": new, "iter-time": 10}
        if number % 2:
            # In the place of the old one.
            change["keyslot"] = next(at for at, slot in enumerate(self.facts["encrypt"]["slots"]) if slot["active"])
        self.change_keys(force=True, **change)
        if not number % 2:
            del self.qmp.events[:]
            self.change_keys(state="inactive", **{"old-secret": old})
        self.key = {"key-secret": new}
        self.close()
        self.open()
        return None

    def change_keys(self, *, force: bool = False, **change: Any) -> None:
        options = {"driver": "qcow2", "encrypt": {"format": "luks", **change}}
        self.qmp.execute("x-blockdev-amend", job_id="j", node_name=self.top, force=force, options=options)
        assert self.qmp.finish_job("j") is None

    # -- overlays ---------------------------------------------------------------------------------------------

    def overlay(self, number: int) -> Any:
        """What is written from now on goes to a new image."""
        if self.key or len(self.images) > 3:
            return NotImplemented
        path = self.place / f"overlay{len(self.images)}.qcow2"
        name = f"o{len(self.images)}"
        path.touch()
        below = {"backing-file": str(self.image), "backing-fmt": "qcow2", "size": len(self.model.data)}
        file = {"driver": "file", "filename": str(path)}
        options = {"driver": "qcow2", "file": file, **below, **OVERLAYS[number % len(OVERLAYS)]}
        self.qmp.execute("blockdev-create", job_id="j", options=options)
        assert self.qmp.finish_job("j") is None
        self.images.append(self.image)
        old, self.top, self.image = self.top, name, path
        self.qmp.execute_raw("blockdev-add", self.node(backing=None))
        self.qmp.execute("blockdev-snapshot", node=old, overlay=name)
        self.nodes.insert(0, name)
        self.bitmaps, self.snapshots = {}, {}
        return None

    def stream(self, number: int) -> Any:
        """Everything comes into the top image, while a client works; its snapshots would lose what is below."""
        if self.bitmaps or self.snapshots or "backing-image" not in self.info()["image"]:
            return NotImplemented
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name=self.top, name="d", writable=True)
        with NbdReader(self.house / "nbd.sock", "d") as client:
            base: dict[str, Any] = {}
            if number % 2 and len(self.images) > 1:
                base = {"base": str(self.images[0])}
            self.qmp.execute("block-stream", job_id="j", device=self.top, **base)
            self.work(client, number % 8)
            self.qmp.wait_event("BLOCK_JOB_COMPLETED")
            self.assert_shown(client)
        self.qmp.execute("block-export-del", id="e")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED")
        return None

    def rename(self, _number: int) -> Any:
        """The header gets the name it has."""
        shown = self.info()["image"]
        if "backing-filename" not in shown or not self.images:
            return NotImplemented
        name = shown["full-backing-filename"]
        self.qmp.execute("change-backing-file", device=self.top, image_node_name=self.top, backing_file=name)
        return None

    def judge(self) -> None:
        """The reference likes what is left, and sees the same."""
        self.img("check", "-q")
        for image in self.images:
            img("check", "-q", image)
        expected = write_raw(self.place, "expected.raw", bytes(self.model.data))
        img("compare", "-q", *OBJECTS, "--image-opts", self.spec, f"driver=raw,file.filename={expected}")
        for name, data in self.snapshots.items():
            img(
                "convert", *OBJECTS, "-O", "raw", "-l", f"snapshot.name={name}", "--image-opts", self.spec, expected
            )
            # As much of it as the disk has now.
            found = expected.read_bytes()[: len(data)]
            assert found == data[: len(self.model.data)], name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """The images as they were made."""
    made = {}
    for name, make in (*VARIANTS.items(), ("luks", encrypted)):
        place = tmp_path_factory.mktemp(name)
        made[name] = make(place)
    return made


LENGTH: Final = 8 if EFFORT == 1 else 16


def lives(name: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Steps, each with a number for what it leaves open."""
    kinds = (*STEPS, *["keys"] * 8) if name == "luks" else STEPS
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 1000)), min_size=4, max_size=LENGTH)


def think_up(name: str) -> list[tuple[list[tuple[str, int]], int]]:
    """Lives, and a number for their chance: the same every time, unless there is time for others.

    They are lived afterwards: none is shrunk, which would take longer than all the rest.
    """
    found: list[tuple[list[tuple[str, int]], int]] = []

    @settings(max_examples=EFFORT, phases=(Phase.generate,), suppress_health_check=list(HealthCheck), database=None)
    @given(lives(name), st.integers(0, 1 << 30))
    def take(steps: list[tuple[str, int]], chance: int) -> None:
        # The simplest life always comes first, and is none.
        assume(chance)
        found.append((steps, chance))

    (seed(name)(take) if EFFORT == 1 else take)()
    return found


def test_images_live_as_their_guests_know_them(daemon: Start, tmp_path: Path, images: dict[str, Made]) -> None:
    qmp = daemon(*OBJECTS, "--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    done: dict[str, int] = dict.fromkeys(STEPS, 0)
    for name, made in images.items():
        for steps, chance in think_up(name):
            place = tmp_path / "life"
            if name in FIXED:
                place.mkdir()
                image = VARIANTS[name](place).path
            else:
                shutil.copytree(made.path.parent, place)
                image = place / made.path.name
            key = {"key-secret": "s"} if name == "luks" else {}
            life = Life(qmp, tmp_path, place, image, Model(made.data, chance), key)
            with noted(name, steps, chance):
                life.open()
                for what, number in (("use", 5), *steps, ("use", 5)):
                    done[what] += life.step(what, number)
                life.close()
                life.judge()
            shutil.rmtree(place)
    # Which ones is chance.
    assert sum(map(bool, done.values())) > len(done) * 3 // 4, done
