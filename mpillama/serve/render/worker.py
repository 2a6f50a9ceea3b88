"""The process that renders: lists of [text, whether it grows] come in, one a line, and lists of blocks go out."""

import json
import os
import sys
from dataclasses import asdict

from mpillama.serve.render.markdown import render

NICENESS = 5
"""The model comes first."""


def main() -> None:
    """Answer line after line until nobody asks any more."""
    os.nice(NICENESS)
    for line in sys.stdin.buffer:
        found = [[asdict(block) for block in render(text, growing)] for text, growing in json.loads(line)]
        sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
