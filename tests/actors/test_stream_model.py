"""Random chains, streamed while users write and steer the job: readers of the top never see a difference."""

from __future__ import annotations

from typing import Any

import trio
from cow_fakes import BLOCK, House, running_house, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import WRITE

from qsd.actors.jobs.stream import StreamJob
from qsd.errors import QmpError
from qsd.qapi.core import NULL

LENGTH = 24
LAYER = st.dictionaries(st.integers(0, LENGTH - 1), st.sampled_from([None, 1, 2, 3]), max_size=LENGTH)
# Turns of the loop before it, then a write of that block or a word to the job.
EVENT = st.tuples(
    st.integers(0, 12), st.integers(0, LENGTH - 1) | st.sampled_from(["job-pause", "job-resume", "job-cancel"])
)


async def drive(house: House, edge: Any, events: list[tuple[int, int | str]], model: list[int]) -> None:
    value = 10
    for turns, what in events:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        if isinstance(what, int):
            value += 1
            await edge.write(what * BLOCK, bytes([value]) * BLOCK)
            model[what] = value
        else:
            try:
                await house.execute(what, id="j")
            except QmpError:
                continue  # not in this state


@settings(max_examples=50, deadline=None)
@given(st.lists(LAYER, min_size=2, max_size=4), st.integers(0, 3), st.integers(1, 8), st.lists(EVENT, max_size=12))
def test_streaming_changes_nothing_a_reader_sees(
    layers: list[dict[int, int | None]], base: int, step: int, events: list[tuple[int, int | str]]
) -> None:
    async def main() -> None:
        async with running_house() as house:
            names = [f"n{number}" for number in range(len(layers))]
            for number, layer in enumerate(layers):
                house.image(names[number], layer, length=LENGTH)
                below = names[number - 1] if number else NULL
                await house.node(names[number], below, read_only=number + 1 < len(layers))
            top = names[-1]
            edge = await house.graph.attach(top, WRITE)
            model = await house.contents(top)
            to_base = {"base_node": names[base]} if base < len(names) - 1 else {}
            await house.execute("block-stream", job_id="j", device=top, **to_base)
            await drive(house, edge, events, model)
            # It may still be paused.
            await drive(house, edge, [(0, "job-resume")], model)
            await settle()
            assert await house.contents(top) == model
            assert edge.node_name == top
            if "BLOCK_JOB_COMPLETED" in house.told:
                child = house.graph.find(top).driver.children.get("backing")
                assert (child.node_name if child else None) == to_base.get("base_node")
            else:
                assert "BLOCK_JOB_CANCELLED" in house.told
                assert house.graph.find(top).driver.children["backing"].node_name == names[-2]
            await edge.detach()

    before, StreamJob.largest_step = StreamJob.largest_step, step * BLOCK
    try:
        trio.run(main)
    finally:
        StreamJob.largest_step = before
