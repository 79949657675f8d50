"""A qcow2 image's life as hypothesis thinks it up: used, resized, closed, reopened, with bitmaps, in every variant.

One daemon serves them all. After each life the reference finds the image clean, and sees in it what the guest does.
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
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nbd_reader import NbdReader
from qcow2_images import VARIANTS, Made, img, write_raw

# More of it when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
Start = Callable[..., RunningDaemon]
GRANULARITY: Final = 65536
TINY_CACHES: Final = {"l2-cache-size": 1, "l2-cache-entry-size": 512, "refcount-cache-size": 1}
STEPS: Final = ("use", "use", "use", "reopen", "read-only", "close", "bitmap", "resize")


@attrs.define(eq=False)
class Life:
    """An image in a daemon, and what is known about it."""

    qmp: Qmp
    place: Path
    image: Path
    model: Model
    has_bitmaps: bool
    options: dict[str, Any] = attrs.field(factory=dict)
    # Bitmap -> the granules written since.
    bitmaps: dict[str, set[int]] = attrs.field(factory=dict)

    def node(self, **more: Any) -> dict[str, Any]:
        file = {"driver": "file", "filename": str(self.image)}
        return {"driver": "qcow2", "node-name": "n", "discard": "unmap", "file": file, **self.options, **more}

    def open(self) -> None:
        self.qmp.execute_raw("blockdev-add", self.node())
        self.compare_bitmaps()

    def close(self) -> None:
        self.qmp.execute("blockdev-del", node_name="n")

    def use(self, steps: int) -> None:
        """Let a client work."""
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
        with NbdReader(self.place / "nbd.sock", "d") as client:
            assert client.size >= len(self.model.data)
            for _ in range(steps):
                changed = self.model.step(client)
                if changed is not None:
                    offset, length = changed
                    for granules in self.bitmaps.values():
                        granules.update(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))
            assert client.read(0, len(self.model.data)) == self.model.data
        self.qmp.execute("block-export-del", id="e")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def step(self, what: str, number: int) -> None:
        """One turn of its life."""
        if what == "use":
            self.use(number % 12 + 1)
        elif what == "reopen":
            self.options = TINY_CACHES if number % 2 else {}
            self.reopen()
        elif what == "read-only":
            self.reopen(**{"read-only": True})
            refusal = self.qmp.refusal("block-export-add", type="nbd", id="e", node_name="n", writable=True)
            assert refusal == "Cannot export read-only node as writable"
            self.compare_bitmaps()
            self.reopen()
        elif what == "close":
            self.close()
            self.open()
        elif what == "bitmap":
            self.change_bitmaps(f"b{number % 3}")
        elif what == "resize" and not self.bitmaps:
            self.resize(number)

    def reopen(self, **more: Any) -> None:
        described = self.node(**more)
        info = next(each for each in self.qmp.execute("query-named-block-nodes") if each["node-name"] == "n")
        for child in info["children"]:
            if child["child"] != "file":
                described[child["child"]] = child["node-name"]
        self.qmp.execute("blockdev-reopen", options=[described])

    def change_bitmaps(self, name: str) -> None:
        if not self.has_bitmaps:
            return
        if name in self.bitmaps:
            self.qmp.execute("block-dirty-bitmap-remove", node="n", name=name)
            del self.bitmaps[name]
        else:
            self.qmp.execute(
                "block-dirty-bitmap-add", node="n", name=name, persistent=True, granularity=GRANULARITY
            )
            self.bitmaps[name] = set()
        self.compare_bitmaps()

    def resize(self, number: int) -> None:
        data = self.model.data
        size = max(512, len(data) + (number * 12345 % (1 << 20) - (1 << 19)) // 512 * 512)
        self.qmp.execute("block_resize", node_name="n", size=size)
        del data[size:]
        data.extend(bytes(size - len(data)))

    def compare_bitmaps(self) -> None:
        """The daemon's bitmaps say what was written."""
        info = next(each for each in self.qmp.execute("query-named-block-nodes") if each["node-name"] == "n")
        found = {each["name"]: each["count"] for each in info.get("dirty-bitmaps", ())}
        # The last granule may reach beyond the disk.
        size = -(-len(self.model.data) // 512) * 512
        wanted = {
            name: sum(min(GRANULARITY, size - granule * GRANULARITY) for granule in granules)
            for name, granules in self.bitmaps.items()
        }
        assert found == wanted

    def judge(self) -> None:
        """The reference likes what is left, and sees the same."""
        img("check", "-q", self.image)
        expected = write_raw(self.place, "expected.raw", bytes(self.model.data))
        img("compare", "-q", "-f", "qcow2", "-F", "raw", self.image, expected)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """The images as they were made."""
    made = {}
    for name, make in VARIANTS.items():
        place = tmp_path_factory.mktemp(name)
        made[name] = make(place)
    return made


lives = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1000)), min_size=3, max_size=10)


def test_images_live_as_their_guests_know_them(daemon: Start, tmp_path: Path, images: dict[str, Made]) -> None:
    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    numbers = iter(range(1 << 30))

    # No shrinking: it would take longer than all the rest.
    @settings(
        max_examples=EFFORT,
        deadline=None,
        derandomize=EFFORT == 1,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(lives, st.integers(0, 1 << 30))
    def live(steps: list[tuple[str, int]], seed: int) -> None:
        place = tmp_path / f"life{next(numbers)}"
        shutil.copytree(made.path.parent, place)
        life = Life(qmp, tmp_path, place / made.path.name, Model(made.data, seed), name not in ("v2", "old"))
        life.open()
        for step in (("use", 5), *steps, ("use", 5)):
            life.step(*step)
        life.close()
        life.judge()
        shutil.rmtree(place)

    for name, made in images.items():  # noqa: B007  # ``live`` looks at them
        if not name.startswith("data-file"):
            live()
