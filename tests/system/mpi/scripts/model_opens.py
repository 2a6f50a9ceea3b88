"""Run the program and count how often each rank opens the model: model_opens.py DIRECTORY [program's arguments].

Each rank leaves two numbers in a file of DIRECTORY: opens to look at samples, and opens to read weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from mpillama.__main__ import main
from mpillama.comm.launcher import launched_rank

DIRECTORY, ARGUMENTS = Path(sys.argv[1]), sys.argv[2:]
CALLERS = ("mpillama/formats/contents.py", "mpillama/formats/reading.py")


if __name__ == "__main__":
    model = ARGUMENTS[ARGUMENTS.index("--model") + 1]
    opens, found = os.open, dict.fromkeys(CALLERS, 0)

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == model:
            caller = sys._getframe(1).f_code.co_filename
            found[next(name for name in CALLERS if caller.endswith(name))] += 1
        return opens(path, *arguments, **options)

    os.open = counted
    status = main(ARGUMENTS)
    (DIRECTORY / f"opens-{launched_rank()}").write_text(json.dumps(list(found.values())))
    sys.exit(status)
