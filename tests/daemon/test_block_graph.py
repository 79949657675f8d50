"""The block graph through the whole daemon, held against what the reference (11.1.3) answered to the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from harness import Qmp

RECORDED = Path(__file__).parent.parent / "data" / "block_graph_reference.json"
AUTO_NAME = re.compile(r"#block\d+")


class Names:
    """Made-up node names end in random digits: they are compared by the order in which they are first seen."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def settle(self, value: Any) -> Any:
        """``value`` with settled names; a ``json:`` file name becomes the object it holds."""
        if isinstance(value, dict):
            return {key: self.settle(item) for key, item in sorted(value.items())}
        if isinstance(value, list):
            return [self.settle(item) for item in value]
        if isinstance(value, str):
            if value.startswith("json:"):
                return self.settle(json.loads(value[5:]))
            return AUTO_NAME.sub(lambda match: self._settle(match[0]), value)
        return value

    def _settle(self, name: str) -> str:
        return self._seen.setdefault(name, f"#{len(self._seen)}")


def answer(qmp: Qmp, step: dict[str, Any]) -> Any:
    reply = qmp.command(step["execute"], step["arguments"])
    if step["execute"] == "block-export-del" and "return" in reply:
        qmp.wait_event("BLOCK_EXPORT_DELETED")
    return reply.get("return", reply.get("error"))


def test_every_answer_is_the_reference_s(daemon: Any, tmp_path: Path) -> None:
    daemon()
    qmp = Qmp(tmp_path / "qmp.sock")
    for name in "abcd":
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 20)
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}})
    ours, theirs = Names(), Names()
    try:
        for number, step in enumerate(json.loads(RECORDED.read_text())):
            got = ours.settle(answer(qmp, step))
            assert got == theirs.settle(step["answer"]), f"step {number}: {step['execute']} {step['arguments']}"
    finally:
        qmp.close()
        for name in "abcd":
            (tmp_path / name).unlink()
