"""Planning permissions: the table of who needs what, conflicts in the reference's words, read-only and inactive."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.block.graph import UNNAMED, EdgeFacts, NodeFacts, Snapshot
from qsd.block.permissions import PERM_NAMES, Perm, perm_text
from qsd.block.plan import Plan, Rights, plan_permissions
from qsd.errors import QmpError

R, W, WU, RS = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE
ALL = Perm.ALL

FILE, FORMAT, RAW = 1, 2, 3


def passing(_node: int, _name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """Raw and filters."""
    return perm, shared


def rules(node: int, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """Node 2 is a format on a file, node 3 raw."""
    if node != FORMAT:
        return perm, shared
    return (R, R | WU) if name == "backing" else (R | W | RS, R | WU)


def root(key: int, child: int, perm: Perm, shared: Perm = ALL) -> EdgeFacts:
    return EdgeFacts(key, None, child, "root", perm=perm, shared=shared)


def edge(key: int, parent: int, child: int, name: str = "file") -> EdgeFacts:
    return EdgeFacts(key, parent, child, name, f"node 'n{parent}'")


def nodes(*keys: int) -> dict[int, NodeFacts]:
    return {key: NodeFacts(f"n{key}") for key in keys}


def planned(*edges: EdgeFacts, **changed: NodeFacts) -> Plan:
    keys = {edge.child for edge in edges} | {edge.parent for edge in edges if edge.parent is not None}
    facts = nodes(*keys) | {int(name[1:]): value for name, value in changed.items()}
    return plan_permissions(Snapshot(facts, edges), rules)


def refusal(*edges: EdgeFacts, **changed: NodeFacts) -> str:
    with pytest.raises(QmpError) as caught:
        planned(*edges, **changed)
    return caught.value.desc


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ([], Rights()),
        ([(R, ALL & ~RS)], Rights(R, ALL & ~RS)),
        ([(R | W, ALL & ~RS)], Rights(R | W, ALL & ~RS)),
        ([(R | W | RS, ALL)], Rights(R | W | RS, ALL)),
        ([(R, ALL & ~RS), (R | W, R | W)], Rights(R | W, R | W)),
    ],
)
def test_raw_needs_the_sum_of_its_users(users: list[tuple[Perm, Perm]], expected: Rights) -> None:
    roots = [root(10 + number, RAW, *rights) for number, rights in enumerate(users)]
    plan = planned(edge(1, RAW, FILE), *roots)
    assert plan.edges[1] == expected
    assert plan.nodes[FILE] == plan.nodes[RAW] == expected


def test_format_needs_its_file_even_when_idle() -> None:
    assert planned(edge(1, FORMAT, FILE)).nodes[FILE] == Rights(R | W | RS, R | WU)


def test_permissions_go_down_whatever_the_order_of_the_nodes() -> None:
    chain = [edge(number, number, number + 1) for number in (5, 7, 4, 6)]
    facts = nodes(8, 6, 4, 7, 5)
    plan = plan_permissions(Snapshot(facts, (*chain, root(99, 4, W))), passing)
    assert {plan.edges[number].perm for number in (4, 5, 6, 7)} == {W}


def test_two_formats_on_one_file_conflict() -> None:
    one, two = edge(1, FORMAT, FILE), attrs.evolve(edge(2, FORMAT, FILE), parent_text="node 'other'")
    assert refusal(one, two) == (
        "Permission conflict on node 'n1': permissions 'write, resize' are both required by node 'n2' "
        "(uses node 'n1' as 'file' child) and unshared by node 'other' (uses node 'n1' as 'file' child)."
    )


def test_raw_beside_a_format_conflicts_only_when_written() -> None:
    both = edge(1, FORMAT, FILE), edge(2, RAW, FILE)
    planned(*both)
    planned(*both, root(3, RAW, R))
    assert refusal(*both, root(3, RAW, W)).startswith(
        "Permission conflict on node 'n1': permissions 'write' are both required by node 'n3' (uses"
    )


def test_users_conflict_where_they_meet_and_are_unnamed() -> None:
    assert refusal(edge(1, RAW, FILE), root(2, FILE, R, ALL & ~RS), root(3, RAW, RS)) == (
        "Permission conflict on node 'n1': permissions 'resize' are both required by node 'n3' "
        f"(uses node 'n1' as 'file' child) and unshared by {UNNAMED} (uses node 'n1' as 'root' child)."
    )


def test_users_of_a_node_with_force_share_share_everything() -> None:
    both = edge(1, FORMAT, FILE), edge(2, FORMAT, FILE)
    plan = planned(*both, n1=NodeFacts("n1", force_share=True))
    assert plan.edges[1] == plan.edges[2] == Rights(R | W | RS, ALL)


def test_backing_file_must_not_be_written() -> None:
    backing = edge(1, FORMAT, FILE, "backing")
    assert planned(backing).nodes[FILE] == Rights(R, R | WU)
    assert "permissions 'write' are both required by" in refusal(backing, root(2, FILE, W))


@pytest.mark.parametrize("perm", [W, WU])
def test_read_only_node_has_no_writers(perm: Perm) -> None:
    stack = edge(1, RAW, FILE), root(2, RAW, perm)
    assert refusal(*stack, n1=NodeFacts("n1", read_only=True)) == "Block node is read-only"
    changing = NodeFacts("n1", read_only=True, changing=True)
    assert refusal(*stack, n1=changing) == "Read-only block node 'n1' cannot support read-write users"


def test_inactive_node_is_neither_written_nor_resized() -> None:
    off = NodeFacts("n1", active=False)
    assert refusal(root(1, FILE, RS), n1=off) == "Permission 'resize' unavailable on inactive node"
    assert refusal(root(1, FILE, W | RS), n1=off) == "Permission 'write, resize' unavailable on inactive node"
    planned(root(1, FILE, R), n1=off)


def test_edge_of_a_parent_outside_counts_as_it_stands() -> None:
    outside = attrs.evolve(edge(1, 77, FILE), perm=R, shared=ALL & ~RS)
    plan = plan_permissions(Snapshot(nodes(FILE), (outside,)), rules)
    assert plan.nodes[FILE] == plan.edges[1] == Rights(R, ALL & ~RS)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=4))
def test_plan_accepts_exactly_what_does_not_clash(users: list[tuple[int, int]]) -> None:
    roots = [root(key, FILE, Perm(perm), Perm(shared)) for key, (perm, shared) in enumerate(users)]
    clashes = any(one[0] & ~other[1] for i, one in enumerate(users) for j, other in enumerate(users) if i != j)
    snapshot = Snapshot(nodes(FILE), tuple(roots))
    if clashes:
        with pytest.raises(QmpError, match=r"^Permission conflict on node 'n1': permissions '"):
            plan_permissions(snapshot, rules)
        return
    plan = plan_permissions(snapshot, rules)
    assert all(plan.nodes[FILE].perm & perm == perm for perm, _shared in users)
    assert all(plan.nodes[FILE].shared & ~shared == 0 for _perm, shared in users)


def test_perm_text_names_in_bit_order() -> None:
    assert perm_text(ALL) == "consistent read, write, write unchanged, resize"
    assert [int(bit) for bit, _name in PERM_NAMES] == [1, 2, 4, 8]


def test_a_thousand_users_are_not_compared_with_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """To add the thousandth export of a node took a second."""
    operations = 0
    original = Perm.__and__

    def counting(self: Perm, other: int) -> Perm:
        nonlocal operations
        operations += 1
        return original(self, other)

    monkeypatch.setattr(Perm, "__and__", counting)
    many = 1000
    users = [root(key, FILE, R, ALL & ~WU) for key in range(many - 1)]
    assert planned(*users, root(many, FILE, R | W)).nodes[FILE] == Rights(R | W, ALL & ~WU)
    assert operations < 10 * many
    with pytest.raises(QmpError, match="permissions 'write unchanged' are both required"):
        planned(*users, root(many, FILE, R | WU))
