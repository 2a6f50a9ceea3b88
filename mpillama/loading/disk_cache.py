"""Opening the folder of `--cache-dir`: which model its files are of, and who of the ranks counts them."""

import hashlib
import json
import secrets
from functools import partial
from pathlib import Path

from mpillama import __version__
from mpillama.comm.communicator import Communicator
from mpillama.engine.cache_folder import CacheFolder, FolderSettings
from mpillama.engine.executor import Executor
from mpillama.errors import UserError
from mpillama.formats.contents import sample_digests
from mpillama.formats.reading import modified
from mpillama.job.same_program import FOLDER, contents_of
from mpillama.loading.load import LoadedModel
from mpillama.loading.model_file import ModelFile
from mpillama.loading.settings import DiskCacheSettings, ModelSettings
from mpillama.models.cache_layout import Coverage, Kind, Layout
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Partition


def open_cache_folder(settings: ModelSettings, loaded: LoadedModel, executor: Executor) -> None:
    """Let the executors of all ranks keep what leaves memory in a folder, if the user names one.

    UserError on all ranks if one cannot write there.
    """
    if not isinstance(settings, DiskCacheSettings) or settings.cache_folder is None:
        return
    path, limit = settings.cache_folder, settings.cache_bytes
    comm, model = executor.comm, loaded.model
    identity = comm.on_root(lambda: comm.busy(lambda: identity_of(settings, loaded.file, model.config)))
    folder = Path(path).absolute()
    comm.together(lambda: _make(folder))
    coverage_of = partial(Coverage.of_rank, model.config, model.part)
    layout_of = partial(_layout, model.config, model.part, settings.kv_type)
    own = layout_of("block", coverage_of("block")).size
    comm.together(lambda: _refuse_idle_root(comm, own))
    counts, sharers = _division_of_work(comm, folder, own)
    holders = model.part.holders
    made = FolderSettings(folder, identity, limit, counts, sharers, model.comm.rank % holders, holders)
    executor.folder = CacheFolder(made, executor.cache, coverage_of, layout_of)


def identity_of(settings: ModelSettings, file: ModelFile, config: ModelConfig) -> str:
    """What keys and values depend on besides the text: model, types, and program; 32 characters."""
    stamps = [(Path(path).name, *modified(Path(path).stat())) for path in file.files]
    types = file.weight_types
    names = types.default.name, sorted((name, kind.name) for name, kind in (types.by_name or {}).items())
    found = [
        __version__, contents_of(FOLDER), file.metadata_sha256, stamps, sample_digests(file.files).tolist(),
        settings.weights, names, settings.kv_type, settings.sync, repr(config),
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest()


def _layout(config: ModelConfig, part: Partition, kv_type: str, kind: Kind, coverage: Coverage) -> Layout:
    return Layout(config, part, kv_type, kind, coverage)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--cache-dir {folder}: cannot be written ({error.strerror}): name a folder in which every rank may write."
        ) from error


def _refuse_idle_root(comm: Communicator, own: int) -> None:
    if comm.is_root and not own:
        raise UserError(
            "--cache-dir: rank 0 decides what is kept, but no layer with a KV cache is its own: give it a part of "
            "them (--shares, --pipeline), or leave --cache-dir out."
        )


def _division_of_work(comm: Communicator, folder: Path, own: int) -> tuple[bool, float]:
    """Whether this rank counts the files of a folder for all that share it, and how many times its own bytes they have.

    Ranks see by files of each other which of them share one. Call it on all ranks.
    """
    token = comm.broadcast(secrets.token_hex(8))
    mine = folder / f".{token}-{comm.rank}"
    if own:
        mine.touch()
    sizes = comm.gather(own)
    sharers = [rank for rank in range(comm.size) if (folder / f".{token}-{rank}").exists()]
    comm.barrier()
    mine.unlink(missing_ok=True)
    if not own or comm.rank != min(sharers, default=comm.rank):
        return False, 1.0
    return True, sum(sizes[rank] for rank in sharers) / own
