"""An image's life in a daemon, and what is known of it: ``Life`` has a method for each turn it may take.

Where the number that comes with a turn leaves something open, it decides it. A turn that the image cannot take at
present is ``NotImplemented``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
from disk_model import Model
from harness import Qmp
from nbd_reader import NbdReader
from qcow2_images import TINY_CACHES, img, write_raw
from soak import SECRET

GRANULARITY: Final = 65536
OBJECTS: Final = ("--object", SECRET, "--object", "secret,id=t,data=other")
# Fast to make and to open.
QUICK: Final = {"iter-time": 10}
# What an overlay may be.
OVERLAYS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"cluster-size": 512},
    {"cluster-size": 16384, "extended-l2": True},
    {"cluster-size": 4096, "lazy-refcounts": True},
    {"version": "v2"},
    {"cluster-size": 4096, "refcount-bits": 64},
    {"encrypt": {"format": "luks", "key-secret": "t", **QUICK}},
    {"data-file": "data", "cluster-size": 16384},
    {"encrypt": {"format": "luks", "key-secret": "s", **QUICK}, "data-file": "data"},
)


@attrs.define(eq=False)
class Layer:
    """An image of a chain. ``key``: id of the secret that opens it, if it needs one."""

    path: Path
    driver: str = "qcow2"
    key: str = ""

    def options(self) -> dict[str, Any]:
        """How a node of it is opened."""
        shown: dict[str, Any] = {"driver": self.driver, "file": {"driver": "file", "filename": str(self.path)}}
        if self.driver == "luks":
            shown["key-secret"] = self.key
        elif self.key:
            shown["encrypt"] = {"format": "luks", "key-secret": self.key}
        return shown


@attrs.define(eq=False)
class Life:
    """See the module. ``layers``: the images, from the top down, without those that were there before it began."""

    qmp: Qmp
    # Where the daemon is, and where the images are.
    house: Path
    place: Path
    layers: list[Layer]
    model: Model
    caches: dict[str, int] = attrs.field(factory=dict)
    # Bitmap -> the granules written since; snapshot -> what it holds.
    bitmaps: dict[str, set[int]] = attrs.field(factory=dict)
    snapshots: dict[str, bytes] = attrs.field(factory=dict)
    # The nodes of the user's, from the top down, each with its image.
    nodes: dict[str, Layer] = attrs.field(factory=dict)
    # Images that nobody needs any more.
    left: list[Layer] = attrs.field(factory=list)
    names: int = 0

    @property
    def top(self) -> str:
        """The node that guests use."""
        return next(iter(self.nodes))

    @property
    def image(self) -> Layer:
        """Its image."""
        return self.layers[0]

    def new_name(self) -> str:
        """For a node or a file."""
        self.names += 1
        return f"n{self.names}"

    def node(self, name: str, layer: Layer, **more: Any) -> dict[str, Any]:
        """How that node is opened."""
        shown = {"node-name": name, "discard": "unmap", **layer.options()}
        return {**shown, **(self.caches if layer.driver == "qcow2" else {}), **more}

    def below(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """How what lies below an image is opened, where its header does not say it all."""
        if not any(each.key for each in layers):
            return {}
        lower = self.below(layers[1:])
        return {"backing": {**layers[0].options(), **lower}}

    def open(self, *, apart: bool = False) -> None:
        """Open the images; ``apart``: each is a node of the user's."""
        found: dict[str, Layer] = {}
        below: dict[str, Any] = {}
        if apart:
            for layer in reversed(self.layers[1:]):
                name = self.new_name()
                self.qmp.execute_raw("blockdev-add", self.node(name, layer, **{"read-only": True, **below}))
                found, below = {name: layer, **found}, {"backing": name}
        else:
            below = self.below(self.layers[1:])
        name = self.new_name()
        self.qmp.execute_raw("blockdev-add", self.node(name, self.image, **below))
        self.nodes = {name: self.image, **found}
        self.compare_bitmaps()

    def close(self) -> None:
        """Close them."""
        for name in self.nodes:
            self.qmp.execute("blockdev-del", node_name=name)

    def info(self, name: str = "") -> dict[str, Any]:
        """What the daemon says of a node."""
        nodes = self.qmp.execute("query-named-block-nodes")
        found: dict[str, Any] = next(each for each in nodes if each["node-name"] == (name or self.top))
        return found

    def chain(self) -> list[str]:
        """The nodes there are, from the top down."""
        found = [self.top]
        nodes = {each["node-name"]: each for each in self.qmp.execute("query-named-block-nodes")}
        while lower := [each for each in nodes[found[-1]]["children"] if each["child"] == "backing"]:
            found.append(lower[0]["node-name"])
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What it says of its format."""
        found: dict[str, Any] = self.info()["image"]["format-specific"]["data"]
        return found

    @property
    def is_qcow2(self) -> bool:
        """Whether the top is."""
        return self.image.driver == "qcow2"

    @property
    def is_new(self) -> bool:
        """Whether it is qcow2 of version 3."""
        return self.is_qcow2 and self.facts["compat"] != "0.10"

    @property
    def has_backing(self) -> bool:
        """Whether it has a backing file."""
        return "backing-image" in self.info()["image"]

    @property
    def is_bare(self) -> bool:
        """Whether what is in the image may come from elsewhere: neither bitmaps nor snapshots mind."""
        return not self.bitmaps and not self.snapshots

    def spec(self, at: int = 0) -> str:
        """An image for the reference's tools."""
        return described(self.layers[at], **self.below(self.layers[at + 1 :]))

    def img(self, command: str, *words: str) -> None:
        """One of them, on the image."""
        img(command, *OBJECTS, *words, self.spec())

    # -- guests -----------------------------------------------------------------------------------------------

    @contextmanager
    def client(self) -> Iterator[NbdReader]:
        """A guest's; in the end it has seen everything."""
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name=self.top, name="d", writable=True)
        with NbdReader(self.house / "nbd.sock", "d") as client:
            yield client
            self.assert_shown(client)
        self.qmp.execute("block-export-del", id="e")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def use(self, number: int) -> None:
        """Let a client work."""
        with self.client() as client:
            self.work(client, number % 12 + 1)

    def work(self, client: NbdReader, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            changed = self.model.step(client)
            if changed is not None:
                offset, length = changed
                for granules in self.bitmaps.values():
                    granules.update(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))

    def assert_shown(self, client: NbdReader) -> None:
        """The disk is as it should be."""
        size = len(self.model.data)
        for start in range(0, size, 1 << 24):
            length = min(1 << 24, size - start)
            assert client.read(start, length) == self.model.data[start : start + length]

    def step(self, what: str, number: int) -> bool:
        """One turn of its life; False if it is one that it cannot take."""
        del self.qmp.events[:]
        take: Callable[[int], Any] = getattr(self, what.replace("-", "_").replace(" ", "_"))
        return take(number) is not NotImplemented

    def finish(self) -> None:
        """The job must succeed."""
        assert self.qmp.finish_job("j") is None

    # -- the node ---------------------------------------------------------------------------------------------

    def reopen(self, number: int) -> None:
        """With other options; all of the user's nodes at once, or the top."""
        self.caches = dict(TINY_CACHES) if number % 2 else {}
        self.do_reopen(*(list(self.nodes)[1:] if number % 3 else ()))

    def close_and_open(self, number: int) -> None:
        """As one node, or as one for each image."""
        self.close()
        self.open(apart=number % 2 == 1)

    def read_only(self, _number: int) -> None:
        """For a while."""
        self.do_reopen(**{"read-only": True})
        refusal = self.qmp.refusal("block-export-add", type="nbd", id="e", node_name=self.top, writable=True)
        assert refusal == "Cannot export read-only node as writable"
        self.compare_bitmaps()
        self.do_reopen()

    def reopened(self, name: str, **more: Any) -> dict[str, Any]:
        """How a node is opened again, on the children that it has."""
        shown, wanted = self.info(name), self.node(name, self.nodes[name], **more)
        for child in shown["children"]:
            if child["child"] == "backing":
                wanted.setdefault("backing", child["node-name"])
            elif child["child"] == "data-file":
                # By its name it would stay read-only when the image does not, as with the reference.
                path = shown["image"]["format-specific"]["data"]["data-file"]
                wanted["data-file"] = {"driver": "file", "filename": path}
        return wanted

    def do_reopen(self, *lower: str, **more: Any) -> None:
        """The top with other options, and nodes below it."""
        wanted = [self.reopened(name, **{"read-only": True}) for name in lower]
        self.qmp.execute("blockdev-reopen", options=[self.reopened(self.top, **more), *wanted])

    def filter(self, number: int) -> Any:
        """A node comes between the image and its backing file, and goes again."""
        chain = self.chain()
        if len(chain) < 2:
            return NotImplemented
        name = self.new_name()
        self.qmp.execute("blockdev-add", driver="raw", node_name=name, file=chain[1], read_only=True)
        self.do_reopen(backing=name)
        assert self.chain()[1] == name
        self.use(number)
        self.do_reopen(backing=chain[1])
        self.qmp.execute("blockdev-del", node_name=name)
        assert self.chain() == chain
        return None

    def resize(self, number: int) -> Any:
        """By half a MiB at most."""
        data = self.model.data
        if self.is_qcow2 and not self.is_new and (self.snapshots or self.has_backing):
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
        if self.is_qcow2:
            data.extend(bytes(size - len(data)))
        elif size > len(data):
            # What is new in the file is decrypted, too.
            with self.client() as client:
                data.extend(client.read(len(data), size - len(data)))
        for granules in self.bitmaps.values():
            granules.intersection_update(range(-(-size // GRANULARITY)))

    # -- bitmaps ----------------------------------------------------------------------------------------------

    def bitmap(self, number: int) -> Any:
        """Add one or remove it."""
        if not self.is_new:
            return NotImplemented
        name = f"b{number % 3}"
        if name in self.bitmaps:
            self.qmp.execute("block-dirty-bitmap-remove", node=self.top, name=name)
            del self.bitmaps[name]
        else:
            self.qmp.execute_raw("block-dirty-bitmap-add", bitmap(self.top, name))
            self.bitmaps[name] = set()
        self.compare_bitmaps()
        return None

    def merge(self, number: int) -> Any:
        """All the others into one."""
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
        # The last granule counts whole, even where it reaches beyond the disk.
        wanted = {name: GRANULARITY * len(granules) for name, granules in self.bitmaps.items()}
        assert found == wanted

    # -- snapshots inside -------------------------------------------------------------------------------------

    def snapshot(self, number: int) -> Any:
        """Make one."""
        if not self.is_qcow2:
            return NotImplemented
        facts = self.facts
        if "data-file" in facts or facts["refcount-bits"] == 1 or f"s{number % 4}" in self.snapshots:
            return NotImplemented
        name = f"s{number % 4}"
        self.qmp.execute("blockdev-snapshot-internal-sync", device=self.top, name=name)
        self.snapshots[name] = bytes(self.model.data)
        return None

    def drop(self, number: int) -> Any:
        """Delete one."""
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

    # -- what the image is ------------------------------------------------------------------------------------

    def amend(self, number: int) -> Any:
        """The reference changes it."""
        if not self.is_qcow2:
            return NotImplemented
        facts = self.facts
        size = len(self.model.data) + 512 * (number % 300)
        wanted = [f"refcount_bits={bits}" for bits in (16, 8, 32, 64)] if self.is_new else ["compat=1.1"]
        if self.info()["image"]["cluster-size"] > 1 << 16:
            # Blocks of so many counts keep the reference busy for minutes.
            del wanted[:]
        if self.is_new:
            wanted += ["lazy_refcounts=on", "lazy_refcounts=off", "compat=0.10", "compat=0.10"]
        if facts.get("data-file-raw"):
            wanted += ["data_file_raw=off"] * 3
        is_even = len(self.model.data) % self.info()["image"]["cluster-size"] == 0
        if self.is_bare and self.is_new and is_even:
            # Where the disk ends within a cluster, the reference lets what was cut off there be seen again.
            wanted.append(f"size={size}")
        option = wanted[number % len(wanted)] if wanted else "compat=0.10"
        if option == "compat=0.10" and ("snapshots" in self.info()["image"] or not self.can_be_old(facts)):
            return NotImplemented
        self.close()
        self.img("amend", "-o", option)
        self.open()
        if option.startswith("size"):
            self.take_size(size)
        return None

    def can_be_old(self, facts: dict[str, Any]) -> bool:
        """Whether it can be version 2."""
        if facts["compat"] == "0.10" or facts["extended-l2"] or facts["lazy-refcounts"] or "data-file" in facts:
            return False
        if self.image.key:
            # The reference then writes the zeroes that version 2 has no mark for unencrypted.
            return False
        return facts["refcount-bits"] == 16 and facts["compression-type"] == "zlib" and not self.bitmaps

    def keys(self, number: int) -> Any:
        """Another password: a slot for it, the old slot erased; by the reference, or here."""
        old = self.image.key
        if not old:
            return NotImplemented
        new = "t" if old == "s" else "s"
        change: dict[str, Any] = {"state": "active", "new-secret": new, **QUICK}
        if number % 3 == 0:
            self.close()
            self.change_keys_there(change)
            self.change_keys_there({"state": "inactive", "old-secret": old})
        else:
            if number % 3 == 1:
                # In the place of the old one.
                slots = self.facts["encrypt"]["slots"] if self.is_qcow2 else self.facts["slots"]
                change["keyslot"] = next(at for at, slot in enumerate(slots) if slot["active"])
            self.change_keys(change, force=True)
            if number % 3 == 2:
                self.change_keys({"state": "inactive", "old-secret": old})
            self.close()
        self.image.key = new
        self.open()
        return None

    def change_keys(self, change: dict[str, Any], *, force: bool = False) -> None:
        """While somebody uses the image."""
        with self.client() as client:
            options = change if not self.is_qcow2 else {"encrypt": {"format": "luks", **change}}
            self.qmp.execute(
                "x-blockdev-amend",
                job_id="j",
                node_name=self.top,
                force=force,
                options={"driver": self.image.driver, **options},
            )
            self.work(client, 3)
            self.finish()

    def change_keys_there(self, change: dict[str, Any]) -> None:
        """By the reference."""
        prefix = "encrypt." if self.is_qcow2 else ""
        self.img("amend", "-o", ",".join(f"{prefix}{name}={value}" for name, value in change.items()))

    # -- overlays ---------------------------------------------------------------------------------------------

    def overlay(self, number: int) -> Any:
        """What is written from now on goes to a new image; a bitmap may note it from the first byte on."""
        if len(self.layers) > 3:
            return NotImplemented
        layer, options = self.new_overlay(number)
        self.create(layer, options)
        old, name = self.top, self.new_name()
        self.qmp.execute_raw("blockdev-add", self.node(name, layer, backing=None))
        taken = {"node": old, "overlay": name}
        has_bitmap = number % 4 == 0 and options.get("version") != "v2"
        if has_bitmap:
            actions = [("blockdev-snapshot", taken), ("block-dirty-bitmap-add", bitmap(name, "b0"))]
            self.qmp.execute("transaction", actions=[{"type": kind, "data": data} for kind, data in actions])
        else:
            self.qmp.execute_raw("blockdev-snapshot", taken)
        self.put_on_top(name, layer)
        if has_bitmap:
            self.bitmaps["b0"] = set()
        self.compare_bitmaps()
        return None

    def new_overlay(self, number: int) -> tuple[Layer, dict[str, Any]]:
        """An overlay to be, and how it is made."""
        options = OVERLAYS[number % len(OVERLAYS)]
        layer = Layer(self.place / f"{self.new_name()}.qcow2", key=options.get("encrypt", {}).get("key-secret", ""))
        below = {"backing-file": str(self.image.path), "backing-fmt": self.image.driver}
        return layer, {"driver": "qcow2", "size": len(self.model.data), **below, **options}

    def create(self, layer: Layer, options: dict[str, Any]) -> None:
        """Make an image, and its data file."""
        files = {"file": layer.path} | (
            {"data-file": layer.path.with_suffix(".data")} if "data-file" in options else {}
        )
        for name, path in files.items():
            path.touch()
            self.qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(path))
        self.qmp.execute("blockdev-create", job_id="j", options={**options, **{name: name for name in files}})
        self.finish()
        for name in files:
            self.qmp.execute("blockdev-del", node_name=name)

    def put_on_top(self, name: str, layer: Layer) -> None:
        """It has neither bitmaps nor snapshots."""
        self.layers.insert(0, layer)
        self.nodes = {name: layer, **self.nodes}
        self.bitmaps, self.snapshots = {}, {}

    def overlay_at_once(self, number: int) -> Any:
        """A new image in the midst of a guest's work, which is its only user: with it the image is closed."""
        if len(self.layers) > 3:
            return NotImplemented
        layer = Layer(self.place / f"{self.new_name()}.qcow2")
        mode = "absolute-paths"
        if number % 2:
            layer, options = self.new_overlay(number % 6)
            self.create(layer, options)
            mode = "existing"
        name = self.new_name()
        with self.client() as client:
            self.work(client, 3)
            taken = {
                "node-name": self.top,
                "snapshot-file": str(layer.path),
                "snapshot-node-name": name,
                "mode": mode,
            }
            self.qmp.execute_raw("blockdev-snapshot-sync", taken)
            old = self.nodes
            self.put_on_top(name, layer)
            self.compare_bitmaps()
            self.work(client, 5)
        self.nodes = old
        self.close()
        self.open(apart=number % 3 == 0)
        return None

    def stream(self, number: int) -> Any:
        """Content comes into the top image, or into one below, while a client works.

        Snapshots of the top would lose what is below.
        """
        if not self.is_bare or not self.has_backing:
            return NotImplemented
        chain = self.chain()
        # Into this one, from those above that one (which need not be there).
        into = 1 if number % 5 == 4 and len(self.layers) > 2 else 0
        base = into + 2 if number % 2 and len(self.layers) > into + 2 else len(chain)
        where: dict[str, Any] = {}
        if base < len(chain):
            lower = self.info(chain[base])["image"]["filename"]
            ways = ({"base": lower}, {"base-node": chain[base]}, {"bottom": chain[base - 1]})
            where = dict(ways[number % 3])
            if number % 4 == 3:
                where["backing-file"] = str(self.layers[base].path)
        with self.client() as client:
            self.qmp.execute_raw("block-stream", {"job-id": "j", "device": chain[into], **where})
            self.work(client, number % 8)
            self.qmp.wait_event("BLOCK_JOB_COMPLETED")
        self.left += self.layers[into + 1 : base]
        del self.layers[into + 1 : base]
        assert self.chain() == [*chain[: into + 1], *chain[base:]]
        return None

    def commit(self, _number: int) -> Any:
        """The reference moves everything into the image below, which has the same size."""
        if not self.is_bare or len(self.layers) < 2 or any(each.key for each in self.layers):
            return NotImplemented
        lower = self.info(self.chain()[1])["image"]
        if lower["virtual-size"] != len(self.model.data) or "snapshots" in lower or lower.get("dirty-flag"):
            return NotImplemented
        if lower["format-specific"]["data"].get("bitmaps"):
            return NotImplemented
        self.close()
        img("commit", "-q", "-d", self.image.path)
        self.left.append(self.layers.pop(0))
        self.open()
        return None

    def rebase(self, number: int) -> Any:
        """The reference takes away what lies below: all of it, or the next image."""
        if not self.is_bare or len(self.layers) < 2 or any(each.key for each in self.layers):
            return NotImplemented
        self.close()
        if number % 2 and len(self.layers) > 2:
            img("rebase", "-q", "-b", self.layers[2].path, "-F", "qcow2", self.image.path)
            self.left.append(self.layers.pop(1))
        else:
            img("rebase", "-q", "-b", "", self.image.path)
            self.left += self.layers[1:]
            del self.layers[1:]
        self.open()
        return None

    def rename(self, number: int) -> Any:
        """The header gets the name it has; that of an image below, too, which is not to be written otherwise."""
        chain = self.chain()
        at = number % min(2, len(self.layers))
        shown = self.info(chain[at])["image"]
        if "backing-filename" not in shown or len(self.layers) < at + 2:
            return NotImplemented
        name = str(self.layers[at + 1].path)
        self.qmp.execute("change-backing-file", device=self.top, image_node_name=chain[at], backing_file=name)
        assert self.info(chain[at])["image"]["backing-filename"] == name
        return None

    # -- the end ----------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """The reference likes what is left, and sees the same."""
        for at, layer in enumerate(self.layers):
            if layer.driver == "qcow2":
                img("check", "-q", *OBJECTS, self.spec(at))
        for layer in self.left:
            if layer.driver == "qcow2":
                img("check", "-q", *OBJECTS, described(layer, backing=None))
        expected = write_raw(self.place, "expected.raw", bytes(self.model.data))
        img("compare", "-q", *OBJECTS, "-F", "raw", self.spec(), expected)
        for name, data in self.snapshots.items():
            img("convert", *OBJECTS, "-O", "raw", "-l", f"snapshot.name={name}", self.spec(), expected)
            # As much of it as the disk has now.
            found = expected.read_bytes()[: len(data)]
            assert found == data[: len(self.model.data)], name


def described(layer: Layer, **more: Any) -> str:
    """An image for the reference's tools."""
    return "json:" + json.dumps({**layer.options(), **more})


def bitmap(node: str, name: str) -> dict[str, Any]:
    """What it takes to add one."""
    return {"node": node, "name": name, "persistent": True, "granularity": GRANULARITY}
