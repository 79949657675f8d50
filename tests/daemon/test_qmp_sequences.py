"""Random sequences of commands, for this daemon and the reference: answers, what is there afterwards, images.

QSD_EFFORT=20 plays twenty times as many.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM
from qcow2_images import assert_clean, img
from qmp_sequences import IMAGES, Maker, Step, is_over, make_images, play

SEEDS = 12 * int(os.environ.get("QSD_EFFORT", "1"))
# The reference reopens no node that was added with this option, not even for a job; here it keeps its activity.
NO_DEFAULT = "Option 'active' cannot be reset to its default value"
# Where several things are wrong, each says which it has found first.
ORDERLESS = ("transaction", "blockdev-reopen", "block_resize")


@pytest.fixture(scope="module")
def images(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    make_images(place)
    return place


def gist(step: Step, answer: Any) -> Any:
    """An answer as far as it must be the same."""
    is_error = isinstance(answer, dict) and "error" in answer
    return "refused" if is_error and step.get("execute") in ORDERLESS else answer


@pytest.mark.parametrize("seed", range(SEEDS))
def test_sequence_of_commands(reference: Path, images: Path, tmp_path: Path, seed: int) -> None:
    steps = Maker(seed).sequence()
    places = [shutil.copytree(images, tmp_path / name) for name in ("theirs", "ours")]
    theirs, ours = (
        play(program, place, steps) for program, place in zip(((str(reference),), PROGRAM), places, strict=True)
    )
    assert ours.facts is not None
    told = ""
    for step, one, other in zip(steps, theirs.answers, ours.answers, strict=False):
        told += f"{json.dumps(step)}\n  {json.dumps(other)}\n"
        if NO_DEFAULT in json.dumps(one):
            return
        assert gist(step, other) == gist(step, one), told
        if is_over(step, one):
            return
    if theirs.facts is None:
        return
    assert ours.facts == theirs.facts, told
    for name in sorted({path.name for path in places[0].iterdir()} & {*IMAGES, "o1", "o2", "o3", "o4"}):
        compare_images(name, *places)


def compare_images(name: str, theirs: Path, ours: Path) -> None:
    assert_clean(ours / name)
    one, other = (described(place / name) for place in (theirs, ours))
    assert other == one
    img("compare", "-q", "-f", "qcow2", "-F", "qcow2", theirs / name, ours / name)


def described(image: Path) -> Any:
    """What an image says of itself."""
    info = json.loads(img("info", "--output=json", image))
    specific = info["format-specific"]["data"]
    bitmaps = sorted([each["name"], each["granularity"], each["flags"]] for each in specific.get("bitmaps", []))
    snapshots = [[each["id"], each["name"]] for each in info.get("snapshots", [])]
    backing = [info.get(key) for key in ("backing-filename", "backing-filename-format")]
    return [info["virtual-size"], specific["compat"], bitmaps, snapshots, backing]
