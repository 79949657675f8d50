"""The picture of the graph: every node and edge is in it, users stand above what they use, no name breaks it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from qsd.block.drawing import Arrow, Box, to_dot, to_svg

SVG = "{http://www.w3.org/2000/svg}"
names = st.lists(
    st.text(st.characters(max_codepoint=0x2FF, exclude_categories=("Cc",)), min_size=1), min_size=1, unique=True
)


def test_users_stand_above_what_they_use() -> None:
    boxes = [Box("disk", ("disk",)), Box("raw", ("raw",)), Box("user", ("export e",), is_user=True)]
    arrows = [Arrow("user", "raw", "root"), Arrow("raw", "disk", "file"), Arrow("user", "disk", "root")]
    root = ElementTree.fromstring(to_svg(boxes, arrows))
    height = {text.text: int(text.get("y", "")) for text in root.iter(f"{SVG}text") if text.get("text-anchor")}
    assert height["export e"] < height["raw"] < height["disk"]
    assert len(list(root.iter(f"{SVG}line"))) == 3


def test_dot_says_every_node_and_edge() -> None:
    boxes = [Box("a", ("a", "file")), Box("u", ("export",), is_user=True)]
    assert to_dot(boxes, [Arrow("u", "a", "root")]).splitlines()[2:] == [
        '  "a" [label="a\\nfile"];',
        '  "u" [label="export", shape=ellipse];',
        '  "u" -> "a" [label="root"];',
        "}",
    ]


@given(names)
def test_no_name_breaks_the_pictures(keys: list[str]) -> None:
    boxes = [Box(key, (key,)) for key in keys]
    arrows = [Arrow(keys[0], key, key) for key in keys[1:]]
    shown = [text.text for text in ElementTree.fromstring(to_svg(boxes, arrows)).iter(f"{SVG}text")]
    assert len(shown) == len(boxes) + len(arrows)
    for line in to_dot(boxes, arrows).split("\n")[2:-2]:
        assert re.fullmatch(r'  "(\\.|[^"\\])*" (-> "(\\.|[^"\\])*" )?\[label="(\\.|[^"\\])*"\];', line)
