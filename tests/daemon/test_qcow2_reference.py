"""What is recorded of the reference's words about qcow2 images is what it says."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from harness import Qmp

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "qcow2_header_reference.json").read_text(encoding="utf-8")
)
EVERY = 8  # of so many cases one is asked; all of them take 3 seconds


def test_recorded_answers_about_edited_headers(reference_qmp: Qmp, tmp_path: Path) -> None:
    qmp = reference_qmp
    images = {name: zlib.decompress(base64.b64decode(text)) for name, text in RECORDED["images"].items()}
    # A daemon in the background stands in /, where the image "data" does not find its data file.
    cases = [(text, *case) for text, cases in RECORDED["answers"].items() for case in cases if case[0] != "data"]
    image = tmp_path / "edited.qcow2"
    for text, name, edits in cases[::EVERY]:
        changed = bytearray(images[name])
        for offset, data in edits.items():
            changed[int(offset) : int(offset) + len(data) // 2] = bytes.fromhex(data)
        image.write_bytes(changed + bytes(1 << 17))
        node = {
            "driver": "qcow2",
            "node-name": "q",
            "read-only": True,
            "backing": None,
            "file": {"driver": "file", "filename": str(image)},
        }
        answer = qmp.command("blockdev-add", node)
        assert answer.get("error", {}).get("desc", "") == text, (name, edits)
        if "error" not in answer:
            qmp.execute("blockdev-del", node_name="q")
