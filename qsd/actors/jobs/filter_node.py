"""The filter a block job puts above the node it works on: opening it, putting it in, taking it out."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import attrs

from qsd.errors import QmpError
from qsd.qapi.schema.block import BlockdevOptions

if TYPE_CHECKING:
    from qsd.actors.change import Change
    from qsd.actors.graph_actions import GraphTools
    from qsd.actors.node import Node


class FilterKind(str, Enum):
    """Drivers that only jobs use: no option names them."""

    STREAM = "copy-on-read"


@attrs.frozen(kw_only=True, slots=False)
class FilterOptions(BlockdevOptions):
    """The options of such a node."""

    driver: Any
    file: str


async def open_filter(tools: GraphTools, kind: FilterKind, node: Node, name: str | None) -> Node:
    """Open a filter above ``node``, with one pin of the caller's and nobody who uses it yet. Raises QmpError.

    It is active, which the graph refuses above an inactive node: a job could not write to that.
    """
    make: Any = FilterOptions  # mypy does not see what the base declares
    options = make(driver=kind, node_name=name, file=node.name, read_only=node.mode.read_only)
    try:
        return await tools.opener.open(options)
    except QmpError as error:
        raise error.prefixed("Could not create node: ") from None


def put_in(change: Change, node: Node, new: Node) -> None:
    """Let everybody who uses ``node`` use the filter ``new`` above it instead."""
    for edge in change.edges_to(node):
        if edge.parent is not new:
            change.swap(edge, new)


def take_out(change: Change, node: Node, old: Node) -> None:
    """Let everybody who uses the filter ``old`` use ``node`` below it again."""
    for edge in change.edges_to(old):
        change.swap(edge, node)
