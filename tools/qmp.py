#!/usr/bin/env python3
"""Send one QMP command to a monitor socket and print the answer: ``qmp.py SOCKET COMMAND [JSON ARGUMENTS]``."""

from __future__ import annotations

import json
import socket
import sys


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    path, command, *arguments = sys.argv[1:]
    request = {"execute": command, "id": "q"}
    if arguments:
        request["arguments"] = json.loads(arguments[0])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rw", encoding="utf-8")
        stream.write('{"execute": "qmp_capabilities"}\n' + json.dumps(request) + "\n")
        stream.flush()
        for line in stream:
            answer = json.loads(line)
            if answer.get("id") == "q":
                print(json.dumps(answer.get("return", answer.get("error")), indent=2))
                return 1 if "error" in answer else 0
    print("the monitor closed the connection", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
