"""The table of transaction actions and the contract name the same."""

from __future__ import annotations

import qsd.commands.bitmaps
import qsd.commands.snapshots  # noqa: F401  # fill the table
from qsd.commands.actions import ACTIONS
from qsd.commands.registry import COMMANDS
from qsd.qapi.schema.transaction import TransactionActionKind


def test_every_declared_action_can_be_made() -> None:
    assert {kind.value for kind in TransactionActionKind} == ACTIONS.keys()


def test_every_action_but_abort_is_a_command() -> None:
    assert ACTIONS.keys() - COMMANDS.keys() == {"abort"}
