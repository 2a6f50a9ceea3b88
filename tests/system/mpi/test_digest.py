"""One answer: the logits have the same bits for any number of ranks and threads, prefill chunk and instruction set."""

import json
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.formats.native.writer import write_model
from mpillama.kernels.isa import choose_isa, host_features, known_sets
from mpillama.loading.model_file import open_model
from mpillama.quant.registry import WEIGHT_TYPES
from tests import golden_models
from tests import tiny_models as models
from tests.conftest import ModelFile
from tests.golden_models import FOLDER as GOLDEN
from tests.system.mpi.launch import PROGRAM, run

PROMPT_TOKENS, TOKENS = 61, 5
"""Together they cross the border between two blocks of the KV cache."""
LONG_PROMPTS = {"minimax_m3": 250}
"""Of models whose tokens must choose what they see."""
EOS = 1
NAMES = [isa.name for isa in known_sets()]
CHUNKS = (256, 19)
"""The prompt whole, and in chunks of which the last is short."""
TIMEOUT = 500.0
Digests = dict[str, str]
Measure = Callable[..., Digests]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]


def prompt_of(model: Path) -> list[int]:
    """Token ids from the whole vocabulary, the same on every run."""
    vocab_size = open_model(str(model)).config.vocab_size
    tokens = LONG_PROMPTS.get(model.stem, PROMPT_TOKENS)
    return [int(i) for i in np.random.default_rng(5).integers(2, vocab_size, tokens)]


def case(
    model: Path, chunk: int = 256, kv_type: str = "f16", way: int = 0, weights: str = "as-stored", sync: str = "exact"
) -> dict[str, Any]:
    """What scripts/digest.py is to do."""
    return {
        "model": str(model),
        "weights": weights,
        "kv_type": kv_type,
        "prefill_chunk": chunk,
        "prompt": prompt_of(model),
        "banned": EOS,
        "way": way,
        "sync": sync,
    }


def name_of(made: dict[str, Any]) -> str:
    """What the digest of a case depends on: model, weight and KV type, and rounding of sums, nothing else."""
    return f"{Path(made['model']).stem} {made['weights']}, KV {made['kv_type']}, {made['sync']}"


@pytest.fixture(scope="module")
def measure() -> Measure:
    """Give the digests of cases on some ranks; all cases of one name must agree already."""

    def digests(cases: list[dict[str, Any]], ranks: int, isa: str = "", threads: int = 1, hosts: str = "") -> Digests:
        if isa:
            skip_without(isa)
        arguments = (str(threads), str(TOKENS), json.dumps(cases))
        environment = {"MPILLAMA_ISA": isa, "MPILLAMA_RANKS_PER_HOST": hosts}
        script, apart = "tests.system.mpi.scripts.digest", ranks == 2  # of which each finds a core, mostly
        result = run(ranks, "-m", script, *arguments, env=environment, timeout=TIMEOUT, all_cores=apart)
        assert result.status == 0, result.stderr
        found: dict[str, set[str]] = {}
        for made, digest in zip(cases, json.loads(result.stdout), strict=True):
            found.setdefault(name_of(made), set()).add(digest)
        assert all(len(values) == 1 for values in found.values()), f"chunk or way change the bits: {found}"
        return {name: values.pop() for name, values in found.items()}

    return digests


@cache
def lacking(isa: str) -> str:
    """Why this processor cannot run an instruction set, "" if it can."""
    try:
        choose_isa(isa, host_features())
    except UserError as error:
        return str(error)
    return ""


def skip_without(isa: str) -> None:
    """Skip a test of instructions that this processor lacks."""
    if lacking(isa):
        pytest.skip(lacking(isa))


SMALL, LARGE = 2.0**-12, 2.0**18


def write_cancelling(path: Path, weight_type: str) -> None:
    """Write a model whose sums over ranks lose bits unless they are exact.

    The first and the last head, and the first and the last channel of the MLP, do the same with opposite signs: large
    numbers that cancel, and the small ones between them are all that is left.
    """
    config = {**models.AWKWARD, "rms_norm_eps": 1e-12}
    tensors = models.random_tensors(config)
    tensors["model.embed_tokens.weight"] *= SMALL
    head = config["head_dim"]
    for layer in range(config["num_hidden_layers"]):
        q, k, v, o, gate, up, down = (
            tensors[f"model.layers.{layer}.{name}_proj.weight"]
            for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        )
        for matrix in (q, k, v):
            matrix[-head:] = matrix[:head]
        for matrix in (gate, up):
            matrix[-1] = matrix[0]
        for matrix, width in ((o, head), (down, 1)):
            matrix *= SMALL
            matrix[:, :width] *= LARGE / SMALL
            matrix[:, -width:] = -matrix[:, :width]
    write_model(str(path), config, WEIGHT_TYPES[weight_type], tensors.__getitem__, {})


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("cancelling") / f"cancelling-{name}.h5" for name in ("f32", "q8_0")]
    for path in paths:
        write_cancelling(path, path.stem.removeprefix("cancelling-"))
    return paths


@pytest.fixture(scope="module")
def all_types(model_file: ModelFile, toy: Path, cancelling: list[Path]) -> list[dict[str, Any]]:
    """The awkward model in every weight type, the toy model (fewer units than ranks), every type of KV cache."""
    awkward = [model_file("awkward", name) for name in WEIGHT_TYPES]
    return [
        *(case(model, chunk, way=way) for model in awkward for way, chunk in enumerate(CHUNKS)),
        case(awkward[0], 1),
        case(model_file("awkward", "q8_0"), 1, way=1),
        case(toy),
        case(toy, 5, way=1),
        *(case(model, chunk, way=1 - way) for model in cancelling for way, chunk in enumerate(CHUNKS)),
        *(case(model_file("awkward", "q8_0"), chunk, kv_type) for kv_type in ("f32", "q8", "q4") for chunk in (256, 5)),
        *(case(GOLDEN / "deepseek_v3", chunk, "q4") for chunk in CHUNKS),
    ]


@pytest.fixture(scope="module")
def truth(measure: Measure, all_types: list[dict[str, Any]]) -> Digests:
    """The digests of one rank with one thread and the best instructions."""
    return measure(all_types, 1)


def half_of_types(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out every second weight type: neighbours have blocks of the same size."""
    left_out = {f"awkward-{name} as-stored, KV f16, exact" for name in [*WEIGHT_TYPES][::2]}
    return [made for made in cases if name_of(made) not in left_out]


def one_of_each(cases: list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    """One case of each name, in another turn another one."""
    named: dict[str, list[dict[str, Any]]] = {}
    for made in cases:
        named.setdefault(name_of(made), []).append(made)
    return [group[(number + turn) % len(group)] for number, group in enumerate(named.values())]


def test_digest_sees_weight_type_and_kv_type(truth: Digests) -> None:
    """Else the comparisons below would prove nothing."""
    assert len(truth) == len(WEIGHT_TYPES) + 7
    assert len(set(truth.values())) == len(truth)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_any_number_of_ranks(ranks: int, measure: Measure, all_types: list[dict[str, Any]], truth: Digests) -> None:
    """On 4, twice 2, with half of the weight types."""
    found = measure(half_of_types(all_types) if ranks == 4 else all_types, ranks)
    assert len(found) == len(truth) - (-(-len(WEIGHT_TYPES) // 2) if ranks == 4 else 0)
    assert found == {name: truth[name] for name in found}


@pytest.mark.parametrize(("hosts", "ranks", "threads"), [("2", 4, 1), ("2,1", 3, 2), ("3,1,1", 5, 1), ("1", 3, 1)])
def test_any_hosts(
    hosts: str, ranks: int, threads: int, measure: Measure, toy: Path, cancelling: list[Path], model_file: ModelFile,
    truth: Digests,
) -> None:  # fmt: skip
    """The ranks of this machine as if they were on several hosts, with all ways of exchanging sums."""
    paths = [model_file("awkward", "q4_0"), toy, *cancelling]
    cases = [case(path, chunk, way=way) for path in paths for way, chunk in enumerate((256, 19, 256, 7), 2)]
    found = measure(cases, ranks, threads=threads, hosts=hosts)
    assert found == {name: truth[name] for name in found}


def test_hosts_that_are_no_power_of_two(measure: Measure, demo: Path) -> None:
    """All ways of exchanging sums, exact and rounded ones, whose bits differ."""
    kinds, ways = ("exact", "q80"), [*enumerate((256, 19, 256, 7, 256), 2)]
    cases = [case(demo, chunk, way=way, sync=sync) for sync in kinds for way, chunk in ways]
    alone = measure([case(demo, sync=sync) for sync in kinds], 1)
    assert len(set(alone.values())) == len(kinds)
    assert measure(cases, 9, hosts="1") == alone


@pytest.mark.parametrize(
    ("isa", "ranks", "threads"),
    [(isa, *shape) for isa, shape in zip(NAMES, cycle([(3, 1), (1, 2), (2, 2)]), strict=False)],
)
def test_any_instruction_set(
    isa: str, ranks: int, threads: int, measure: Measure, all_types: list[dict[str, Any]], truth: Digests
) -> None:
    assert measure(one_of_each(all_types, NAMES.index(isa)), ranks, isa, threads) == truth


def test_threads_and_ranks_together(measure: Measure, all_types: list[dict[str, Any]], truth: Digests) -> None:
    assert measure(one_of_each(all_types, 0), 2, threads=2) == truth


@pytest.fixture(scope="module")
def demo_truth(measure: Measure, demo: Path) -> Digests:
    return measure([case(demo)], 1)


@pytest.mark.parametrize(
    ("ranks", "isa", "threads"),
    [
        *((1, isa, 1) for isa in NAMES),
        (1, "", 2),
        (2, "", 2),
        (3, "avx2", 1),
        (4, "generic", 1),
        (5, "", 1),
    ],
    ids=lambda value: str(value) or "best",
)
def test_demo_model(ranks: int, isa: str, threads: int, measure: Measure, demo: Path, demo_truth: Digests) -> None:
    cases = [case(demo, chunk, way=way) for way, chunk in enumerate((*CHUNKS, 7), ranks)]
    assert measure(cases, ranks, isa, threads) == demo_truth


FAMILIES = (
    "llama_bias", "llama_yarn", "mistral", "qwen2", "seed_oss", "qwen3", "mixtral", "qwen3_moe", "olmo2", "granite",
    "smollm3", "ministral3", "phi3", "gemma2", "gemma3", "hy_v3", "glm4_moe", "minimax_m2", "minimax_m3",
    "gpt_oss", "deepseek_v3", "kimi_k2", "deepseek_v32", "glm_moe_dsa", "llama4", "qwen3_next", "qwen3_5",
    "qwen3_5_moe",
)  # fmt: skip
"""Folders of tests/golden: biases, scaled RoPE, windows, norms of heads and after halves, factors,
experts, blocks that are chosen, sinks, latents, delta nets."""
FAMILY_WEIGHTS = ("q4_0", "bf16")


def family_cases(ranks: int) -> list[dict[str, Any]]:
    """One of the chunks for each family and weight type, another one on the next number of ranks."""
    return [
        case(GOLDEN / family, CHUNKS[(number // 2 + ranks) % 2], way=(number // 4 + ranks) % 2, weights=weights)
        for number, family in enumerate(FAMILIES)
        for weights in FAMILY_WEIGHTS
    ]


@pytest.fixture(scope="module")
def family_truth(measure: Measure) -> Digests:
    return measure(family_cases(0), 1)


@pytest.mark.parametrize(("ranks", "isa", "threads"), [(1, "avx2", 2), (2, "", 2), (3, "", 1), (5, "", 1)])
def test_every_family(ranks: int, isa: str, threads: int, measure: Measure, family_truth: Digests) -> None:
    """On 2 and 3 ranks with one of its weight types, on 1 and 5 with the other one."""
    assert len(set(family_truth.values())) == len(FAMILY_WEIGHTS) * len(FAMILIES)
    cases = [made for i, made in enumerate(family_cases(ranks)) if (i // 2 + i + ranks // 2) % 2 == 0]
    found = measure(cases, ranks, isa, threads)
    assert len(found) == len(FAMILIES)
    assert found == {name: family_truth[name] for name in found}


@pytest.fixture(scope="module")
def block_cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """GGUFs with blocks of any bytes, in every type that is kept as it is."""
    folder = tmp_path_factory.mktemp("blocks")
    kinds = [kind for kind in WEIGHT_TYPES.values() if kind.quantised and kind.ggml]
    for block in {kind.block for kind in kinds}:
        golden_models.write_of_whole_blocks(folder / str(block), block)
    for kind in kinds:
        blocks = golden_models.as_random_blocks(gguf.GGMLQuantizationType[kind.name.upper()])
        golden_models.write_gguf(folder / f"{kind.name}.gguf", str(folder / str(kind.block)), blocks)
    golden_models.write_of_whole_blocks(folder / "experts", 256, "mixtral")
    mixed = [gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q6_K", "Q2_K", "Q5_0", "IQ4_XS")]
    golden_models.write_gguf(folder / "mixed.gguf", str(folder / "experts"), golden_models.as_blocks_in_turn(mixed))
    return [case(folder / f"{name}.gguf", chunk) for name in (*(k.name for k in kinds), "mixed") for chunk in CHUNKS]


@pytest.fixture(scope="module")
def block_truth(measure: Measure, block_cases: list[dict[str, Any]]) -> Digests:
    return measure(block_cases, 1)


@pytest.mark.parametrize(("ranks", "isa", "threads"), [(1, "avx2", 2), (2, "", 1), (3, "avx512", 2), (5, "generic", 1)])
def test_every_type_of_a_gguf(
    ranks: int, isa: str, threads: int, measure: Measure, block_cases: list[dict[str, Any]], block_truth: Digests
) -> None:
    assert len(set(block_truth.values())) == len(block_cases) // 2
    one_chunk_each = [block_cases[i + (i // 2 + ranks) % 2] for i in range(0, len(block_cases), 2)]
    assert measure(one_chunk_each, ranks, isa, threads) == block_truth


@pytest.mark.parametrize("ranks", [None, 1, 2, 3])
def test_command_line_gives_the_same_digest(ranks: int | None, toy: Path, truth: Digests) -> None:
    prompt, chunk = ",".join(map(str, prompt_of(toy))), str(7 * (ranks or 1))
    options = ("--prompt-token-ids", prompt, "--prefill-chunk", chunk, "--logit-bias", f"{EOS}=-1000")
    amount = ("--max-tokens", str(TOKENS), "--temperature", "0", "--json")
    result = run(ranks, *PROGRAM, "--model", toy, *options, *amount)
    assert result.status == 0, result.stderr
    assert json.loads(result.stdout)["logits_sha256"] == truth[name_of(case(toy))]
