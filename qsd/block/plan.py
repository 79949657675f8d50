"""Planning permissions: what every edge of a snapshot uses and shares, or why that cannot be.

A node's users together need the union of what they use and share the intersection of what they share; from those
the node's driver derives what the node itself uses and shares on its children (``Rule``), and so on down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs

from qsd.block.graph import EdgeFacts, NodeFacts, Snapshot
from qsd.block.permissions import Perm, perm_text
from qsd.errors import QmpError

# (node, name of its child edge, used by the parents, shared by the parents) -> (used, shared) on that edge.
Rule = Callable[[int, str, Perm, Perm], tuple[Perm, Perm]]

WRITING = Perm.WRITE | Perm.WRITE_UNCHANGED
# What an inactive node cannot give: the image belongs to somebody else meanwhile.
NOT_WHEN_INACTIVE = Perm.WRITE | Perm.RESIZE


@attrs.frozen
class Rights:
    """A set of permissions used, and one shared."""

    perm: Perm = Perm.NONE
    shared: Perm = Perm.ALL


@attrs.frozen
class Plan:
    """The outcome: per edge (by key) what it is to use and share, and per node what its users add up to."""

    edges: Mapping[int, Rights]
    nodes: Mapping[int, Rights]


def sum_of(edges: Iterable[EdgeFacts]) -> Rights:
    """What users need together, and what all of them share."""
    # In plain integers: a node may have a thousand exports, and operators of flags take a microsecond each.
    perm, shared = Perm.NONE.value, Perm.ALL.value
    for edge in edges:
        perm |= edge.perm.value
        shared &= edge.shared.value
    return Rights(Perm(perm), Perm(shared))


def plan_permissions(snapshot: Snapshot, rule: Rule) -> Plan:
    """Work out all permissions from the top of ``snapshot`` down. Raises QmpError in the reference's words."""
    planned: dict[int, EdgeFacts] = {edge.key: edge for edge in snapshot.edges}
    nodes: dict[int, Rights] = {}
    users: dict[int, list[EdgeFacts]] = {}
    uses: dict[int, list[EdgeFacts]] = {}
    for edge in snapshot.edges:
        users.setdefault(edge.child, []).append(edge)
        if edge.parent is not None:
            uses.setdefault(edge.parent, []).append(edge)
    for key in snapshot.order():
        facts = snapshot.nodes[key]
        parents = [planned[edge.key] for edge in reversed(users.get(key, ()))]
        rights = sum_of(parents)
        _check_conflicts(facts, parents, rights)
        _check_mode(facts, rights)
        nodes[key] = rights
        for edge in uses.get(key, ()):
            perm, shared = rule(key, edge.name, rights.perm, rights.shared)
            if snapshot.nodes[edge.child].force_share:
                shared = Perm.ALL
            planned[edge.key] = attrs.evolve(edge, perm=perm, shared=shared)
    return Plan({key: Rights(edge.perm, edge.shared) for key, edge in planned.items()}, nodes)


def _check_conflicts(facts: NodeFacts, parents: list[EdgeFacts], rights: Rights) -> None:
    used = rights.perm.value
    # Of several conflicts the reference tells that of the newest user who does not share. Most share what is used.
    for other in (edge for edge in parents if used & ~edge.shared.value):
        for one in parents:
            clash = one.perm & ~other.shared
            if one is not other and clash:
                raise QmpError(
                    f"Permission conflict on node '{facts.name}': permissions '{perm_text(clash)}' are both "
                    f"required by {one.parent_text} (uses node '{facts.name}' as '{one.name}' child) and "
                    f"unshared by {other.parent_text} (uses node '{facts.name}' as '{other.name}' child)."
                )


def _check_mode(facts: NodeFacts, rights: Rights) -> None:
    if facts.read_only and rights.perm & WRITING:
        if facts.changing:
            raise QmpError(f"Read-only block node '{facts.name}' cannot support read-write users")
        raise QmpError("Block node is read-only")
    if facts.ragged and rights.perm & WRITING and not rights.perm & Perm.RESIZE:
        raise QmpError(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
        )
    if not facts.active and rights.perm & NOT_WHEN_INACTIVE:
        raise QmpError(f"Permission '{perm_text(rights.perm & NOT_WHEN_INACTIVE)}' unavailable on inactive node")
