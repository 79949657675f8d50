"""Bitmaps that live in an image: when they are loaded, marked in use, stored, and what happens when that fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from fake_bitmap_store import Stored
from graph_fakes import DiskOptions, FormatOptions, World, running_graph, state_of

from qsd.actors.bitmaps import AddBitmap, ClearBitmap, RemoveBitmap
from qsd.actors.edges import RootOptions
from qsd.actors.graph import Graph
from qsd.block.bitmap import DirtyBitmap
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.qapi.core import NULL

READER = RootOptions(Perm.CONSISTENT_READ)
WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)
SIZE = 1 << 16
G = 512

Bench = tuple[Graph, World]


def stored(*touched: tuple[int, int], **more: Any) -> Stored:
    bits = DirtyBitmap(SIZE, G)
    for offset, length in touched:
        bits.set(offset, length)
    return Stored(bits, **{"is_auto": True} | more)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Disk ``f`` with the image of format ``q``: an enabled bitmap, one that is not, and an inconsistent one."""
    async with running_graph() as (graph, world):
        world.contents["a"] = bytearray(SIZE)
        world.bitmaps["q"] = {
            "on": stored((0, 512)),
            "off": stored((1024, 512), is_auto=False),
            "lost": stored((2048, 512), is_in_use=True),
        }
        await graph.add(DiskOptions(node_name="f"))
        yield graph, world


async def open_format(graph: Graph, **more: Any) -> None:
    await graph.add(FormatOptions(node_name="q", file="f", **more))


async def do(graph: Graph, kind: Any, name: str, **more: Any) -> None:
    await graph.transact([kind(topology=graph.topology, node_name="q", name=name, **more)])


async def refusal(graph: Graph, kind: Any, name: str, **more: Any) -> str:
    with pytest.raises(QmpError) as caught:
        await do(graph, kind, name, **more)
    return caught.value.desc


async def write(graph: Graph, offset: int) -> None:
    edge = await graph.attach("q", WRITER)
    await edge.node.write(offset, bytes(512))
    await edge.detach()


def shown(graph: Graph) -> dict[str | None, tuple[list[tuple[int, int]], str]]:
    """Dirty areas and states of the bitmaps of ``q``."""
    return {
        bitmap.name: (
            list(bitmap.bits.dirty_areas()),
            " ".join(
                name
                for name in ("recording", "busy", "read_only", "persistent", "inconsistent")
                if getattr(bitmap, f"is_{name}")
            ),
        )
        for bitmap in graph.find("q").bitmaps
    }


def in_image(world: World) -> dict[str, tuple[list[tuple[int, int]], str]]:
    return {
        name: (
            list(one.bits.dirty_areas()),
            " ".join(word for word in ("auto", "in_use") if getattr(one, f"is_{word}")),
        )
        for name, one in world.bitmaps["q"].items()
    }


async def test_opening_loads_and_marks_in_use(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    assert shown(graph) == {
        "on": ([(0, 512)], "recording persistent"),
        "off": ([(1024, 512)], "persistent"),
        "lost": ([], "persistent inconsistent"),
    }
    assert {state for _areas, state in in_image(world).values()} == {"auto in_use", "in_use"}


async def test_opening_read_only_marks_nothing(bench: Bench) -> None:
    graph, world = bench
    before = in_image(world)
    await open_format(graph, read_only=True)
    assert shown(graph)["on"] == ([(0, 512)], "recording read_only persistent")
    assert in_image(world) == before
    assert await refusal(graph, ClearBitmap, "on") == "Bitmap 'on' is readonly and cannot be modified"
    text = "Cannot remove persistent bitmap 'on': no write access to node 'q'"
    assert await refusal(graph, RemoveBitmap, "on") == text
    text = "Cannot add a persistent bitmap to read-only or inactive node 'q'"
    assert await refusal(graph, AddBitmap, "new", is_persistent=True) == text
    await graph.delete("q")
    assert in_image(world) == before
    assert "store q" not in world.log


@pytest.mark.parametrize("what", ["load", "mark"])
async def test_opening_fails_with_its_bitmaps(bench: Bench, what: str) -> None:
    graph, world = bench
    before = in_image(world)
    world.fail.add((what, "q"))
    with pytest.raises(QmpError):
        await open_format(graph)
    assert in_image(world) == before
    assert "store q" not in world.log
    assert "close q" in world.log


async def test_closing_stores(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    await write(graph, 4096)
    await do(graph, RemoveBitmap, "off")
    await do(graph, AddBitmap, "new", granularity=G, is_persistent=True, is_disabled=True)
    await do(graph, AddBitmap, "memory", granularity=G)
    await graph.delete("q")
    assert in_image(world) == {
        "on": ([(0, 512), (4096, 512)], "auto"),
        "lost": ([(2048, 512)], "auto in_use"),
        "new": ([], ""),
    }
    assert world.log.index("store q") < world.log.index("close q")


async def test_failure_at_closing_is_told(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    graph, world = bench
    await open_format(graph)
    world.fail.add(("store", "q"))
    await graph.delete("q")
    assert capsys.readouterr().out == (
        "qsd: Lost persistent bitmaps during inactivation of node 'q': "
        "Failed to write bitmap 'x' to file: Input/output error\n"
    )
    assert all(one.is_in_use for one in world.bitmaps["q"].values())


async def test_adding_is_refused_in_the_store_s_words(bench: Bench) -> None:
    graph, _world = bench
    await open_format(graph)
    text = "Can't make bitmap 'x' persistent in 'q': Maximum number of persistent bitmaps is already reached"
    assert await refusal(graph, AddBitmap, "x", is_persistent=True) == text
    await do(graph, AddBitmap, "x")


async def test_removing_takes_it_out_of_the_image(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    await do(graph, RemoveBitmap, "lost")
    await do(graph, RemoveBitmap, "on")
    assert list(in_image(world)) == ["off"]
    await do(graph, AddBitmap, "on", granularity=G, is_persistent=True)
    await graph.delete("q")
    assert in_image(world) == {"off": ([(1024, 512)], ""), "on": ([], "auto")}


@pytest.mark.filterwarnings("default")
async def test_failure_to_take_it_out_is_made_up_for(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    world.fail.add(("remove", "q"))
    await do(graph, RemoveBitmap, "on")
    assert "on" in in_image(world)
    await graph.delete("q")
    assert list(in_image(world)) == ["off", "lost"]


# -- read-only and back ---------------------------------------------------------------------------------------


def reopened(*, read_only: bool) -> tuple[FormatOptions, ...]:
    return (FormatOptions(node_name="q", file="f", backing=NULL, read_only=read_only),)


async def test_becoming_read_only_stores_and_back_marks(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    await write(graph, 4096)
    graph.find("q").bitmaps.find("off").is_busy = True
    await graph.reopen(reopened(read_only=True))
    assert in_image(world)["on"] == ([(0, 512), (4096, 512)], "auto")
    assert shown(graph)["off"] == ([(1024, 512)], "busy read_only persistent")
    await graph.reopen(reopened(read_only=False))
    assert in_image(world)["on"] == ([(0, 512), (4096, 512)], "auto in_use")
    assert shown(graph)["on"] == ([(0, 512), (4096, 512)], "recording persistent")
    await write(graph, 8192)
    assert shown(graph)["on"][0] == [(0, 512), (4096, 512), (8192, 512)]
    graph.find("q").bitmaps.find("off").is_busy = False


@pytest.mark.parametrize("what", ["store", "reopen", "permissions"])
async def test_failure_to_become_read_only_leaves_all_as_it_was(bench: Bench, what: str) -> None:
    graph, world = bench
    await open_format(graph)
    before = state_of(graph, world), in_image(world), shown(graph)
    world.fail.add((what, "q"))
    with pytest.raises(QmpError):
        await graph.reopen(reopened(read_only=True))
    assert (state_of(graph, world), in_image(world), shown(graph)) == before
    world.fail.clear()
    await write(graph, 4096)


async def test_failure_to_mark_is_told(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph, read_only=True)
    world.fail.add(("mark", "q"))
    with pytest.raises(QmpError, match="Can't update bitmap directory: Input/output error"):
        await graph.reopen(reopened(read_only=False))
    assert not graph.find("q").is_held
    assert not graph.find("q").mode.read_only


# -- inactive and back ----------------------------------------------------------------------------------------


async def test_inactive_node_has_handed_its_bitmaps_over(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    await write(graph, 4096)
    await do(graph, AddBitmap, "memory", granularity=G)
    await graph.set_active("q", active=False)
    assert list(shown(graph)) == ["memory"]
    assert in_image(world)["on"] == ([(0, 512), (4096, 512)], "auto")
    # The next owner.
    world.bitmaps["q"] |= {"on": stored((512, 512)), "other": stored()}
    graph.find("q").driver.bitmap_store.image = world.bitmaps["q"]  # type: ignore[union-attr]
    await graph.set_active("q", active=True)
    assert list(shown(graph)) == ["memory", "on", "off", "lost", "other"]
    assert shown(graph)["on"] == ([(512, 512)], "recording persistent")
    assert in_image(world)["other"] == ([], "auto in_use")
    await write(graph, 8192)
    assert shown(graph)["on"][0] == [(512, 512), (8192, 512)]


async def test_read_only_node_hands_its_bitmaps_over_and_takes_them_back(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph, read_only=True)
    before, image = shown(graph), {name: attrs.evolve(each) for name, each in world.bitmaps["q"].items()}
    await graph.set_active("q", active=False)
    assert shown(graph) == {}
    await graph.set_active("q", active=True)
    assert shown(graph) == before
    assert world.bitmaps["q"] == image


async def test_busy_bitmap_keeps_its_node_active(bench: Bench) -> None:
    """The reference asserts."""
    graph, world = bench
    await open_format(graph)
    bitmap = graph.find("q").bitmaps.find("off")
    bitmap.is_busy = True
    before = state_of(graph, world), in_image(world)
    with pytest.raises(QmpError) as caught:
        await graph.set_active("q", active=False)
    assert caught.value.desc == (
        "Failed to inactivate node: Bitmap 'off' is currently in use by another operation and cannot be used"
    )
    assert (state_of(graph, world), in_image(world)) == before
    bitmap.is_busy = False


async def test_failure_to_inactivate_leaves_bitmaps_in_use(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, world = bench
    await open_format(graph)
    before = state_of(graph, world), in_image(world), shown(graph)
    world.fail.add(("store", "q"))
    with pytest.raises(QmpError) as caught:
        await graph.set_active("q", active=False)
    assert caught.value.desc == "Failed to inactivate node: Invalid argument"
    assert "Lost persistent bitmaps" in capsys.readouterr().out
    assert (state_of(graph, world), in_image(world), shown(graph)) == before


async def test_later_failure_to_inactivate_marks_them_again(bench: Bench) -> None:
    graph, world = bench
    await open_format(graph)
    before = state_of(graph, world), in_image(world), shown(graph)
    world.fail.add(("permissions", "f"))
    with pytest.raises(QmpError):
        await graph.set_active("q", active=False)
    assert "store q" in world.log
    assert (state_of(graph, world), in_image(world), shown(graph)) == before


@pytest.mark.parametrize("attaching", [False, True])
async def test_activation_whose_bitmaps_cannot_be_loaded_is_taken_back(bench: Bench, attaching: bool) -> None:
    """The reference is left without its driver."""
    graph, world = bench
    await open_format(graph)
    await graph.set_active("q", active=False)
    await do(graph, AddBitmap, "on")
    before = state_of(graph, world), in_image(world), shown(graph)
    activate = partial(graph.attach, "q", READER) if attaching else partial(graph.set_active, "q", active=True)
    with pytest.raises(QmpError) as caught:
        await activate()
    assert caught.value.desc == "Could not reopen format layer: Bitmap already exists: on"
    assert (state_of(graph, world), in_image(world), shown(graph)) == before
    await do(graph, RemoveBitmap, "on")
    await graph.set_active("q", active=True)
    assert shown(graph)["on"] == ([(0, 512)], "recording persistent")


async def test_nothing_is_written_before_the_bitmaps_are_there(bench: Bench, autojump_clock: Any) -> None:
    """A write that comes while a node is being activated waits, and is recorded."""
    graph, world = bench
    await open_format(graph)
    edge = await graph.attach("q", RootOptions(Perm.CONSISTENT_READ | Perm.WRITE, allow_inactive=True))
    await graph.set_active("q", active=False)
    reached, go = world.gate("load", "q")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: graph.set_active("q", active=True))
        await reached.wait()
        nursery.start_soon(edge.write, 4096, bytes(512))
        await trio.sleep(1)
        go.set()
    assert shown(graph)["on"][0] == [(0, 512), (4096, 512)]
    await edge.detach()
