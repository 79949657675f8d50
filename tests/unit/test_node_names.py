"""Names of nodes: the rules of the reference and the names it makes up."""

from __future__ import annotations

import pytest

from qsd.block.names import NameGenerator, check_node_name
from qsd.errors import QmpError


@pytest.mark.parametrize("name", ["a", "Z9", "a-b_c.d", "x" * 31])
def test_name_that_is_allowed(name: str) -> None:
    check_node_name(name)


@pytest.mark.parametrize("name", ["", "1a", "-a", "_a", "a b", "é", "aé", "a\n", "#block012", "a/b"])
def test_name_that_is_malformed(name: str) -> None:
    with pytest.raises(QmpError) as caught:
        check_node_name(name)
    assert caught.value.desc == f"Invalid node-name: '{name}'"


def test_name_that_is_too_long() -> None:
    with pytest.raises(QmpError) as caught:
        check_node_name("x" * 32)
    assert caught.value.desc == "Node name too long"


def test_made_up_names_count_and_differ() -> None:
    digits = iter([0, 36, 51, 7])
    made = NameGenerator(lambda: next(digits))
    assert [made.next() for _ in range(4)] == ["#block000", "#block136", "#block251", "#block307"]
