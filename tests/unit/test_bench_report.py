"""The benchmark's pure part: arithmetic, what clients print, the tables, the plot. Nothing is measured here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.clients import MEASURED, ClientError, Load, fio_command, nbd_uri, parse_fio
from bench.daemons import Placement, Setup, Side, daemon_command
from bench.images import KINDS
from bench.measures import Measure
from bench.procfs import parse_stat_ticks, parse_status_kib
from bench.report import columns, data_report, detail_table, ratio_table, row_verdict, text_report
from bench.runner import Row, Series
from bench.stats import Verdict, median, percentile, ratio, spread, verdict
from bench.svg import Scale, ratio_plot
from bench.workloads import FUSE_WORKLOADS, GROUPS, QCOW2_WORKLOADS, WORKLOADS, Export, Tool, Unit, find_workloads

RANDREAD = WORKLOADS[0]
NBDCOPY = WORKLOADS[-1]
FACTS = {"ours": "qsd 9 <beta>", "reference": "storage & more 11.1", "date": "2026-01-02"}
SVG = "{http://www.w3.org/2000/svg}"


def make_row(
    ours: tuple[float, ...] = (200e3, 180e3, 190e3),
    reference: tuple[float, ...] = (100e3, 95e3, 90e3),
    *,
    placement: Placement = Placement.ANY,
    error: str | None = None,
) -> Row:
    modes = {"io_uring": 96e3, "threads": 40e3}
    return Row(RANDREAD, placement, Series(None, ours, error), Series("io_uring", reference), modes)


# Arithmetic


def test_median_and_spread_of_few_samples() -> None:
    assert median([]) is None
    assert median([3, 1, 2]) == 2
    assert spread([5]) is None
    assert spread([90, 100, 110]) == pytest.approx(0.2)
    assert spread([0, 0]) is None


def test_percentile_takes_nearest_rank() -> None:
    samples = list(range(100, 0, -1))
    assert (percentile(samples, 50), percentile(samples, 99), percentile(samples, 100)) == (50, 99, 100)
    assert percentile([7], 1) == 7
    assert percentile([], 50) is None


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50), st.floats(0.1, 100))
def test_percentile_bounds_that_share_of_samples(samples: list[float], percent: float) -> None:
    found = percentile(samples, percent)
    assert found in samples
    # Floating point may round the rank up by one, never down.
    assert sum(each <= found for each in samples) * 100 >= len(samples) * percent * (1 - 1e-9)


def test_ratio_without_a_figure_is_none() -> None:
    assert ratio(3, 2) == 1.5
    assert ratio(None, 2) is None
    assert ratio(3, None) is None
    assert ratio(3, 0) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, Verdict.NONE), (1.79, Verdict.BELOW), (1.796, Verdict.MUST), (2.49, Verdict.MUST), (2.5, Verdict.AIM)],
)
def test_verdict_judges_what_is_printed(value: float | None, expected: Verdict) -> None:
    assert verdict(value, 1.8, 2.5) is expected


# Workloads, command lines and what clients print


def test_workloads_have_names_of_their_own_and_aims_above_musts() -> None:
    every = [each for group in GROUPS.values() for each in group]
    assert len({each.name for each in every}) == len(every)
    assert all(0 < each.must < each.aim for each in every)
    assert all(each.image in KINDS for each in every)


def test_find_workloads_prefers_the_exact_name() -> None:
    assert find_workloads(None) == WORKLOADS
    assert find_workloads("RANDREAD 4k qd32") == (RANDREAD,)
    assert len(find_workloads("o_direct")) == 2
    with pytest.raises(ValueError, match="nbdcopy to null:"):
        find_workloads("sleep")


def test_fio_command_states_the_load() -> None:
    words = fio_command("fio", WORKLOADS[8], Load(1.5, 0.2, 1 << 30), nbd_uri(Path("/x/nbd.sock")))
    assert words[0] == "fio"
    assert {"--numjobs=4", "--iodepth=8", "--bs=4096", "--runtime=1500ms", "--ramp_time=200ms"} <= set(words)
    assert "--uri=nbd+unix:///disk?socket=/x/nbd.sock" in words


def test_daemon_command_gives_both_sides_the_same_options() -> None:
    image, place = Path("/x/a.img"), Path("/x")
    ours = Setup(Side("ours", ("python", "-m", "qsd"), ""), image, direct=True)
    reference = attrs.evolve(ours, side=Side("reference", ("ref",), ""), mode="native")
    ours_words, reference_words = (daemon_command(each, place) for each in (ours, reference))
    assert ours_words[:3] == ["python", "-m", "qsd"]
    assert "driver=file,node-name=f0,filename=/x/a.img,cache.direct=on" in ours_words
    assert [word.replace(",aio=native", "") for word in reference_words[1:]] == ours_words[3:]


def test_fuse_is_measured_on_the_mounted_file() -> None:
    words = fio_command("fio", FUSE_WORKLOADS[1], Load(1.5, 0.2, 1 << 30), "/x/disk")
    assert {"--ioengine=libaio", "--direct=1", "--filename=/x/disk", "--iodepth=16"} <= set(words)
    modes = FUSE_WORKLOADS[1].modes
    assert modes == ("io_uring", "threads", "io_uring+iothread", "threads+iothread")
    reference = Side("reference", ("ref",), "")
    setup = Setup(reference, Path("/x/a.qcow2"), mode=modes[2], export=Export.FUSE, kind=KINDS["qcow2"])
    command = daemon_command(setup, Path("/x"))
    assert command[1:3] == ["--object", "iothread,id=t0"]
    assert "driver=file,node-name=f0,filename=/x/a.qcow2,cache.direct=off,aio=io_uring" in command
    assert "driver=qcow2,node-name=r0,file=f0" in command
    assert command[-1] == "type=fuse,id=e0,node-name=r0,mountpoint=/x/disk,writable=on,iothread=t0"
    assert "--nbd-server" not in command


def test_allocating_load_ends_by_count_and_other_tools_are_no_fio() -> None:
    (overlay,) = find_workloads("fresh overlay", QCOW2_WORKLOADS)
    words = fio_command("fio", overlay, Load(1.5, 0.2, 1 << 30), "nbd://x")
    assert "--number_ios=8192" in words
    assert "--time_based" not in words
    assert {each.tool for each in QCOW2_WORKLOADS} == {Tool.FIO, Tool.NBDINFO}


def test_what_goes_on_beside_is_not_counted() -> None:
    (flushed,) = find_workloads("beside others", QCOW2_WORKLOADS)
    words = fio_command("fio", flushed, Load(1.5, 0.2, 1 << 30), "nbd://x")
    assert words.count("--uri=nbd://x") == words.count("--runtime=1500ms") == 3
    assert "--fsync=16" in words[: words.index("--new_group")]
    assert {"--rw=randtrim", "--rate_iops=1500,1500,1500"} <= set(words)
    jobs = json.loads(fio_output(5, 0).partition("\n")[2].partition("\nbye")[0])["jobs"]
    others = [{**job, "jobname": "beside"} for job in jobs]
    assert parse_fio(json.dumps({"jobs": jobs + others}), Unit.IOPS) == 5


def test_layers_are_opened_from_the_lowest_on() -> None:
    below = tuple(Path(f"/x/{each}") for each in KINDS["chain"].below)
    assert [path.name for path in below] == ["qcow2", *(f"layer{number}" for number in range(1, 8))]
    side = Side("reference", ("ref",), "")
    command = daemon_command(Setup(side, Path("/x/chain"), kind=KINDS["chain"], below=below), Path("/x"))
    nodes = [word for word in command if word.startswith("driver=")]
    assert nodes[0] == "driver=file,node-name=f8,filename=/x/qcow2,read-only=on,cache.direct=off"
    assert nodes[1] == "driver=qcow2,node-name=r8,file=f8,read-only=on"
    assert nodes[-1] == "driver=qcow2,node-name=r0,file=f0,backing=r1"
    luks = daemon_command(Setup(side, Path("/x/luks"), kind=KINDS["luks"]), Path("/x"))
    assert luks[1:3] == ["--object", "secret,id=s0,data=bench"]
    assert "driver=luks,node-name=r0,file=f0,key-secret=s0" in luks


def test_workloads_are_found_in_their_group() -> None:
    assert find_workloads("qcow2", FUSE_WORKLOADS) == FUSE_WORKLOADS[-1:]
    assert find_workloads(None, FUSE_WORKLOADS) == FUSE_WORKLOADS


def fio_output(read_iops: float, write_bytes: float, *, error: int = 0) -> str:
    jobs = [
        {
            "jobname": MEASURED,
            "error": error,
            "read": {"iops": read_iops, "bw_bytes": 0},
            "write": {"iops": 0.0, "bw_bytes": write_bytes},
        }
    ]
    return "fio: connected to NBD server\n" + json.dumps({"jobs": jobs}) + "\nbye\n"


def test_parse_fio_adds_up_and_skips_other_lines() -> None:
    assert parse_fio(fio_output(186_000.5, 0), Unit.IOPS) == 186_000.5
    assert parse_fio(fio_output(0, 2_500_000_000), Unit.MBPS) == 2500


@pytest.mark.parametrize(
    "output",
    ["", "fio: pid=3, err=111", "{", '{"jobs": 3}', '{"jobs": [{}]}', fio_output(5, 5, error=5), fio_output(0, 0)],
)
def test_parse_fio_refuses_what_is_no_result(output: str) -> None:
    with pytest.raises(ClientError, match="fio"):
        parse_fio(output, Unit.IOPS)


def test_proc_files_with_odd_names() -> None:
    stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 100 0 0 0 17 4 0 0 20 0 1 0"
    assert parse_stat_ticks(stat) == 21
    status = "Name:\tqsd\nVmHWM:\t   61440 kB\nVmRSS:\t   51200 kB\n"
    assert parse_status_kib(status, "VmHWM") == 61440
    with pytest.raises(KeyError):
        parse_status_kib(status, "VmPeak")


# Tables


def test_columns_align_to_the_widest_word() -> None:
    assert columns([["a", "b"], ["long", "1"], ["x", "222"]]) == [
        "a       b",
        "----  ---",
        "long    1",
        "x     222",
    ]


def test_ratio_table_sets_placements_side_by_side() -> None:
    rows = [make_row(), make_row((100e3,), (100e3,), placement=Placement.PINNED)]
    above, heading, _, line = ratio_table(rows)
    assert [part.strip() for part in above.split("|")[1:]] == [each.value for each in Placement]
    assert [index for index, letter in enumerate(above) if letter == "|"] == [
        index for index, letter in enumerate(heading) if letter == "|"
    ]
    cells = [part.split() for part in line.split("|")]
    assert cells[0] == ["randread", "4k", "QD32,", "IOPS", "1.8", "2.5"]
    assert cells[1] == ["190.0", "k", "95.0", "k", "io_uring", "2.00", "must"]
    assert cells[2] == ["100.0", "k", "100.0", "k", "io_uring", "1.00", "BELOW"]


def test_ratio_table_of_one_placement_only() -> None:
    above, *_ = ratio_table([make_row()])
    assert Placement.PINNED.value not in above


def test_failed_side_has_no_verdict_and_its_error_is_told() -> None:
    row = make_row((200e3,), error="qsd ended with 1: boom")
    assert row_verdict(row) is Verdict.NONE
    assert "randread 4k QD32, any CPU, ours: qsd ended with 1: boom" in text_report(FACTS, [row], [])


def test_detail_table_names_extremes_spread_and_calibration() -> None:
    line = detail_table([make_row()])[-1]
    assert "180.0 k..200.0 k" in line
    assert "11 %" in line
    assert line.endswith("io_uring 96.0 k, threads 40.0 k")


@pytest.mark.parametrize(("value", "word"), [(299.4, "kept"), (299.6, "BROKEN"), (None, "-")])
def test_measures_are_held_to_their_limit_as_printed(value: float | None, word: str) -> None:
    text = text_report(FACTS, [], [Measure("start, ms", value, 5.2, 300, 0)])
    assert text.splitlines()[-1].split()[-1] == word


def test_measure_without_limit_has_no_verdict() -> None:
    assert Measure("peak, MiB", 70.0, 20.0).is_kept is None


def test_data_report_is_json_with_every_sample() -> None:
    data = json.loads(json.dumps(data_report(FACTS, [make_row()], [Measure("m", 1.0, None, 2)])))
    (row,) = data["workloads"]
    assert row["ours"]["samples"] == [200e3, 180e3, 190e3]
    assert (row["ratio"], row["verdict"], row["placement"]) == (2.0, "must", "any CPU")
    assert data["measures"] == [{"title": "m", "ours": 1.0, "reference": None, "below": 2, "kept": True}]


# The plot


def test_scale_puts_one_between_its_ends_and_is_logarithmic() -> None:
    scale = Scale([0.4, 3])
    assert (scale.low, scale.high) == (0.2, 5)
    assert scale.x(2) - scale.x(1) == pytest.approx(scale.x(1) - scale.x(0.5))
    assert scale.x(1000) == scale.x(5)


def test_plot_is_well_formed_and_has_a_bar_per_figure() -> None:
    rows = [
        make_row(),
        make_row(placement=Placement.PINNED),
        Row(NBDCOPY, Placement.ANY, Series(None), Series("threads", (2e3,)), {"threads": 2e3}),
    ]
    root = ElementTree.fromstring(ratio_plot(FACTS, rows))
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert "qsd 9 <beta>  /  storage & more 11.1" in texts
    assert texts.count("2.00") == 2
    assert "no figure" in texts
    assert "190.0 k / 95.0 k" in texts


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4))
def test_plot_stays_inside_its_frame(ratios: list[float]) -> None:
    rows = [
        Row(workload, Placement.ANY, Series(None, (each * 1e3,)), Series("threads", (1e3,)), {})
        for workload, each in zip(WORKLOADS, ratios, strict=False)
    ]
    root = ElementTree.fromstring(ratio_plot(FACTS, rows))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter(f"{SVG}rect"):
        left, top = float(box.attrib["x"]), float(box.attrib["y"])
        assert 0 <= left <= left + float(box.attrib["width"]) <= width
        assert 0 <= top <= top + float(box.attrib["height"]) <= height
        assert math.isfinite(left)
