"""qcow2 and luks, option by option: images made with blockdev-create, opened, told about, reopened, amended."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call
from scripts_nodes import add, delete, options

MIB = 1 << 20
EVENT = "event JOB_STATUS_CHANGE"

QUIRK = "the reference hands the name in the image to whatever driver the options name"
BLIND = "the reference does not look at the new file: it goes on with the old one's header"


def _job(start: dict[str, Any], events: int) -> list[Step | Differs]:
    dismiss: list[Step | Differs] = [call("job-dismiss", id="j"), EVENT]
    return [start, *([EVENT] * events), call("query-jobs"), *dismiss]


def made(driver: str, /, **more: Any) -> list[Step | Differs]:
    """A new image, and its job to the end."""
    given = {"driver": driver, **{key.replace("_", "-"): value for key, value in more.items()}}
    return _job(call("blockdev-create", job_id="j", options=given), 5)


def not_made(driver: str, /, **more: Any) -> list[Step | Differs]:
    """The same, and the job fails."""
    given = {"driver": driver, **{key.replace("_", "-"): value for key, value in more.items()}}
    return _job(call("blockdev-create", job_id="j", options=given), 4)


def image(name: str, /, **more: Any) -> list[Step | Differs]:
    """A qcow2 image of 1 MiB in the new file ``name``, which stays as node ``f-name``."""
    steps = made("file", filename=name, size=0)
    steps.append(add(options("file", f"f-{name}", filename=name)))
    return [*steps, *made("qcow2", **{"file": f"f-{name}", "size": MIB, **more})]


def q(name: str = "n", /, **more: Any) -> dict[str, Any]:
    return options("qcow2", name, **{"file": "f-p", **more})


def tried(**more: Any) -> list[Step | Differs]:
    return [add(q(**more)), delete("n")]


def refused(*values: Any, of: str, **more: Any) -> list[Step | Differs]:
    return [add(q(**{of: value, **more})) for value in values]


_SIZES = ("cache_size", "l2_cache_size", "refcount_cache_size", "l2_cache_entry_size", "cache_clean_interval")
_FLAGS = (
    "lazy_refcounts",
    "pass_discard_request",
    "pass_discard_snapshot",
    "pass_discard_other",
    "discard_no_unref",
)
_CHECKS = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)

_OPENED: list[Step | Differs] = [
    NEGOTIATE,
    *image("p"),
    *image("v2", version="v2"),
    *(step for name in _SIZES for step in refused(-1, 1 << 63, "1", 1.5, None, of=name)),
    *refused(0, 1, 511, 513, 131072, of="l2_cache_entry_size"),
    *(step for value in (512, 65536) for step in tried(l2_cache_entry_size=value)),
    *(step for value in (0, (1 << 32) - 1) for step in tried(cache_clean_interval=value)),
    *refused(1 << 32, (1 << 63) - 1, of="cache_clean_interval"),
    *(step for name in _SIZES[:3] for step in tried(**{name: 0})),
    *tried(l2_cache_size=(1 << 63) - 1),
    *refused((1 << 63) - 1, of="refcount_cache_size"),
    add(q(cache_size=1, l2_cache_size=1, refcount_cache_size=1)),
    add(q(cache_size=1, l2_cache_size=2)),
    add(q(cache_size=1, refcount_cache_size=2)),
    *tried(cache_size=1, l2_cache_size=1),
    *tried(cache_size=MIB, refcount_cache_size=1),
    *(step for name in _FLAGS for step in (*refused("on", 1, None, of=name), *tried(**{name: True}))),
    *(add(q(file="f-v2", **{name: True})) for name in ("lazy_refcounts", "discard_no_unref")),
    *refused("bogus", 1, None, [], {"template": "bogus"}, {"nope": True}, {"main-header": 1}, of="overlap_check"),
    *(step for mode in ("none", "constant", "cached", "all") for step in tried(overlap_check=mode)),
    *tried(overlap_check={}),
    *(step for flag in _CHECKS for step in tried(overlap_check={"template": "none", flag: True})),
    *refused({"format": "luks"}, {"format": "aes", "key-secret": "s"}, {"format": "qcow"}, {}, of="encrypt"),
    *refused("nope", "f-v2", of="data_file"),
    *refused("nope", {"driver": "qcow2", "file": "nope"}, {"driver": "raw"}, 1, of="backing"),
    *(step for value in ("", None) for step in tried(backing=value)),
]

_NAMED: list[Step | Differs] = [
    NEGOTIATE,
    *image("p"),
    *image("top", backing_file="p", backing_fmt="qcow2"),
    *(
        step
        for given in (
            {},
            {"backing": None},
            {"backing": ""},
            {"backing": "f-p"},
            {"read_only": True},
        )
        for step in (add(q("n", **{"file": "f-top", **given})), call("query-blockstats"), delete("n"))
    ),
    add(q("n", file="f-top", backing="nope")),
    Differs(add(q("n", file="f-top", backing={"driver": "null-co", "size": MIB})), QUIRK),
    Differs(delete("n"), QUIRK),
    add(q("n", file="f-p", backing={"driver": "qcow2", "file": "nope"})),
    add(q("n", file={"driver": "null-co", "size": MIB}, backing="nope")),
    add(q("n", file={"driver": "file", "filename": "nope"}, backing="nope")),
]


def reopen(**more: Any) -> dict[str, Any]:
    return call("blockdev-reopen", options=[q(**more)])


_REOPENED: list[Step | Differs] = [
    NEGOTIATE,
    *image("p"),
    *image("v2", version="v2"),
    add(options("file", "raw", filename="img")),
    add(q()),
    *(step for name in _FLAGS for step in (reopen(**{name: True}), reopen(**{name: None}), reopen())),
    *(reopen(**{name: value}) for name in _SIZES for value in (-1, 0, 512, 65536, 1 << 32, None)),
    *(reopen(overlap_check=value) for value in ("none", "all", "bogus", {"main-header": False})),
    *(reopen(encrypt=value) for value in ({"format": "luks"}, {"format": "aes"})),
    *(reopen(data_file=value) for value in ("raw", "nope")),
    *(reopen(backing=value) for value in ("nope", "", "n", "raw", None)),
    *(reopen(**given) for given in ({"driver": "raw"}, {"node_name": "zz"}, {"file": "nope"}, {"nope": 1})),
    *(reopen(**given) for given in ({"discard": "unmap"}, {"detect_zeroes": "on"}, {"force_share": True})),
    reopen(read_only=True),
    reopen(read_only=True, lazy_refcounts=True),
    reopen(),
    reopen(file="f-v2"),
    Differs(reopen(file="f-v2", lazy_refcounts=True), BLIND),
    reopen(),
    Differs(reopen(file="raw"), BLIND),
]

_REFUSED_SIZES = (1, 1000, (1 << 63) - 512, 1 << 63, (1 << 64) - 512, -1, "1M", None)
_REFUSED_CLUSTERS = (0, 256, 1000, 4 * MIB, 1 << 63, -1, "64k")
_REFUSED_WIDTHS = (-1, 0, 3, 65, 128, "16")


def _refused_sizes(name: str, values: tuple[Any, ...]) -> list[Step | Differs]:
    steps: list[Step | Differs] = []
    for value in values:
        given = {"file": "f-p", "size": MIB, name: value}
        if isinstance(value, int):
            steps += not_made("qcow2", **given)
        else:
            steps.append(call("blockdev-create", job_id="j", options={"driver": "qcow2", **given}))
    return steps


_CREATED: list[Step | Differs] = [
    NEGOTIATE,
    *image("p"),
    *image("d"),
    *_refused_sizes("size", _REFUSED_SIZES),
    *_refused_sizes("cluster-size", _REFUSED_CLUSTERS),
    *_refused_sizes("refcount-bits", _REFUSED_WIDTHS),
    *(
        step
        for given in (
            {"version": "v2", "lazy_refcounts": True},
            {"version": "v2", "extended_l2": True},
            {"version": "v2", "refcount_bits": 1},
            {"version": "v2", "compression_type": "zstd"},
            {"version": "v2", "data_file": "f-d"},
            {"extended_l2": True, "cluster_size": 8192},
            {"backing_fmt": "raw"},
            {"backing_file": "b", "backing_fmt": "raw", "preallocation": "metadata"},
            {"backing_file": "b", "backing_fmt": "raw", "data_file": "f-d", "data_file_raw": True},
            {"data_file_raw": True},
            {"data_file": "nope"},
            {"file": "nope"},
            {"size": 1 << 62},
            {"cluster_size": 512, "size": 1 << 42},
            {"encrypt": {"format": "luks"}},
            {"encrypt": {"format": "luks", "key-secret": "nope"}},
            {"encrypt": {"format": "qcow"}},
            {"backing_file": "x" * 1024, "backing_fmt": "raw"},
            {"backing_file": "x" * 500, "backing_fmt": "raw", "cluster_size": 512},
        )
        for step in not_made("qcow2", **{"file": "f-p", "size": MIB, **given})
    ),
    *(
        step
        for given in (
            {"size": 0},
            {"version": "v2"},
            {"cluster_size": 512},
            {"cluster_size": 2 * MIB},
            {"extended_l2": True, "lazy_refcounts": True, "compression_type": "zstd", "refcount_bits": 64},
            {"backing_file": "img", "backing_fmt": "raw"},
            {"backing_file": "img", "backing_fmt": "raw", "extended_l2": True, "preallocation": "metadata"},
            {"data_file": "f-d"},
            {"data_file": "f-d", "data_file_raw": True, "preallocation": "metadata"},
        )
        for step in (*made("qcow2", **{"file": "f-p", "size": MIB, **given}), *tried())
    ),
    *(
        call("blockdev-create", job_id="j", options={"driver": driver, "size": MIB, "file": "f-p"})
        for driver in ("raw", "null-co", "nope", "host_device")
    ),
    *(step for size in (1, 511, 1000) for step in made("file", filename="new", size=size)),
    *(
        step
        for name in ("", "/nonexistent/x", ".", "x" * 256)
        for step in not_made("file", filename=name, size=512)
    ),
    *not_made("file", filename="new", size=512, preallocation="metadata"),
    *(step for mode in ("falloc", "full") for step in made("file", filename="new", size=512, preallocation=mode)),
]

SCRIPTS: dict[str, Script] = {
    "qcow2 opened": Script(_OPENED),
    "qcow2 named": Script(_NAMED),
    "qcow2 reopened": Script(_REOPENED),
    "qcow2 created": Script(_CREATED),
}
