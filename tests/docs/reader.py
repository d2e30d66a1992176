"""A Python that runs code blocks one after the other in one namespace, as a reader at a prompt does.

It takes a JSON line `{"where": ..., "code": ...}` per block, and answers what the block printed and, if it
raised, the traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    namespace: dict[str, Any] = {"__name__": "reader"}
    for line in sys.stdin:
        block = json.loads(line)
        printed, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(block["code"], block["where"], "exec"), namespace)  # its purpose
        except BaseException:  # noqa: BLE001  # the test shall see it, whatever it is
            error = traceback.format_exc()
        print(json.dumps({"printed": printed.getvalue(), "error": error}), flush=True)


if __name__ == "__main__":
    main()
