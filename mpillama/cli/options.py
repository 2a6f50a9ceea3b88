"""What the user may choose: one frozen dataclass for each command.

Defaults are written into the help by hand, because argparse-dataclass prints MISSING for them; a test compares.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, ClassVar, NoReturn, Optional

import argparse_dataclass

from mpillama import __version__
from mpillama.errors import UserError
from mpillama.job.deadline import parse_duration
from mpillama.loading.settings import (
    DiskCacheSettings,
    EngineSettings,
    ModelSettings,
    SpeculationSettings,
    check_numbers,
    option,
    parse_bytes,
    state_slots,
)
from mpillama.quant import WEIGHT_TYPE_NAMES
from mpillama.text.sampling_params import About, Number, SamplingParams

# argparse-dataclass evaluates the annotations itself and knows Optional[int], not int | None.
# ruff: noqa: UP045

DESCRIPTION = """\
Run Llama-family language models over MPI: each rank loads only its own slices of one shared file.

  mpirun -n 4 python -m mpillama                                   tell a story with the demo model
  mpirun -n 4 python -m mpillama --model M.h5 --prompt "Hello"     continue a text
  mpirun -n 4 python -m mpillama chat --model M.h5                 talk to a model
  mpirun -n 4 python -m mpillama bench --shape llama-3.1-8b        measure without a file
  mpirun -n 4 python -m mpillama batch IN.jsonl OUT.jsonl --model M.h5   answer many requests, resuming after a kill
  mpirun -n 4 python -m mpillama serve --model M.h5                serve OpenAI's API and a chat page
  python -m mpillama client                                        talk to that server (needs no MPI)
  python -m mpillama plan --shape llama-3.1-405b --nodes 4         see whether a run fits (needs no MPI)
  mpirun -n 4 python -m mpillama convert FOLDER M.h5 --weights q4_0   write a native file, in parallel
  mpirun -n 4 python -m mpillama verify M.h5                       check its bytes
  mpirun -n 4 python -m mpillama perplexity --model M --file T     measure how well a model predicts a text
  python -m mpillama tokenize "Hello"                              show ids and pieces of a text (needs no MPI)
  python -m mpillama inspect M.h5                                  show what is in a file (needs no MPI)
  mpirun -n 4 python -m mpillama doctor                            check MPI, threads and processors

Without a command, `generate` runs. `python -m mpillama COMMAND --help` explains the command's options.
Environment: MPILLAMA_ISA (amx, avx512_vnni, avx512, avx2, neon, generic) forces the instruction set."""


USUAL_ACCEPTANCE = 0.7
"""The share of drafts that `plan` takes to come true, if the user does not say."""
BENCH_TOKENS = 512
"""That `bench` computes as a prompt, and decodes behind, if the user does not say how many."""


def positional(name: str, text: str) -> Any:
    """A required field that is given without a flag."""
    return field(metadata={"args": [name], "help": text})


class Options:
    """A command's options."""

    def check(self) -> None:
        """UserError for whatever the options alone show to be wrong; called before MPI starts."""
        check_numbers(self, "--")


class OnRanks(Options):
    """Options of commands that run on all ranks of an MPI job."""

    needs_one_job: ClassVar[bool] = True
    """Whether several processes that MPI does not connect are refused."""
    busy_threads: ClassVar[int] = 0
    """Threads that rank 0 has busy besides those of its kernels."""

    @property
    def is_quiet(self) -> bool:
        """Whether progress is unwanted."""
        return bool(getattr(self, "quiet", False) or getattr(self, "json", False))


@dataclass(frozen=True, kw_only=True)
class RunOptions(OnRanks, ModelSettings):
    """Options of every command that loads a model."""

    monitor: Optional[float] = option(
        "log each rank's memory, page faults and speed at this interval", metavar="SECONDS"
    )
    memory_floor: Optional[str] = option(
        "end the job when a host has less free memory than this, e.g. 2GB, before the system kills a rank",
        metavar="BYTES",
    )
    log_dir: Optional[str] = option("write a log file per rank into this folder", metavar="FOLDER")
    log_level: str = option(
        "lowest level in the log files (default: info)", "info", choices=["debug", "info", "warning"]
    )

    def check(self) -> None:
        super().check()
        if self.monitor is not None and not self.monitor > 0:
            raise UserError(f"--monitor is {self.monitor}: give a number of seconds above 0.")
        _ = self.memory_floor_bytes
        if isinstance(self, DiskCacheSettings):
            _ = self.cache_folder, self.cache_bytes
        if isinstance(self, SpeculationSettings):
            _ = self.drafts_on_first

    @property
    def memory_floor_bytes(self) -> int | None:
        """--memory-floor; UserError if it is no number of bytes."""
        return None if self.memory_floor is None else parse_bytes("--memory-floor", self.memory_floor)


def sampling(**changed: tuple[str, Any]) -> Any:
    """A field for the options of SamplingParams; those in `changed` have another help text and default."""
    params = SamplingParams(**{name: default for name, (_, default) in changed.items()})
    return field(default=params, metadata={"changed": changed})


def given_sampling() -> Any:
    """A field for those options of SamplingParams that are given, by name; nothing is known of the others."""
    return field(default_factory=dict, metadata={"changed": None})


def options_of(command: type) -> list[tuple[str, Any, Any]]:
    """Name, type and field of each of a command's options; those of sampling are in the place of their one field."""
    found: list[tuple[str, Any, Any]] = []
    for each in fields(command):
        if "changed" in each.metadata:
            found += _sampling_options(each.metadata["changed"])
        else:
            found.append((each.name, each.type, _copy(each)))
    return found


def _copy(each: Any) -> Any:
    """A field like another one, for another dataclass."""
    return field(default=each.default, default_factory=each.default_factory, metadata=each.metadata, repr=each.repr)


def _sampling_options(changed: Mapping[str, tuple[str, Any]] | None) -> Iterator[tuple[str, Any, Any]]:
    for each in fields(SamplingParams):
        about: About = each.metadata["about"]
        if about.option is None:
            continue
        if isinstance(about.values, Number):
            kind: type = about.values.kind
            default, more = each.default, dict[str, Any]()
            text = f"{about.option} (default: {about.when_none if default is None else default})"
        else:
            default, kind, more, text = [], list, {"nargs": "*", "type": about.read}, about.option
        if changed is None:
            text, default = about.option, None
        text, default = (changed or {}).get(each.name, (text, default))
        yield each.name, kind, option(text, default, metavar=about.metavar, **more)


def _assembled(command: type, values: dict[str, Any]) -> Any:
    """A command's options from what was parsed; UserError for a sampling option out of range."""
    for each in fields(command):
        if "changed" in each.metadata:
            only_given = each.metadata["changed"] is None
            names = [name for name, about in SamplingParams.about().items() if about.option is not None]
            found = {name: values.pop(name) for name in names}
            given = {name: value for name, value in found.items() if value is not None or not only_given}
            given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
            if "logit_bias" in given:
                given["logit_bias"] = dict(given["logit_bias"])
            if (most := given.get("max_tokens")) is not None and most < 1:
                raise UserError(f"--max-tokens is {most}: ask for at least 1 token.")
            params = SamplingParams(**given)
            values[each.name] = given if only_given else params
    return command(**values)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions, SpeculationSettings, DiskCacheSettings):
    sampling: SamplingParams = sampling()
    prompt: str = option(
        "text to continue, or - to read it from standard input (default: Once upon a time)",
        "Once upon a time",
        metavar="TEXT",
    )
    prompt_token_ids: Optional[str] = option("token ids to continue instead of a text", metavar="1,2,3")
    chat: bool = option("put the prompt into the model's chat template as a user message", False)
    raw: bool = option("continue the prompt as it is; the default without --chat", False)
    quiet: bool = option("print only the generated text: no prompt, no progress, no closing line", False)
    json: bool = option("print one JSON object instead of streaming text", False)
    logits_out: Optional[str] = option(
        "write the logits that each token was sampled from, float32 [steps, vocab]", metavar="FILE.npy"
    )

    @property
    def needs_template(self) -> bool:
        return self.chat

    def check(self) -> None:
        super().check()
        if self.chat and self.raw:
            raise UserError("--chat and --raw exclude each other: give one of them.")
        if self.given_token_ids is None and not self.prompt:
            raise UserError("the prompt is empty: give a text with --prompt, or - and a text on standard input.")

    @property
    def given_token_ids(self) -> list[int] | None:
        """--prompt-token-ids; UserError if they are no numbers."""
        if self.prompt_token_ids is None:
            return None
        try:
            return [int(part) for part in self.prompt_token_ids.split(",")]
        except ValueError as error:
            raise UserError(
                f"--prompt-token-ids {self.prompt_token_ids!r} is not a list of numbers like 1,2,3."
            ) from error


@dataclass(frozen=True, kw_only=True)
class ChatOptions(RunOptions, SpeculationSettings, DiskCacheSettings):
    sampling: SamplingParams = sampling()
    system: Optional[str] = option("the system message to begin with", metavar="TEXT")
    session: Optional[str] = option(
        "save the conversation in this file after each answer, and go on with it next time; without --cache-dir its KV "
        "cache is kept beside it, in FILE.cache",
        metavar="FILE",
    )
    quiet: bool = option("no progress and no closing lines", False)

    @property
    def cache_folder(self) -> str | None:
        if self.session is not None and self.cache_dir is None:
            return f"{self.session}.cache"
        return super().cache_folder

    @property
    def needs_template(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions, SpeculationSettings):
    shape: Optional[str] = option(
        "generate weights of a known shape in memory instead of reading a file, e.g. llama-3.2-1b, llama-3.1-405b",
        metavar="NAME",
    )
    weights: str = option(
        "weight type in memory; as-stored means q4_0 for a shape, as-published the types of its makers' smallest files "
        "(default: as-stored)",
        "as-stored",
        choices=["as-stored", "as-published", *WEIGHT_TYPE_NAMES],
    )
    prefill: list[int] = option(
        "prompt lengths to time (default: 512)", [BENCH_TOKENS], nargs="*", metavar="TOKENS", least=1
    )
    decode: int = option("decode steps to time (default: 64)", 64, metavar="STEPS", least=1)
    batch: list[int] = option(
        "numbers of sequences decoded together (default: 1)", [1], nargs="*", metavar="COUNT", least=1
    )
    context: int = option("position at which decoding begins (default: 512)", BENCH_TOKENS, metavar="TOKENS", least=0)
    repetitions: int = option("runs of each prompt length (default: 5)", 5, metavar="COUNT", least=1)
    where: bool = option("break down a step's time, part by part, and say which rank the others wait for", False)
    json: bool = option("print one JSON object", False)
    plot: Optional[str] = option(
        "plot the roofline and the breakdown of time; with --where and several ranks, ranks x parts and ranks x layers "
        "(needs matplotlib)",
        metavar="FILE.png",
    )

    @property
    def sequences(self) -> int:
        """The most that are decoded together."""
        return max(self.batch, default=1)

    @property
    def state_slots(self) -> int:
        return state_slots(self.sequences, self.draft_tokens) if self.draft_tokens else super().state_slots

    def check(self) -> None:
        super().check()
        if (self.shape is None) == (self.model is None):
            raise UserError("bench needs --shape NAME (weights made in memory) or --model FILE, one of them.")
        if self.draft_tokens and (self.where or self.plot or self.model is None):
            raise UserError("bench --speculate measures drafts of --model FILE, without --shape, --where and --plot.")
        if self.draft_tokens and (self.prefill, self.context) != ([BENCH_TOKENS], BENCH_TOKENS):
            raise UserError(
                "--prefill and --context say nothing of drafts, which bench measures behind texts of its own: leave "
                "them out, or --speculate, --draft-model and --mtp."
            )


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(RunOptions):
    file: str = option("text file, or - for standard input (default: -)", "-", metavar="PATH")
    context: int = option(
        "tokens in a window; as many windows as --prefill-chunk holds are computed together (default: 512)",
        512,
        metavar="TOKENS",
        least=2,
    )
    stride: Optional[int] = option(
        "tokens from one window to the next (default: the window's size, as llama.cpp does)", metavar="TOKENS"
    )
    json: bool = option("print one JSON object", False)

    def check(self) -> None:
        super().check()
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise UserError(f"--stride is {self.stride}: give 1 to {self.context} tokens (--context).")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(RunOptions, EngineSettings):
    """Options of commands that run many sequences at once."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions(EngineOptions):
    input: str = positional("input", "JSON lines: OpenAI's batch format, or id with prompt or messages")
    output: str = positional("output", "JSON lines to append to; run the same command again to continue")
    sampling: SamplingParams = sampling(
        seed=("seed of the job; with a row's id it gives the row's seed (default: 0)", 0)
    )
    time_limit: Optional[str] = option(
        "stop before this time, with status 85: seconds, MM:SS, HH:MM:SS or D-HH:MM:SS (default: the Slurm job's end)",
        metavar="TIME",
    )
    tensor_parallel: Optional[int] = option(
        "ranks that share a model; several such groups share the rows (default: the fewest ranks that fit the memory)",
        metavar="RANKS",
        least=1,
    )
    metrics: Optional[str] = option("append a JSON line of metrics every ten seconds", metavar="FILE")
    quiet: bool = option("no progress and no closing lines", False)
    json: bool = option("print the summary as one JSON object", False)

    def check(self) -> None:
        super().check()
        if self.time_limit is not None:
            parse_duration(self.time_limit)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """Options of `serve`; those of sampling count where a request says nothing."""

    needs_head: ClassVar[bool] = False
    busy_threads: ClassVar[int] = 1

    host: str = option("address to listen on (default: 127.0.0.1)", "127.0.0.1", metavar="ADDRESS")
    port: int = option("port to listen on, 0 for any that is free (default: 8000)", 8000, metavar="PORT")
    api_key: Optional[str] = option(
        "key that clients must send; auto generates one (visible in `ps`, unlike --api-key-file and MPILLAMA_API_KEY)",
        metavar="KEY",
        secret=True,
    )
    api_key_file: Optional[str] = option("file whose first line is the key", metavar="FILE")
    no_auth: bool = option("require no key: anyone who reaches the address may ask", False)
    tls_certificate: Optional[str] = option("certificate (chain) in PEM format: serve HTTPS", metavar="FILE")
    tls_key: Optional[str] = option("the certificate's private key in PEM format", metavar="FILE")
    rendezvous: Optional[str] = option(
        "file for URL, key and tunnel, read by `client` (default: in this folder, named after the job)",
        metavar="FILE",
    )
    model_name: Optional[str] = option("the model's name in the API (default: its file's)", metavar="NAME")
    sampling: SamplingParams = sampling(
        max_tokens=(
            "limit of a chat answer, in tokens (default: what the context holds; completions: 16, as in OpenAI's API)",
            None,
        )
    )
    queue: int = option(
        "answers that may wait, beyond those being computed (default: 256)", 256, metavar="COUNT", least=0
    )
    connections: int = option("requests that may be open at once (default: 1000)", 1000, metavar="COUNT", least=1)
    body_limit: str = option("limit of a request body (default: 16MB)", "16MB", metavar="BYTES")
    body_timeout: float = option("time for a request body to arrive (default: 60.0)", 60.0, metavar="SECONDS", least=1)
    write_timeout: float = option(
        "time for a client to accept what is sent (default: 60.0)", 60.0, metavar="SECONDS", least=1
    )
    request_timeout: float = option(
        "answers that take longer are cut off (default: 3600.0)", 3600.0, metavar="SECONDS", least=1
    )
    cors: list[str] = option(
        "origins whose web pages may send requests, e.g. https://example.org", [], nargs="*", metavar="ORIGIN"
    )
    pooling: str = option(
        "embeddings: the mean over all positions, or the last one (default: mean)", "mean", choices=["mean", "last"]
    )
    replicas: int = option(
        "groups that the ranks divide into, each with the whole model (default: 1)", 1, metavar="COUNT", least=1
    )
    time_limit: Optional[str] = option(
        "shut down before this time: seconds, MM:SS, HH:MM:SS or D-HH:MM:SS (default: the Slurm job's end)",
        metavar="TIME",
    )
    grace: float = option(
        "time for running answers to finish at shutdown (default: 60.0)", 60.0, metavar="SECONDS", least=0
    )
    log_prompts: bool = option("write prompts into the log files (--log-dir)", False)
    quiet: bool = option("no progress and no messages", False)

    def check(self) -> None:
        super().check()
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UserError("--tls-certificate and --tls-key go together: give both.")
        if self.time_limit is not None:
            parse_duration(self.time_limit)
        _ = self.body_limit_bytes

    @property
    def body_limit_bytes(self) -> int:
        """--body-limit; UserError if it is no number of bytes."""
        return parse_bytes("--body-limit", self.body_limit)


@dataclass(frozen=True)
class ClientOptions(Options):
    """Options of `client`; a sampling option that is not given is the server's."""

    rendezvous: Optional[str] = option(
        "the server's rendezvous file (default: the newest one in this folder)", metavar="FILE"
    )
    url: Optional[str] = option("the server's URL, instead of the one in that file", metavar="URL")
    api_key_file: Optional[str] = option(
        "file whose first line is the key (default: that of the rendezvous file, or MPILLAMA_API_KEY)", metavar="FILE"
    )
    prompt: Optional[str] = option("ask this (- for standard input) and exit", metavar="TEXT")
    system: Optional[str] = option("the system message to begin with", metavar="TEXT")
    sampling: dict[str, Any] = given_sampling()
    timeout: float = option(
        "give up when the server is silent for this long (default: 600.0)", 600.0, metavar="SECONDS"
    )
    quiet: bool = option("no help text and no prompts", False)


@dataclass(frozen=True)
class PlanOptions(Options):
    model: Optional[str] = option("model in any format", metavar="PATH")
    shape: Optional[str] = option("a known shape instead of a file, e.g. llama-3.1-405b", metavar="NAME")
    weights: str = option(
        "weight type in memory; as-stored means q4_0 for a shape, as-published the types of its makers' smallest files "
        "(default: as-stored)",
        "as-stored",
        choices=["as-stored", "as-published", *WEIGHT_TYPE_NAMES],
    )
    tokenizer: Optional[str] = option("the .t file of a distributed-llama model", metavar="PATH")
    nodes: int = option("nodes of the job (default: 1)", 1, metavar="COUNT", least=1)
    ranks_per_node: int = option("ranks on each node (default: 1)", 1, metavar="COUNT", least=1)
    memory_per_node: str = option("memory of a node, e.g. 64GB or 60GiB (default: 64GB)", "64GB", metavar="BYTES")
    draft_model: Optional[str] = option("a draft model beside the model, in any format", metavar="PATH")
    draft_ranks: str = option("which ranks hold the draft model (default: all)", "all", choices=["all", "first"])
    speculate: Optional[int] = option(
        "predict decoding with N drafts for each sequence and step (default: none, with a draft model 4)",
        metavar="N",
        least=1,
    )
    acceptance: Optional[float] = option(
        "the share of drafts that come true, which `bench --speculate` measures (default: 0.7)",
        metavar="SHARE",
        least=0,
    )
    layers: Optional[int] = option(
        "plan a trial of the first N layers; with --shape as `bench` runs it, which has no tokenizer", metavar="N"
    )
    max_seq_len: Optional[int] = option(
        "limit of prompt and answer together, in tokens (default: the model's own context)", metavar="TOKENS"
    )
    batch: int = option("sequences computed together (default: 1)", 1, metavar="COUNT", least=1)
    kv_type: str = option("type of the KV cache (default: f16)", "f16", choices=["f16", "f32", "q8", "q4"])
    threads: int = option(
        "threads of each rank, which take memory for what they compute together (default: 16)", 16, metavar="COUNT",
        least=1,
    )  # fmt: skip
    sync: str = option(
        "how layers' results are added up between nodes (default: exact)", "exact", choices=["exact", "q80"]
    )
    memory_bandwidth: str = option("memory bandwidth of a node (default: 200GB/s)", "200GB/s", metavar="BYTES/s")
    compute: str = option(
        "multiply-adds per second of a node, 150 GMAC/s for each core with VNNI (default: 2TMAC/s)",
        "2TMAC/s",
        metavar="MAC/s",
    )
    bench: Optional[str] = option(
        "take from a saved `bench --json` the node's bandwidth and compute (those of all its ranks, divided by its "
        "hosts), and what Python and MPI add to a step, a layer and a message; with --where and several ranks, apart "
        "from these, how long ranks wait for each other",
        metavar="FILE",
    )
    pipeline: Optional[int] = option(
        "stages of equally many nodes that hold the layers one after the other; others are compared (default: 1, with "
        "--sbatch and no --shares the best number)",
        metavar="STAGES",
        least=1,
    )
    shares: Optional[str] = option(
        "how much of the model each rank takes: numbers such as 3,3,1, or a saved `doctor --bandwidth --json`, which "
        "also says how fast and how large each rank's memory is (default: evenly)",
        metavar="FILE|N,N,…",
    )
    context_parallel: bool = option("divide the KV cache over ranks by positions", False)
    network: str = option("latency and bandwidth between nodes (default: 5us,10GB/s)", "5us,10GB/s", metavar="L,B")
    read_bandwidth: Optional[str] = option(
        "read bandwidth of a node from the file system, e.g. 5GB/s", metavar="BYTES/s"
    )
    sbatch: Optional[str] = option("write a job script for this plan if it fits", metavar="FILE")
    json: bool = option("print one JSON object", False)

    def check(self) -> None:
        super().check()
        if (self.shape is None) == (self.model is None):
            raise UserError("plan needs --shape NAME or --model PATH, one of them.")
        if self.acceptance is not None and self.acceptance > 1:
            raise UserError(f"--acceptance is {self.acceptance:g}: give a share from 0 to 1.")
        if self.draft_ranks == "first" and self.draft_model is None:
            raise UserError("--draft-ranks first says nothing without --draft-model: give both.")
        if self.acceptance is not None and self.speculate is None and self.draft_model is None:
            raise UserError(
                f"--acceptance {self.acceptance:g} says nothing without --speculate or --draft-model: give one of "
                "them, too."
            )

    @property
    def acceptance_rate(self) -> float:
        """--acceptance, or what many drafts reach."""
        return USUAL_ACCEPTANCE if self.acceptance is None else self.acceptance


@dataclass(frozen=True)
class ConvertOptions(OnRanks):
    source: str = positional("source", "Hugging Face folder, .gguf file or distributed-llama .m file")
    target: str = positional("target", "the .h5 file to write")
    weights: str = option(
        "weight type of the new file (default: as-stored)", "as-stored", choices=["as-stored", *WEIGHT_TYPE_NAMES]
    )
    importance: Optional[str] = option(
        "importance matrix of llama.cpp (GGUF or .dat), by which columns count when weights are quantised",
        metavar="PATH",
    )
    tokenizer: Optional[str] = option(
        "the .t file of a distributed-llama model (default: the one beside it)", metavar="PATH"
    )
    mtp: bool = option("write the layer that drafts tokens for the model, for --draft-model, instead of it", False)
    force: bool = option("replace the target if it exists", False)
    threads: Optional[int] = option(
        "threads of each rank (default: the cores this rank may use, shared fairly with the ranks on them)",
        metavar="COUNT",
    )
    json: bool = option("print one JSON object", False)


@dataclass(frozen=True)
class VerifyOptions(OnRanks):
    file: str = positional("file", "model in any format, as for --model")
    tokenizer: Optional[str] = option("the .t file of a distributed-llama model", metavar="PATH")
    json: bool = option("print one JSON object", False)


@dataclass(frozen=True)
class TokenizeOptions(Options):
    text: str = positional("text", "text, or - for standard input")
    model: Optional[str] = option("model in any format (default: data/demo.h5)", metavar="PATH")
    tokenizer: Optional[str] = option("the .t file of a distributed-llama model", metavar="PATH")
    literal: bool = option("treat the names of special tokens as ordinary text", False)
    json: bool = option("print one JSON object", False)


@dataclass(frozen=True)
class PackOptions(Options):
    file: str = positional("file", "tar file to write")


@dataclass(frozen=True)
class InspectOptions(Options):
    file: str = positional("file", "model in any format, as for --model")
    tokenizer: Optional[str] = option("the .t file of a distributed-llama model", metavar="PATH")
    json: bool = option("print one JSON object", False)


@dataclass(frozen=True)
class DoctorOptions(OnRanks):
    needs_one_job: ClassVar[bool] = False

    threads: Optional[int] = option("threads of each rank, as for generate", metavar="COUNT")
    bandwidth: bool = option("measure how fast each rank reads memory; --shares takes the result", False)
    json: bool = option("print one JSON object", False)


COMMANDS: dict[str, tuple[type, str]] = {
    "generate": (GenerateOptions, "continue a text (the default command)"),
    "chat": (ChatOptions, "talk to a model"),
    "bench": (BenchOptions, "measure speed, and how close it is to the machine's limit"),
    "batch": (BatchOptions, "answer a file of requests, surviving kills"),
    "serve": (ServeOptions, "serve OpenAI's API and a chat page"),
    "client": (ClientOptions, "talk to a server that `serve` runs (needs no MPI)"),
    "plan": (PlanOptions, "see whether a run fits, and what it needs, before it is queued"),
    "convert": (ConvertOptions, "convert a model of any format to a native file"),
    "verify": (VerifyOptions, "check a model's bytes"),
    "perplexity": (PerplexityOptions, "measure how well a model predicts a text"),
    "tokenize": (TokenizeOptions, "show the ids and pieces of a text"),
    "inspect": (InspectOptions, "show what is in a model file"),
    "doctor": (DoctorOptions, "check MPI, ranks, threads and instruction sets"),
    "pack": (PackOptions, "make one file of this environment, for many nodes to unpack"),
}


class _Collect(argparse.Action):
    """Stores values; an option for lists may be given several times and loses nothing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Take the values of one occurrence."""
        given = getattr(namespace, self.dest, None)
        is_list = isinstance(values, list) and given is not self.default
        setattr(namespace, self.dest, [*given, *values] if is_list and given else values)


class _Parser(argparse_dataclass.ArgumentParser):  # type: ignore[misc]
    """Reports a mistake as one sentence."""

    def register(self, registry_name: str, value: Any, object: Any) -> None:  # noqa: A002 - argparse's own name
        """Make _Collect the action of options that name none."""
        super().register(registry_name, value, _Collect if (registry_name, value) == ("action", None) else object)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage on every rank."""
        raise UserError(f"{message}; `{self.prog} --help` shows the options.")


class _CommandParser(argparse.ArgumentParser):
    """As _Parser, for the program itself."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage on every rank."""
        raise UserError(f"{message}; `{self.prog} --help` shows the commands.")


@dataclass
class _NoOptions:
    pass


def build_parser(commands: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of the whole program, which knows the options of these commands, and of others the names."""
    parser = _CommandParser(
        prog="mpillama", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mpillama {__version__}")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (options_class, text) in COMMANDS.items():
        flat: type = _NoOptions
        if name in commands:
            flat = make_dataclass(name, options_of(options_class), repr=False, eq=False, kw_only=True)
        parsers.add_parser(name, options_class=flat, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser


def recorded(options: Any) -> dict[str, Any]:
    """The options as results may tell them: without secrets."""
    found: dict[str, Any] = {}
    for each in fields(options):
        value = getattr(options, each.name)
        if isinstance(value, SamplingParams):
            found |= recorded_sampling(value)
        elif not each.metadata.get("secret"):
            found[each.name] = value
    return found


def recorded_sampling(params: SamplingParams) -> dict[str, Any]:
    """The sampling options, as they are typed."""
    found = {name: getattr(params, name) for name, about in SamplingParams.about().items() if about.option is not None}
    bias = [f"{token}={bias:.15g}" for token, bias in params.logit_bias.items()]
    return {**found, "logit_bias": bias, "stop": list(params.stops)}


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Return the command and its options; UserError for a mistake. Ends the program after --help and --version."""
    first = arguments[0] if arguments else ""
    if first not in COMMANDS and first not in ("-h", "--help", "--version"):
        if first and not first.startswith("-"):
            raise UserError(f"unknown command {first!r}: choose one of {', '.join(COMMANDS)}, or begin with an option.")
        arguments = ["generate", *arguments]
    values = vars(build_parser(arguments[:1]).parse_args(list(arguments)))
    command = values.pop("command")
    options = _assembled(COMMANDS[command][0], values)
    options.check()
    return command, options
