"""Whether compiled kernels can be kept where the user, or the system, says."""

import os
import stat
import tempfile
from pathlib import Path

from mpillama.errors import UserError

VARIABLE = "MPILLAMA_CACHE_DIR"


def refuse_unsafe_cache() -> None:
    """UserError for a folder that cannot be used, or that others may write to: what is loaded from it is executed."""
    given = os.environ.get(VARIABLE)
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"mpillama-{os.getuid()}"
    where = f"the folder of compiled kernels {folder}"
    remedy = f"name another one with {VARIABLE}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise UserError(f"{where}: cannot be used ({(error.strerror or str(error)).lower()}): {remedy}.") from error
    if status.st_uid != os.getuid():
        raise UserError(f"{where}: belongs to another user: {remedy}.")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{where}: others may write to it: `chmod go-w {folder}`, or {remedy}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{where}: you may not write to it: {remedy}.")
