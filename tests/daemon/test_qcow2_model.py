"""An image's life as hypothesis thinks it up, in every variant of qcow2 and as a LUKS volume.

It is used, resized, closed, reopened, amended; bitmaps, snapshots inside and overlays above come and go.

One daemon serves them all. After each life the reference finds the images clean, and sees in them what the guest
does; in between it amends images, goes back to snapshots, and moves what they hold to others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from disk_model import Model
from harness import RunningDaemon
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from qcow2_images import SIZE, VARIANTS, Made, content, img, write_raw
from qcow2_life import OBJECTS, Layer, Life
from soak import SECRET, encrypted
from watching import noted

# More of it when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
Start = Callable[..., RunningDaemon]
STEPS: Final = (
    *("use", "use", "use", "use", "reopen", "read-only", "close and open", "filter", "resize", "resize"),
    *("bitmap", "bitmap", "merge", "snapshot", "snapshot", "drop", "revert", "amend", "amend", "keys"),
    *("overlay", "overlay", "overlay at once", "stream", "stream", "commit", "rebase", "rename"),
)
# Each makes its image where it lives: the image names a file by its path.
FIXED: Final = ("data-file", "data-file-raw")
# Images that a secret opens.
SEALED: Final = {"luks": "qcow2", "volume": "luks"}


def volume(place: Path) -> Made:
    """A LUKS volume, which is no qcow2 image."""
    data = content(6, SIZE)
    raw, path = write_raw(place, "source.raw", data), place / "volume"
    img("convert", "-f", "raw", "-O", "luks", "--object", SECRET, "-o", "key-secret=s,iter-time=10", raw, path)
    return Made(path, data)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """The images as they were made."""
    made = {}
    for name, make in (*VARIANTS.items(), ("luks", encrypted), ("volume", volume)):
        place = tmp_path_factory.mktemp(name)
        made[name] = make(place)
    return made


LENGTH: Final = 8 if EFFORT == 1 else 16


def lives(name: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Steps, each with a number for what it leaves open."""
    kinds = (*STEPS, *["keys"] * 4) if name in SEALED else STEPS
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
            layer = Layer(image, SEALED.get(name, "qcow2"), "s" if name in SEALED else "")
            life = Life(qmp, tmp_path, place, [layer], Model(made.data, chance))
            with noted(name, steps, chance):
                life.open()
                for what, number in (("use", 5), *steps, ("use", 5)):
                    done[what] += life.step(what, number)
                life.close()
                life.judge()
            shutil.rmtree(place)
    # Which ones is chance.
    assert sum(map(bool, done.values())) > len(done) * 3 // 4, done
