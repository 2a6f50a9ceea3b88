"""The command line from end to end, as a user starts it."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.cli.options import COMMANDS
from mpillama.formats.native.reader import NativeModel
from mpillama.formats.native.table import read_table
from mpillama.loading.model_file import open_model
from mpillama.loading.texts import make_tokenizer
from mpillama.text.tokenizer import Tokenizer
from tests import golden_models
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run, started

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

SINGLE_AND_SEVERAL = pytest.mark.parametrize("ranks", [None, 1, 2, 3])
NO_EOS = "1=-1000"
GREEDY = ("--temperature", "0")


def answer(ranks: int | None, model: Path, *options: str | Path, stdin: bytes = b"") -> dict[str, Any]:
    """What --json prints, of a run that succeeds and says nothing else."""
    result = run(ranks, *PROGRAM, "--model", model, "--json", *options, stdin=stdin)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def toy_file(toy: Path) -> NativeModel:
    return read_table(str(toy))


@pytest.fixture(scope="module")
def tokenizer(toy_file: NativeModel) -> Tokenizer:
    return make_tokenizer(toy_file)


# -- generate ---------------------------------------------------------------------------------------------------------


@SINGLE_AND_SEVERAL
def test_no_arguments_tell_a_story(ranks: int | None, demo: Path, tmp_path: Path) -> None:
    result = run(ranks, *PROGRAM, directory=tmp_path)
    assert result.status == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")
    assert result.stdout.endswith("\n")
    assert len(result.stdout.split()) > 30
    assert "\ufffd" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert f"{ranks or 1} rank" in line
    of_rank = "" if (ranks or 1) == 1 else r" of rank \d"
    assert re.search(f"memory{of_rank}: weights .*B, KV cache .*B of .*B, buffers .*B, whole process .*MB", line)
    assert "tok/s" in line
    assert "seed" in line


@pytest.mark.parametrize("ranks", [None, 2])
def test_text_is_streamed(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    slow = (SCRIPTS / "reading_faults.py", "slow", "all", tmp_path)
    options = ("--max-tokens", "2000", "--logit-bias", NO_EOS, "--quiet")
    with started(ranks, *slow, "--model", toy, *options) as launch:
        assert len(launch.read(5)) == 5, launch.stderr()
        assert launch.process.poll() is None


@SINGLE_AND_SEVERAL
def test_json_has_every_field(ranks: int | None, toy: Path, tokenizer: Tokenizer) -> None:
    options = ("--prompt", "a llama", "--max-tokens", "9", "--seed", "5", "--top-k", "40", "--logit-bias", NO_EOS)
    found = answer(ranks, toy, *options, "--threads", "1")
    assert found["prompt_token_ids"] == tokenizer.encode("a llama")
    assert len(found["token_ids"]) == 9
    assert all(isinstance(token, int) and 0 <= token < 320 for token in found["token_ids"])
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert found["finish_reason"] == "length"
    assert len(bytes.fromhex(found["logits_sha256"])) == 32
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert 0 <= found["communication_share"] <= 1
    assert (found["communication_share"] > 0) == ((ranks or 1) > 1)
    assert (found["ranks"], found["threads"]) == (ranks or 1, 1)
    assert len(found["rss_bytes_per_rank"]) == (ranks or 1)
    assert all(isinstance(size, int) and size > 10_000_000 for size in found["rss_bytes_per_rank"])
    for memory, process in zip(found["memory_bytes_per_rank"], found["rss_bytes_per_rank"], strict=True):
        assert memory["process"] == process
        assert 0 <= memory["kv_cache_filled"] <= memory["kv_cache"]
        assert sum(memory[kind] for kind in ("weights", "kv_cache", "buffers")) < process
    assert sum(memory["weights"] for memory in found["memory_bytes_per_rank"]) >= 200_000
    effective = found["options"]
    assert (effective["model"], effective["prompt"]) == (str(toy), "a llama")
    assert (effective["seed"], effective["top_k"], effective["logit_bias"]) == (5, 40, [NO_EOS])
    assert (effective["threads"], effective["max_seq_len"], effective["kv_type"]) == (1, 8192, "f16")
    assert effective["isa"]


@pytest.mark.parametrize("ranks", [None, 3])
def test_logits_out(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "logits.npy"
    found = answer(ranks, toy, *GREEDY, "--max-tokens", "6", "--logits-out", path)
    logits = np.load(path)
    assert (logits.shape, logits.dtype) == ((len(found["token_ids"]), 320), np.float32)
    assert hashlib.sha256(logits.tobytes()).hexdigest() == found["logits_sha256"]
    assert logits.argmax(axis=1).tolist() == found["token_ids"]


@pytest.mark.parametrize("ranks", [None, 3])
def test_prompt_from_standard_input(ranks: int | None, toy: Path) -> None:
    options = (*GREEDY, "--max-tokens", "4")
    piped = answer(ranks, toy, *options, "--prompt", "-", stdin="a llama\nwaited … ".encode())
    given = answer(None, toy, *options, "--prompt", "a llama\nwaited … ")
    assert piped["prompt_token_ids"] == given["prompt_token_ids"]
    assert piped["logits_sha256"] == given["logits_sha256"]


def test_prompt_as_token_ids(toy: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the queue")
    options = (*GREEDY, "--max-tokens", "4")
    by_ids = answer(None, toy, *options, "--prompt-token-ids", ",".join(map(str, ids)))
    by_text = answer(None, toy, *options, "--prompt", "the queue")
    assert by_ids["prompt_token_ids"] == ids
    assert by_ids["logits_sha256"] == by_text["logits_sha256"]


@pytest.mark.parametrize("ranks", [None, 2])
def test_stop_ends_the_text_before_it(ranks: int | None, demo: Path) -> None:
    options = (*GREEDY, "--max-tokens", "60")
    whole = answer(None, demo, *options)
    stop = whole["text"][40:46]
    found = answer(ranks, demo, *options, "--stop", "never in the text", stop)
    assert found["text"] == whole["text"][: whole["text"].index(stop)]
    assert found["finish_reason"] == "stop"
    count = len(found["token_ids"])
    assert count < len(whole["token_ids"])
    assert found["token_ids"] == whole["token_ids"][:count]


@pytest.fixture(scope="module")
def seeded(toy: Path) -> dict[str, Any]:
    return answer(None, toy, "--seed", "11", "--max-tokens", "40")


@SINGLE_AND_SEVERAL
def test_a_seed_gives_one_text_on_any_number_of_ranks(ranks: int | None, toy: Path, seeded: dict[str, Any]) -> None:
    assert answer(ranks, toy, "--seed", "11", "--max-tokens", "40")["token_ids"] == seeded["token_ids"]


def test_another_seed_gives_another_text(toy: Path, seeded: dict[str, Any]) -> None:
    assert answer(None, toy, "--seed", "12", "--max-tokens", "40")["token_ids"] != seeded["token_ids"]


def test_the_seed_that_was_chosen_is_reported(toy: Path) -> None:
    options = ("--max-tokens", "40")
    first = answer(None, toy, *options)
    again = answer(None, toy, *options, "--seed", str(first["options"]["seed"]))
    assert again["token_ids"] == first["token_ids"]


REPEATS = ",".join(map(str, [5, 6, 7, 8, 9, 10] * 8))


@pytest.mark.parametrize("sampling", [GREEDY, ("--temperature", "0.9", "--seed", "3")])
def test_guessing_the_next_tokens_changes_nothing(sampling: tuple[str, ...], toy: Path) -> None:
    options = ("--prompt-token-ids", REPEATS, *sampling, "--max-tokens", "200", "--logit-bias", NO_EOS)
    plain = answer(None, toy, *options)
    for ranks, guesses in ((None, "4"), (3, "7")):
        guessed = answer(ranks, toy, *options, "--speculate", guesses)
        assert guessed["token_ids"] == plain["token_ids"]
        assert guessed["logits_sha256"] == plain["logits_sha256"]
        assert guessed["drafts_proposed"] > 0
        assert guessed["drafts_proposed"] >= guessed["drafts_accepted"] >= (sampling == GREEDY)  # they cease if slow
    assert plain["drafts_proposed"] == 0


@pytest.mark.parametrize("count", [1, 7])
def test_max_tokens(count: int, toy: Path) -> None:
    found = answer(None, toy, "--max-tokens", str(count), "--logit-bias", NO_EOS)
    assert (len(found["token_ids"]), found["finish_reason"]) == (count, "length")


def test_end_of_text_ends_the_answer(toy: Path) -> None:
    found = answer(None, toy, *GREEDY, "--logit-bias", "1=1000")
    assert (found["token_ids"], found["text"], found["finish_reason"]) == ([1], "", "stop")


@pytest.mark.parametrize("ranks", [None, 2])
def test_quiet_prints_the_answer_only(ranks: int | None, toy: Path) -> None:
    options = (*GREEDY, "--max-tokens", "12", "--prompt", "a llama")
    text = answer(None, toy, *options)["text"]
    quiet = run(ranks, *PROGRAM, "--model", toy, *options, "--quiet")
    assert (quiet.status, quiet.stdout, quiet.stderr) == (0, text + "\n", "")
    usual = run(ranks, *PROGRAM, "--model", toy, *options)
    assert usual.stdout == "a llama" + text + "\n"
    assert len(usual.stderr.splitlines()) == (1 if ranks is None else 2)  # with the warning of idle ranks


def test_ranks_with_nothing_to_do_are_told(toy: Path, demo: Path) -> None:
    options = ("--max-tokens", "2")
    assert "warning: the model is too small for 2 ranks" in run(2, *PROGRAM, "--model", toy, *options).stderr
    assert "warning" not in run(2, *PROGRAM, "--model", demo, *options).stderr


def test_kv_type(toy: Path) -> None:
    options = (*GREEDY, "--max-tokens", "3")
    found = [answer(None, toy, *options, "--kv-type", kv_type) for kv_type in ("f16", "f32", "q8", "q4")]
    assert [one["options"]["kv_type"] for one in found] == ["f16", "f32", "q8", "q4"]
    assert len({one["logits_sha256"] for one in found}) == 4


@pytest.mark.parametrize("ranks", [None, 3])
def test_max_seq_len_bounds_prompt_and_answer_together(ranks: int | None, toy: Path) -> None:
    options = ("--prompt-token-ids", "0,7,8,9", "--max-seq-len", "10", "--logit-bias", NO_EOS)
    found = answer(ranks, toy, *options)
    assert found["options"]["max_seq_len"] == 10
    assert found["finish_reason"] == "length"
    assert len(found["prompt_token_ids"]) + len(found["token_ids"]) == 10


def test_prompt_that_just_fits(toy: Path) -> None:
    found = answer(None, toy, "--prompt-token-ids", "0,7,8,9", "--max-seq-len", "5")
    assert len(found["token_ids"]) == 1


def test_logit_bias_of_several_tokens(toy: Path) -> None:
    options = (*GREEDY, "--max-tokens", "3")
    assert answer(None, toy, *options, "--logit-bias", "70=500", "80=600")["token_ids"] == [80, 80, 80]
    assert answer(None, toy, *options, "--logit-bias", "70=500", "80=400")["token_ids"] == [70, 70, 70]
    forbidden = answer(None, toy, *options)["token_ids"][0]
    assert answer(None, toy, *options, "--logit-bias", f"{forbidden}=-500", "3=0")["token_ids"][0] != forbidden


@pytest.mark.parametrize("flag", ["--logit-bias", "--stop"])
def test_a_repeated_option_loses_nothing(flag: str, toy: Path) -> None:
    first, second = {"--logit-bias": ("70=500", "80=400"), "--stop": ("one", "two")}[flag]
    found = answer(None, toy, flag, first, flag, second, "--max-tokens", "1")
    assert found["options"][flag[2:].replace("-", "_")] == [first, second]


def test_chat_option_uses_the_template(toy: Path, tokenizer: Tokenizer) -> None:
    found = answer(None, toy, "--chat", "--prompt", "hello", "--max-tokens", "1")
    assert found["prompt_token_ids"] == tokenizer.encode("<|begin|><|user|>hello<|assistant|>")
    assert found["prompt_token_ids"].count(0) == 1


@pytest.mark.parametrize("ranks", [None, 2])
def test_prefill_chunk_may_be_larger_than_memory(ranks: int | None, toy: Path) -> None:
    assert answer(ranks, toy, "--prefill-chunk", str(10**11), "--max-tokens", "2")["token_ids"]


def test_prefill_chunk_changes_nothing(toy: Path) -> None:
    options = (*GREEDY, "--max-tokens", "3", "--prompt", "The scheduler said: be patient")
    assert len({answer(None, toy, *options, "--prefill-chunk", n)["logits_sha256"] for n in ("1", "3", "256")}) == 1


# -- without MPI ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_mpi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which importing mpi4py fails."""
    directory = tmp_path_factory.mktemp("without_mpi")
    (directory / "mpi4py").mkdir()
    (directory / "mpi4py" / "__init__.py").write_text("raise ImportError('mpi4py must not be needed')\n")
    return {"PYTHONPATH": str(directory)}


def test_the_fakes_are_in_the_way(without_mpi: dict[str, str], toy: Path) -> None:
    assert "mpi4py must not be needed" in run(None, *PROGRAM, "--model", toy, env=without_mpi).stderr


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=lambda a: a[0] if a else "none")
def test_help_needs_no_mpi(arguments: list[str], without_mpi: dict[str, str]) -> None:
    result = run(None, *PROGRAM, *arguments, "--help", env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: mpillama" + "".join(f" {a}" for a in arguments))


def test_help_and_version_are_printed_once() -> None:
    assert run(3, *PROGRAM, "--help").stdout.count("usage:") == 1
    assert run(3, *PROGRAM, "chat", "--help").stdout.count("usage:") == 1
    assert run(3, *PROGRAM, "--version").stdout.count("mpillama") == 1


def test_inspect_needs_no_mpi(without_mpi: dict[str, str], toy: Path, toy_file: NativeModel) -> None:
    result = run(None, *PROGRAM, "inspect", toy, env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    assert "num_attention_heads" in result.stdout
    assert toy_file.metadata_sha256[:16] in result.stdout


def test_inspect_as_json(without_mpi: dict[str, str], toy: Path, toy_file: NativeModel) -> None:
    result = run(None, *PROGRAM, "inspect", toy, "--json", env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["path"], found["file_bytes"]) == (str(toy), toy.stat().st_size)
    assert (found["format"], found["format_version"]) == ("mpillama", 1)
    assert found["metadata_sha256"] == toy_file.metadata_sha256
    assert found["config"]["num_key_value_heads"] == 3
    assert set(found["texts"]) == {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    layer = 96 * 6 * 32 * 2 + 96 * 3 * 32 * 2 + 3 * 96 * 128 + 2 * 96
    assert found["parameters"] == 320 * 96 + 2 * layer + 96
    assert len(found["tensors"]) == 2 + 2 * 9
    assert sum(len(t["arrays"]) for t in found["tensors"]) == len(toy_file.entries)
    for tensor in found["tensors"]:
        assert tensor["bytes"] == sum(toy_file.entries[a["name"]].bytes for a in tensor["arrays"])


@pytest.mark.parametrize("kind", ["gguf", "folder", "dllama"])
def test_inspect_takes_what_can_be_run(kind: str, without_mpi: dict[str, str], tmp_path: Path) -> None:
    path = {"gguf": tmp_path / "m.gguf", "folder": golden_models.FOLDER / "qwen3_moe", "dllama": tmp_path / "m.m"}[kind]
    if kind == "gguf":
        golden_models.write_gguf(path, "qwen3_moe", golden_models.as_type(gguf.GGMLQuantizationType.Q5_0))
    elif kind == "dllama":
        golden_models.write_dllama(path, "qwen3_moe")
    model = open_model(str(path))
    result = run(None, *PROGRAM, "inspect", path, "--json", env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["format"] == {"folder": "hugging_face"}.get(kind, kind)
    assert (found["file_bytes"], found["files"]) == (sum(model.files.values()), dict(model.files))
    assert found["metadata_sha256"] == model.metadata_sha256
    weights = sum(tensor.size for tensor in golden_models.family_tensors("qwen3_moe").values())
    head = model.config.vocab_size * model.config.hidden_size if kind == "dllama" else 0  # which has no tied heads
    assert found["parameters"] == weights + head
    assert found["config"]["model_type"] == "qwen3_moe"
    experts = next(t for t in found["tensors"] if t["name"] == "model.layers.0.mlp.experts.up_proj.weight")
    assert experts["shape"][0] == len(experts["arrays"]) == model.config.blocks[0].mlp.router.count
    stored = {"gguf": "q5_0", "folder": "bf16", "dllama": "f32"}[kind]
    assert (experts["arrays"][0]["stored"], experts["weight_type"]) == (stored, stored)
    shown = run(None, *PROGRAM, "inspect", path, env=without_mpi)
    assert (shown.status, shown.stderr) == (0, "")
    assert "num_experts" in shown.stdout
    assert "run as q8_0" not in shown.stdout


def test_inspect_says_what_a_type_without_kernels_becomes(without_mpi: dict[str, str], tmp_path: Path) -> None:
    golden_models.write_of_whole_blocks(tmp_path / "folder", 256)
    blocks = golden_models.as_random_blocks(gguf.GGMLQuantizationType.IQ2_XXS)
    golden_models.write_gguf(tmp_path / "m.gguf", str(tmp_path / "folder"), blocks)
    result = run(None, *PROGRAM, "inspect", tmp_path / "m.gguf", env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    assert "iq2_xxs, run as q6_k" in result.stdout


@pytest.mark.parametrize("part", [0, 2])
def test_inspect_takes_any_part_of_a_split_file(part: int, without_mpi: dict[str, str], tmp_path: Path) -> None:
    whole = golden_models.as_type(gguf.GGMLQuantizationType.F32)
    golden_models.write_gguf(tmp_path / "m.gguf", "llama", whole, part_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    result = run(None, *PROGRAM, "inspect", parts[part], "--json", env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["files"] == {str(path): path.stat().st_size for path in parts}
    assert {array["file"] for tensor in found["tensors"] for array in tensor["arrays"]} == set(map(str, parts))
    assert found["parameters"] == sum(tensor.size for tensor in golden_models.family_tensors("llama").values())
    shown = run(None, *PROGRAM, "inspect", parts[part], env=without_mpi)
    assert f"in {len(parts)} files" in shown.stdout


def test_inspect_takes_a_tokenizer_from_elsewhere(without_mpi: dict[str, str], tmp_path: Path) -> None:
    golden_models.write_dllama(tmp_path / "m.m", "qwen3_moe")
    beside = next(tmp_path.glob("*.t"))
    tokenizer = beside.rename(tmp_path.parent / f"{tmp_path.name}-elsewhere.t")
    result = run(None, *PROGRAM, "inspect", tmp_path / "m.m", "--tokenizer", tokenizer, "--json", env=without_mpi)
    assert (result.status, result.stderr) == (0, "")
    assert "tokenizer.json" in json.loads(result.stdout)["texts"]


def test_a_model_of_embeddings_continues_no_text(tmp_path: Path) -> None:
    """Stored without the prefix and the head, as such models are."""
    tensors = {n: t for n, t in golden_models.family_tensors("llama").items() if n != "lm_head.weight"}
    shutil.copytree(golden_models.FOLDER / "llama", tmp_path / "m")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, tmp_path / "m" / "model.safetensors")
    assert run(None, *PROGRAM, "convert", tmp_path / "m", tmp_path / "m.h5").status == 0
    for path in ("m", "m.h5"):
        result = run(2, *PROGRAM, "--model", tmp_path / path, "--quiet")
        assert (result.status, result.stdout) == (2, ""), result
        assert "lm_head.weight" in result.stderr
        assert "/v1/embeddings" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"]], ids=" ".join)
def test_inspect_into_a_closed_pipe(arguments: list[str], demo: Path) -> None:
    with started(None, *PROGRAM, *arguments, demo) as launch:
        launch.close_output()
        assert launch.gone_within(TIMEOUT)
        assert "Traceback" not in launch.stderr()
        assert "Exception ignored" not in launch.stderr()


# -- doctor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_doctor(threads: int) -> None:
    result = run(2, *PROGRAM, "doctor", "--json", "--threads", str(threads), all_cores=True)
    assert (result.status, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["ranks"] == 2
    assert report["launched"]["processes"] == 2
    assert report["mpi"]
    assert [rank["rank"] for rank in report["per_rank"]] == [0, 1]
    cores = sorted(os.sched_getaffinity(0))
    for rank in report["per_rank"]:
        assert rank["host"] == os.uname().nodename
        assert set(rank["cores"]) <= set(cores)
        assert rank["threads"] == threads
        assert rank["isa"] == rank["isas"][0]
        assert rank["isas"][-1] == "generic"
    used = {core for rank in report["per_rank"] for core in rank["cores"]}
    oversubscribed = 2 * threads > len(used)
    assert [rank["oversubscribed"] for rank in report["per_rank"]] == [oversubscribed] * 2
    assert any("More threads than cores" in sentence for sentence in report["advice"]) == oversubscribed


def test_doctor_for_people() -> None:
    result = run(1, *PROGRAM, "doctor")
    assert (result.status, result.stderr) == (0, "")
    assert os.uname().nodename in result.stdout
