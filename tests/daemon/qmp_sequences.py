"""Random sequences of QMP commands about images, bitmaps, snapshots and activity, and what a daemon makes of them.

Names are few, so that commands meet; about every other one can be done. Where the reference leaves a refused
transaction, reopen or change of activity half done, or dies, the comparison ends (``is_over``).
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
from harness import DEADLINE, Qmp
from nbd_reader import TRIM, WRITE_ZEROES, NbdError, NbdReader
from qcow2_images import img, io

Step = dict[str, Any]
KIB: Final = 1 << 10
SIZE: Final = 1 << 20
BITMAPS: Final = ("b0", "b0", "b1", "b1", "b2", "nope")
# Options of the images, and the commands of qemu-io that fill them.
IMAGES: Final = {
    "base": ((), ("write -P 1 0 256k", "write -P 2 512k 64k")),
    "top": (("-b", "base", "-F", "qcow2"), ("write -P 3 128k 200k", "write -z 512k 64k")),
    "old": (("-o", "compat=0.10,cluster_size=4k"), ("write -P 5 0 100k",)),
    "sub": (("-o", "extended_l2=on,lazy_refcounts=on"), ("write -P 7 0 10k", "write -P 8 100k 100k")),
    "small": (("-o", "cluster_size=512"), ("write -P 10 0 20k",)),
    "over": ((), ()),
}
NBD: Final = {"zero": WRITE_ZEROES, "trim": TRIM}


def make_images(place: Path) -> None:
    """Two bitmaps in ``top``, one in ``small``; a snapshot in ``old`` and ``sub``."""
    for name, (options, filling) in IMAGES.items():
        img("create", "-q", "-f", "qcow2", *options, place / name, *([] if "-b" in options else [str(SIZE)]))
        if filling:
            io(place / name, *filling)
    img("bitmap", "--add", place / "top", "b0")
    img("bitmap", "--add", "--disable", "-g", "4096", place / "top", "b1")
    img("bitmap", "--add", "-g", "512", place / "small", "b0")
    for name in ("old", "sub"):
        img("snapshot", "-c", "s0", place / name)


# -- making them --------------------------------------------------------------------------------------------------


def call(name: str, /, **arguments: Any) -> Step:
    """A command without the arguments that are ``...``."""
    given = {key.replace("_", "-"): value for key, value in arguments.items() if value is not ...}
    return {"execute": name, "arguments": given}


class Maker:
    """One sequence a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.choice = self.random.choice
        self.nodes: list[str] = []
        self.overlays = 0

    def maybe(self, chance: float, *values: Any) -> Any:
        """One of the values now and then."""
        return self.choice(values) if self.random.random() < chance else ...

    def sequence(self) -> list[Step]:
        """Some images that are opened and exported, and then anything."""
        steps = [call("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})]
        for name in self.random.sample(list(IMAGES), 3):
            steps += self.open(name)
            if self.random.random() < 0.7:
                steps.append(self.export(name))
        makers = [maker for maker, weight in self.weights().items() for _ in range(weight)]
        for _ in range(self.random.randint(6, 18)):
            steps += self.choice(makers)()
        return steps

    def weights(self) -> dict[Any, int]:
        """What there is to be done, and how often."""
        several = [
            ((self.rename, self.look), 1),
            ((self.snapshot, self.uninternal, self.resize, self.stream), 2),
            ((self.sync, self.stack, self.internal, self.close, self.unexport, self.another, self.exported), 3),
            ((self.merge, self.activate, self.reopen), 4),
            ((self.transaction,), 5),
            ((self.write, self.bitmap), 9),
        ]
        return {maker: weight for makers, weight in several for maker in makers}

    def disk(self) -> str:
        """A node, or a name that none may have."""
        return self.choice([*self.nodes * 3, "nope", "o1", "o2"])

    def node(self) -> str:
        """The same, or a file: they are as long as each daemon likes them."""
        return self.choice([self.disk(), self.disk(), self.disk(), "f-" + self.choice([*IMAGES])])

    def open(self, name: str) -> list[Step]:
        file = call("blockdev-add", driver="file", node_name=f"f-{name}", filename=name)
        self.nodes.append(name)
        return [file, call("blockdev-add", node_name=name, **self.options(name), active=self.maybe(0.1, False))]

    def another(self) -> list[Step]:
        return self.open(self.choice([*IMAGES]))

    def options(self, name: str) -> dict[str, Any]:
        backing = ("base", None, *self.nodes) if name == "top" else (None,)
        given = {
            "read_only": self.maybe(0.2, True),
            "backing": self.maybe(0.5, *backing),
            "lazy_refcounts": self.maybe(0.1, True, False),
            "discard": self.maybe(0.2, "unmap"),
            "detect_zeroes": self.maybe(0.1, "on"),
        }
        return {"driver": "qcow2", "file": f"f-{name}"} | given

    def export(self, name: str) -> Step:
        shown, asleep = self.maybe(0.2, ["b0"], ["b1"]), self.maybe(0.3, True)
        names = {"type": "nbd", "id": f"e-{name}", "node_name": name, "name": f"x-{name}"}
        writable = self.random.random() < 0.8
        return call("block-export-add", **names, writable=writable, bitmaps=shown, allow_inactive=asleep)

    def exported(self) -> list[Step]:
        return [self.export(self.node())]

    def unexport(self) -> list[Step]:
        return [call("block-export-del", id=f"e-{self.node()}", mode="hard")]

    def write(self) -> list[Step]:
        kind, fill = self.choice(("write", "write", "zero", "trim")), self.random.randrange(1, 256)
        offset, length = self.choice((0, 4, 64, 300, 512, 700)), self.choice((1, 4, 64, 100, 300))
        place = {"offset": offset * KIB, "length": length * KIB}
        return [{"nbd": kind, "export": f"x-{self.choice([*self.nodes, self.node()])}", "fill": fill, **place}]

    def one_bitmap(self) -> dict[str, str]:
        return {"node": self.node(), "name": self.choice(BITMAPS)}

    def bitmap(self) -> list[Step]:
        kind = self.choice(("add", "add", "remove", "clear", "enable", "disable"))
        if kind != "add":
            return [call(f"block-dirty-bitmap-{kind}", **self.one_bitmap())]
        more = {"persistent": self.maybe(0.6, True, True, False), "disabled": self.maybe(0.2, True)}
        granularity = self.maybe(0.4, 512, 4096, 65536, SIZE, 1000)
        return [call("block-dirty-bitmap-add", **self.one_bitmap(), **more, granularity=granularity)]

    def merge(self) -> list[Step]:
        sources = [self.choice((self.choice(BITMAPS), self.one_bitmap())) for _ in range(self.random.randint(1, 2))]
        target = self.choice(BITMAPS)
        return [call("block-dirty-bitmap-merge", node=self.node(), target=target, bitmaps=sources)]

    def transaction(self) -> list[Step]:
        actions = []
        for _ in range(self.random.randint(1, 3)):
            (step,) = self.choice((self.bitmap, self.bitmap, self.merge, self.sync, self.snapshot, self.internal))()
            # The reference dies when one of these two is undone that could not be done.
            if step["execute"] not in ("block-dirty-bitmap-enable", "block-dirty-bitmap-disable"):
                actions.append({"type": step["execute"], "data": step["arguments"]})
        return [call("transaction", actions=actions)]

    def sync(self) -> list[Step]:
        name = f"o{self.random.randint(1, 4)}"
        names = {"snapshot_file": name, "snapshot_node_name": self.choice((name, name, name, self.node()))}
        return [call("blockdev-snapshot-sync", node_name=self.disk(), **names)]

    def snapshot(self) -> list[Step]:
        return [call("blockdev-snapshot", node=self.disk(), overlay=self.choice((self.node(), "over")))]

    def stack(self) -> list[Step]:
        """An overlay is made step by step."""
        self.overlays += 1
        name = f"made{self.overlays}"
        file = {"driver": "file", "filename": name}
        return [
            call("blockdev-create", job_id="j", options={**file, "size": 0}),
            call("blockdev-add", node_name=f"f-{name}", **file),
            call("blockdev-create", job_id="j", options={"driver": "qcow2", "file": f"f-{name}", "size": SIZE}),
            call("blockdev-add", driver="qcow2", node_name=name, file=f"f-{name}", backing=None),
            call("blockdev-snapshot", node=self.disk(), overlay=name),
        ]

    def internal(self) -> list[Step]:
        name = self.choice(("s0", "s1", "s2", ""))
        return [call("blockdev-snapshot-internal-sync", device=self.node(), name=name)]

    def uninternal(self) -> list[Step]:
        names = {"name": self.choice(("s0", "s1", "s2")), "id": self.maybe(0.3, "1", "2")}
        return [call("blockdev-snapshot-delete-internal-sync", device=self.node(), **names)]

    def resize(self) -> list[Step]:
        return [
            call("block_resize", node_name=self.choice(self.nodes), size=SIZE + self.choice((0, 0, KIB, -1, 1)))
        ]

    def activate(self) -> list[Step]:
        name = self.choice((self.node(), self.choice(self.nodes)))
        return [call("blockdev-set-active", node_name=name, active=self.choice((True, False)))]

    def reopen(self) -> list[Step]:
        name = self.choice(self.nodes)
        options = call("", node_name=name, **self.options(name))["arguments"]
        return [call("blockdev-reopen", options=[options])]

    def close(self) -> list[Step]:
        return [call("blockdev-del", node_name=self.node())]

    def stream(self) -> list[Step]:
        return [call("block-stream", job_id="s", device=self.node(), base_node=self.maybe(0.3, self.node()))]

    def rename(self) -> list[Step]:
        names = {"image_node_name": self.node(), "backing_file": self.choice(("base", "", "x" * 2000))}
        return [call("change-backing-file", device=self.node(), **names)]

    def look(self) -> list[Step]:
        return [call("x-debug-block-dirty-bitmap-sha256", **self.one_bitmap())]


# -- playing them -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(program: tuple[str, ...], place: Path) -> Iterator[Qmp]:
    """A monitor of a daemon, which is ended afterwards.

    It inherits the socket, which is there before it is: nobody has to wait for it.
    """
    with socket.socket(socket.AF_UNIX) as listener, (place / "said").open("wb") as said:
        listener.bind(str(place / "qmp.sock"))
        listener.listen()
        monitor = ("--chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off", "--monitor", "qmp")
        process = subprocess.Popen(
            [*program, *monitor], cwd=place, pass_fds=[listener.fileno()], stdout=said, stderr=said
        )
    try:
        with contextlib.closing(Qmp(place / "qmp.sock")) as qmp:
            yield qmp
            with contextlib.suppress(OSError, EOFError):
                qmp.execute("quit")
        process.wait(DEADLINE)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Died(Exception):
    """The daemon is no more."""


@attrs.frozen
class Played:
    """What came of each step, and of all in the end; ``facts`` is None for a daemon that died."""

    answers: list[Any]
    facts: Any


def play(program: tuple[str, ...], place: Path, steps: list[Step]) -> Played:
    """Play a sequence in a directory with the images."""
    answers: list[Any] = []
    with started(program, place) as qmp:
        try:
            for step in steps:
                answers.append(_carry_out(qmp, place, step))
            return Played(answers, _facts(qmp))
        except (EOFError, OSError, Died):
            return Played(answers, None)


def _carry_out(qmp: Qmp, place: Path, step: Step) -> Any:
    if "nbd" in step:
        return _write(place, step)
    name, arguments = step["execute"], step["arguments"]
    qmp.events.clear()
    answer = _plain(qmp.command(name, arguments))
    if "error" in answer:
        return answer
    if name == "block-export-del":
        qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == arguments["id"])
    elif name == "blockdev-create":
        return [answer, qmp.finish_job(arguments["job-id"])]
    elif name == "block-stream":
        ended = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": "s", "status": "null"})
        return [answer, ended.get("error"), ended["offset"] == ended["len"]]
    return answer


def _write(place: Path, step: Step) -> str:
    try:
        with NbdReader(place / "nbd.sock", step["export"]) as client:
            if step["nbd"] == "write":
                client.write(step["offset"], bytes([step["fill"]]) * step["length"])
            else:
                client.request(NBD[step["nbd"]], step["offset"], step["length"])
    except NbdError as error:
        return f"error {error}"
    except (ConnectionRefusedError, FileNotFoundError) as error:
        raise Died from error
    except AssertionError:
        return "no such export"
    return "done"


def _plain(value: Any) -> Any:
    """An answer without generated names and times."""
    text = re.sub(r"#block[0-9]+", "#", json.dumps(value))
    return json.loads(re.sub(r'"((date|vm-clock)-n?sec)": [0-9]+', r'"\1": 0', text))


def _facts(qmp: Qmp) -> Any:
    """What a user sees of nodes and exports.

    A backing file that was inactive when it got its overlay stays writable in the reference; images with an owner
    elsewhere are shown as they were when they were opened, or as they are.
    """
    nodes = {}
    for node in _plain(qmp.execute("query-named-block-nodes")):
        shown: list[Any] = [node["active"]]
        if node["active"] and node["drv"] == "qcow2":
            bitmaps = sorted(node.get("dirty-bitmaps", []), key=lambda bitmap: str(bitmap["name"]))
            snapshots = [each["name"] for each in node["image"].get("snapshots", [])]
            shown += [node["image"]["virtual-size"], node.get("backing_file"), bitmaps, snapshots]
        nodes[node["node-name"]] = shown
    exports = sorted([each["id"], each["node-name"]] for each in qmp.execute("query-block-exports"))
    return [sorted(nodes.items()), exports, qmp.execute("query-jobs")]


def is_over(step: Step, theirs: Any) -> bool:
    """Whether the reference has left this half done."""
    is_refused = isinstance(theirs, dict) and "error" in theirs
    half_done = ("transaction", "blockdev-reopen", "blockdev-set-active", "block-export-add")
    return is_refused and step.get("execute") in half_done
