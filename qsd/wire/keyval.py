"""The ``key=value,key=value`` syntax of the command line: text to a tree of dicts, lists and strings.

Rules (the reference's): ``,,`` in a value is a comma; a key is a dotted path; a number as a later part of the path
is a list index (any order, no gaps, leading zeros allowed); a later value of the same key wins; a key cannot have
both a value and parts below it. The first word may lack its key if the option has an implied one; it then ends at
the first comma. ``help`` or ``?`` where a key could stand asks for help.
"""

from __future__ import annotations

import re
from typing import Any

import attrs

from qsd.errors import QmpError

_FRAGMENT_LIMIT = 127
_VALUE = re.compile(r"(?:[^,]|,,)*+", re.DOTALL)
_HELP = ("help", "?")
_INDEX = re.compile(r"[0-9]+")
# A name, or a downstream one: __ and a reversed domain name (which may have dots), _ and the rest.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*|__[A-Za-z0-9.-]*_[A-Za-z0-9_-]+")
_Tree = dict[str, Any]


@attrs.frozen
class Keyval:
    """``tree`` for ``qsd.qapi.visit.from_keyval``; ``wants_help`` when help was asked for anywhere."""

    tree: dict[str, Any]
    wants_help: bool


def parse(text: str, implied: str | None = None) -> Keyval:
    """Parse an option's argument. Raises QmpError in the reference's words."""
    root: _Tree = {}
    wants_help = False
    at = 0
    while at < len(text):
        end = _key_end(text, at)
        has_value = end < len(text) and text[end] == "="
        word = text[at:end]
        if not has_value and word in _HELP:
            wants_help = True
            at = end + 1
        elif not has_value and at == 0 and implied is not None and word:
            _put(root, implied, [implied], word)
            at = end + 1
        else:
            path = _path(word)
            if not has_value:
                raise QmpError(f"Expected '=' after parameter '{word}'")
            match = _VALUE.match(text, end + 1)
            stop = match.end() if match else end + 1
            _put(root, word, path, text[end + 1 : stop].replace(",,", ","))
            at = stop + 1
    return Keyval(_to_lists(root), wants_help)


def _key_end(text: str, start: int) -> int:
    ends = (text.find("=", start), text.find(",", start))
    return min((end for end in ends if end >= 0), default=len(text))


def _path(key: str) -> list[str]:
    """Split a key into the parts of its path. Raises QmpError."""
    parts: list[str] = []
    at = 0
    while True:
        part = _part(key, at, is_first=not parts)
        at += len(part)
        if not part or (at < len(key) and key[at] != "."):
            raise QmpError(f"Invalid parameter '{key}'")
        if len(part) > _FRAGMENT_LIMIT:
            which = "Parameter" if part == key else "Parameter fragment"
            raise QmpError(f"{which} '{part}' is too long")
        parts.append(part)
        if at == len(key):
            return parts
        at += 1


def _part(key: str, at: int, *, is_first: bool) -> str:
    match = None if is_first else _INDEX.match(key, at)
    match = match or _NAME.match(key, at)
    return match.group() if match else ""


def _put(root: _Tree, key: str, path: list[str], value: str) -> None:
    holder = root
    for depth, part in enumerate(path[:-1]):
        below = holder.setdefault(part, {})
        if isinstance(below, str):
            raise _inconsistent(".".join(path[: depth + 1]))
        holder = below
    if isinstance(holder.get(path[-1]), dict):
        raise _inconsistent(key)
    holder[path[-1]] = value


def _inconsistent(key: str) -> QmpError:
    return QmpError(f"Parameters '{key}.*' used inconsistently")


def _to_lists(root: _Tree) -> _Tree:
    """Turn dicts whose keys are all indexes into lists, the deepest first. Raises QmpError.

    Walks with a stack of its own: a key may have thousands of parts.
    """
    todo: list[tuple[_Tree, str, str]] = [(root, key, key) for key in root]
    trees: list[tuple[_Tree, str, str]] = []
    while todo:
        holder, key, name = todo.pop()
        tree = holder[key]
        if isinstance(tree, dict):
            trees.append((holder, key, name))
            todo.extend((tree, below, f"{name}.{below}") for below in tree)
    for holder, key, name in reversed(trees):
        holder[key] = _to_list(name, holder[key])
    return root


def _to_list(name: str, tree: _Tree) -> Any:
    indexes = [key for key in tree if _INDEX.fullmatch(key)]
    if not indexes:
        return tree
    if len(indexes) != len(tree):
        raise _inconsistent(name)
    by_index = {int(key): tree[key] for key in indexes}
    for position in range(len(by_index)):
        if position not in by_index:
            raise QmpError(f"Parameter '{name}.{position}' missing")
    return [by_index[position] for position in range(len(by_index))]
