"""How a model is loaded and run: the one list of these settings, for command-line options and `LLM` alike."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Optional

from mpillama.comm.launcher import DEFAULT_TIMEOUT
from mpillama.errors import UserError
from mpillama.quant import WEIGHT_TYPE_NAMES

# argparse-dataclass evaluates the annotations itself and knows Optional[int], not int | None.
# ruff: noqa: UP045


def option(text: str, default: Any = None, **metadata: Any) -> Any:
    """A field with its help text; a number is at least `least`, and a `secret` is neither shown nor recorded."""
    shown = not metadata.get("secret", False)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata}, repr=shown)
    return field(default=default, metadata={"help": text, **metadata}, repr=shown)


UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """Read 64GB, 60GiB, 1.5TB, 200GB/s or a plain number of bytes."""
    return parse_number(option, text, "B", "bytes: write it like 64GB or 60GiB")


def parse_number(option: str, text: str, unit: str, what: str) -> int:
    """Read a number with a factor and perhaps a unit; `what` names the expected quantity in the error."""
    match = re.fullmatch(rf"\s*([0-9]*\.?[0-9]+)\s*([kMGT]?i?)({unit})?(/s)?\s*", text)
    if not match or match[2] not in UNITS:
        raise UserError(f"{option} {text!r} is no number of {what}.")
    return int(float(match[1]) * UNITS[match[2]])


def check_numbers(settings: Any, prefix: str = "") -> None:
    """UserError for a number below what its field allows; a `prefix` of -- spells names as options."""
    for each in fields(settings):
        value, least = getattr(settings, each.name), each.metadata.get("least")
        for number in value if isinstance(value, list) else [value]:
            if least is not None and number is not None and not number >= least:
                name = prefix + each.name.replace("_", "-") if prefix else each.name
                raise UserError(f"{name} is {number:g}: give at least {least}.")


CACHE_SIZE = "10GB"
"""Of the files of --cache-dir, if the user does not say."""
DEFAULT_DRAFTS = 4
"""Of a draft model, for each sequence and step, if the user does not say how many."""
DEFAULT_MTP = 2
"""Of the model's own layer."""
SNAPSHOTS_PER_SEQUENCE = 2
"""State slots for what others may begin from, if the user does not say how many: the prompt, and the text so far."""


def refuse_staged_mtp(path: str, is_mtp: bool, stages: int) -> None:
    """UserError if a layer that drafts tokens is to serve a model in several stages."""
    if is_mtp and stages > 1:
        raise UserError(f"{path}: a layer that drafts tokens needs --pipeline 1: take that, or a draft model.")


def state_slots(sequences: int, drafts: int = 0, snapshots: int | None = None) -> int:
    """Slots for recurrent states: each sequence's own, one for each of its drafts, and snapshots for all together."""
    found = sequences * (1 + drafts) + (SNAPSHOTS_PER_SEQUENCE * sequences if snapshots is None else snapshots)
    return max(sequences + 1, found)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, in which types, and what its ranks may use."""

    needs_head: ClassVar[bool] = True
    """Whether the program tells which token comes next, which a model of embeddings cannot."""
    warns: ClassVar[bool] = True
    """Whether loading warns of hosts and cores; of several models one is enough."""

    model: Optional[str] = option(
        "mpillama's .h5, a Hugging Face folder, a .gguf, or a distributed-llama .m file (default: data/demo.h5)",
        metavar="PATH",
    )
    weights: str = option(
        "weight type in memory, for models not in mpillama's own format (default: as-stored)",
        "as-stored",
        choices=["as-stored", *WEIGHT_TYPE_NAMES],
    )
    tokenizer: Optional[str] = option(
        "the .t file of a distributed-llama model (default: the one beside it)", metavar="PATH"
    )
    layers: Optional[int] = option(
        "run only the first N layers and extrapolate to the whole model", metavar="N", least=1
    )
    force: bool = option("load even if a host does not have enough memory", False)
    verify: bool = option("check the bytes that are read against the file's checksums", False)
    max_seq_len: Optional[int] = option(
        "limit of prompt and answer together, in tokens (default: the model's own context)", metavar="TOKENS", least=1
    )
    kv_type: str = option("type of the KV cache (default: f16)", "f16", choices=["f16", "f32", "q8", "q4"])
    sync: str = option(
        "how layers' results are added up: exact, or q80 for slow networks: rounded to about 8 bits a panel, other "
        "answers than exact, but the same on any number of ranks (default: exact)",
        "exact",
        choices=["exact", "q80"],
    )
    threads: Optional[int] = option(
        "threads of each rank (default: the cores this rank may use, shared fairly with the ranks on them)",
        metavar="COUNT",
    )
    prefill_chunk: int = option("prompt tokens computed together (default: 256)", 256, metavar="TOKENS", least=1)
    pipeline: int = option(
        "stages of equally many ranks that hold the layers one after the other; the ranks of a stage divide each of "
        "its layers (default: 1)",
        1,
        metavar="STAGES",
        least=1,
    )
    context_parallel: bool = option(
        "divide the KV cache over ranks by positions, where a rank would hold heads or latents that others have, too; "
        "answers stay the same",
        False,
    )
    shares: Optional[str] = option(
        "how much of the model each rank takes: numbers such as 3,3,1, or by bandwidth and memory, from a saved "
        "`doctor --bandwidth --json` (default: evenly)",
        metavar="FILE|N,N,…",
    )
    timeout: float = option(
        "end the job if a rank keeps the others waiting this long without progress, 0 for never (default: 600.0)",
        DEFAULT_TIMEOUT,
        metavar="SECONDS",
    )

    @property
    def state_slots(self) -> int:
        """Slots for the states of a model with recurrent layers."""
        return state_slots(1, getattr(self, "draft_tokens", 0))

    @property
    def needs_template(self) -> bool:
        """Whether the model must have a chat template."""
        return False


@dataclass(frozen=True, kw_only=True)
class SpeculationSettings:
    """Of everything that generates."""

    speculate: Optional[int] = option(
        "guess up to N tokens ahead, from the text so far or by a draft model; answers stay the same "
        "(default: 0, with a draft model 4, with --mtp 2)",
        metavar="N",
        least=0,
    )
    draft_model: Optional[str] = option(
        "a small model with the same vocabulary, in any format, that guesses what the model will say", metavar="PATH"
    )
    mtp: bool = option(
        "guess with the layer that a Hugging Face folder or GGUF has for that (multi-token prediction); what "
        "`convert --mtp` wrote goes to --draft-model",
        False,
    )
    draft_ranks: str = option(
        "which ranks hold the draft model: all divide it, or rank 0 has it alone, which saves messages where the "
        "network is slow; auto tries both while loading and keeps the faster one (default: auto)",
        "auto",
        choices=["auto", "all", "first"],
    )

    @property
    def draft_tokens(self) -> int:
        """The most tokens that are drafted for a sequence in a step."""
        if self.speculate is None:
            return DEFAULT_MTP if self.mtp else DEFAULT_DRAFTS if self.draft_model else 0
        return self.speculate

    @property
    def drafts_on_first(self) -> bool:
        """Whether rank 0 alone holds the draft model; UserError if that is asked for and there is none."""
        alone = self.draft_ranks == "first"
        if alone and self.draft_model is None and not self.mtp:
            raise UserError("--draft-ranks first says nothing without --draft-model or --mtp: give one of them, too.")
        return alone


@dataclass(frozen=True, kw_only=True)
class DiskCacheSettings:
    """Of everything that asks about texts again."""

    cache_dir: Optional[str] = option(
        "keep the KV cache of texts in this folder when it leaves memory and at an orderly end; it is found again "
        "later, on any number of ranks; shared by all hosts, or of each its own, but with --context-parallel shared; "
        "takes up to 128 MiB more a rank",
        metavar="FOLDER",
    )
    cache_size: Optional[str] = option(
        "most bytes of all files in --cache-dir, those used longest ago go first (default: 10GB)", metavar="BYTES"
    )

    @property
    def cache_folder(self) -> str | None:
        """Where files go, if anywhere; UserError if a size is given and no folder."""
        if self.cache_size is not None and self.cache_dir is None:
            raise UserError(f"--cache-size {self.cache_size} says nothing without --cache-dir: give both.")
        return self.cache_dir

    @property
    def cache_bytes(self) -> int:
        """--cache-size; UserError if it is no number of bytes above 0."""
        size = parse_bytes("--cache-size", self.cache_size or CACHE_SIZE)
        if size < 1:
            raise UserError(f"--cache-size is {self.cache_size}: give at least one byte, or leave --cache-dir out.")
        return size


@dataclass(frozen=True, kw_only=True)
class EngineSettings(ModelSettings, SpeculationSettings, DiskCacheSettings):
    """How many sequences run at once."""

    sequences: int = option("sequences computed together (default: 32)", 32, metavar="COUNT", least=1)
    cache_tokens: Optional[int] = option(
        "total positions in the KV cache, for all sequences together "
        "(default: what they can need, up to nine tenths of the memory)",
        metavar="TOKENS",
        least=1,
    )
    state_snapshots: Optional[int] = option(
        "states of recurrent layers kept for texts that begin alike (default: two for each sequence)",
        metavar="COUNT",
        least=1,
    )
    max_token_delay: Optional[float] = option(
        "compute no more of a prompt at once than lets answers under way have their next tokens within this time; "
        "answers stay the same (default: no bound)",
        metavar="SECONDS",
        least=0,
    )

    @property
    def state_slots(self) -> int:
        return state_slots(self.sequences, self.draft_tokens, self.state_snapshots)
