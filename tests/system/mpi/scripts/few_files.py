"""Run the program with a bound on the number of its open files: few_files.py NUMBER [program's arguments]."""

import resource
import sys

from mpillama.__main__ import main

if __name__ == "__main__":
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sys.exit(main(sys.argv[2:]))
