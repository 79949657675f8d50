"""The graph as a value: cycles, the order to drain in, what may stand below what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.block.graph import EdgeFacts, NodeFacts, Snapshot
from qsd.errors import QmpError


def edge(key: int, parent: int, child: int, name: str = "file") -> EdgeFacts:
    return EdgeFacts(key, parent, child, name, f"node 'n{parent}'")


def snapshot(count: int, *edges: EdgeFacts, **changed: NodeFacts) -> Snapshot:
    nodes = {key: NodeFacts(f"n{key}") for key in range(count)}
    return Snapshot(nodes | {int(name[1:]): facts for name, facts in changed.items()}, edges)


def refusal(graph: Snapshot, new: EdgeFacts) -> str:
    with pytest.raises(QmpError) as caught:
        graph.with_edge(new)
    return caught.value.desc


def test_cycle_is_refused_at_any_distance() -> None:
    graph = snapshot(3, edge(1, 0, 1), edge(2, 1, 2, "backing"))
    assert refusal(graph, edge(3, 2, 0)) == "Making 'n0' a file child of 'n2' would create a cycle"
    assert refusal(graph, edge(3, 1, 1)) == "Making 'n1' a file child of 'n1' would create a cycle"
    assert refusal(graph, edge(3, 2, 1, "backing")) == ("Making 'n1' a backing child of 'n2' would create a cycle")
    assert graph.without_edges([2]).with_edge(edge(3, 2, 0)).below({2}) == {0, 1, 2}


def test_inactive_child_goes_only_below_inactive_parents() -> None:
    graph = snapshot(2, n1=NodeFacts("n1", active=False))
    assert refusal(graph, edge(1, 0, 1)) == "Inactive 'n1' can't be a file child of active 'n0'"
    graph = graph.with_node(0, NodeFacts("n0", active=False))
    assert graph.with_edge(edge(1, 0, 1)).below({0}) == {0, 1}


def test_a_snapshot_is_never_changed() -> None:
    graph = snapshot(2)
    graph.with_edge(edge(1, 0, 1)).with_node(0, NodeFacts("x")).without_edges([1])
    assert graph == snapshot(2)


@given(
    st.integers(1, 8).flatmap(
        lambda count: st.tuples(
            st.just(count), st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=12)
        )
    )
)
def test_order_puts_every_parent_before_its_children(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, wanted = case
    graph = snapshot(count)
    for key, (parent, child) in enumerate(wanted):
        try:
            graph = graph.with_edge(edge(key, parent, child))
        except QmpError:
            assert parent in graph.below({child})
    order = graph.order()
    assert sorted(order) == list(range(count))
    assert all(order.index(one.parent) < order.index(one.child) for one in graph.edges if one.parent is not None)


@pytest.mark.parametrize(("old", "new"), [((), (0, 1)), ((), (1, 0)), ((0, 1), (1, 0))])
def test_order_of_a_change_heeds_new_edges_unless_old_ones_contradict(
    old: tuple[int, ...], new: tuple[int, int]
) -> None:
    before = snapshot(2)
    if old:
        before = before.with_edge(edge(1, *old))
    after = snapshot(2).with_edge(edge(2, *new))
    assert before.order_towards(after) == list(old or new)


def test_order_of_a_part_ignores_parents_outside() -> None:
    graph = Snapshot({1: NodeFacts("n1"), 2: NodeFacts("n2")}, (edge(1, 0, 2), edge(2, 2, 1)))
    assert graph.order() == [2, 1]
