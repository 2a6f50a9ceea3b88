"""Quantised checkpoints of Hugging Face: the same bits on any number of ranks and threads, and from a native file."""

from pathlib import Path
from typing import Any

import pytest

from tests.formats.test_delta_nets_in_fp8 import config_of
from tests.quantised_checkpoints import SIZES, delta_net_in_fp8, written
from tests.system.mpi.launch import PROGRAM, run
from tests.system.mpi.test_digest import TIMEOUT, Digests, Measure, case, measure
from tests.tiny_models import TOY_VOCABULARY, toy_tokenizer

__all__ = ["measure"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]
SCHEMES = ("fp8 blocks", "int4 64 zeros", "int4 32", "int8 rows zeros", "awq 128", "gptq any order", "mxfp4", "nvfp4")
PLAIN: dict[str, Any] = {**SIZES, "vocab_size": TOY_VOCABULARY}
EXPERTS: dict[str, Any] = {
    **PLAIN, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192,
    "num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each folder, and the native file that is converted from it under the same name."""
    made, folder = [], tmp_path_factory.mktemp("quantised")
    sources = [
        written(folder / scheme.replace(" ", "_"), scheme, sizes).folder
        for scheme, sizes in [*((s, PLAIN) for s in SCHEMES), ("int4 128", EXPERTS), ("nvfp4 modelopt", EXPERTS)]
    ]
    sources += [
        delta_net_in_fp8(folder / family, config_of(family, vocab_size=TOY_VOCABULARY))[0].folder
        for family in ("qwen3_next", "qwen3_5_moe")
    ]
    for source in sources:
        (source / "tokenizer.json").write_bytes(toy_tokenizer())
        native = Path(f"{source}.h5")
        result = run(3, *PROGRAM, "convert", source, native)
        assert result.status == 0, result.stderr
        made += [case(source), case(source, 7), case(native)]
    return made


@pytest.fixture(scope="module")
def truth(measure: Measure, cases: list[dict[str, Any]]) -> Digests:
    return measure(cases, 1)


@pytest.mark.parametrize(("ranks", "isa", "threads"), [(1, "avx2", 2), (2, "", 1), (3, "avx512", 2), (5, "generic", 1)])
def test_every_scheme(
    ranks: int, isa: str, threads: int, measure: Measure, cases: list[dict[str, Any]], truth: Digests
) -> None:
    assert len(set(truth.values())) == len(cases) // 3
    assert measure(cases, ranks, isa, threads) == truth
