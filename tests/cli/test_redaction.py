"""No secret is in what the program prints, logs or records."""

import dataclasses
import json
import logging
import stat
import sys
from pathlib import Path

import pytest

from mpillama import redaction
from mpillama.cli.options import COMMANDS, ServeOptions, recorded
from mpillama.comm.failure import print_error
from mpillama.redaction import HIDDEN, hide, keep_secret, secrets_of, shown_arguments
from tests.conftest import ModelFile
from tests.server.conftest import serving
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

SECRET = "hunter2-of-the-llama"


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", SECRET], [f"--api-key={SECRET}"], ["--api", SECRET], [f"--api-k={SECRET}"], ["--apikey", SECRET],
        ["--api_key", SECRET], ["-api-key", SECRET], ["--password", SECRET], [f"--hf-token={SECRET}"],
    ],
)  # fmt: skip
def test_a_secret_is_hidden_however_its_option_is_written(words):
    shown = shown_arguments(["serve", "--model", "M.h5", *words, "--port", "8000"])
    assert SECRET not in shown
    assert HIDDEN in shown
    assert shown.startswith("serve --model M.h5 ")
    assert shown.endswith("--port 8000")
    assert secrets_of(words, {}) == {SECRET}


def test_other_options_are_shown_as_they_are():
    words = ["serve", "--api-key-file", "f", "--tls-key", "k.pem", "--max-tokens", "5", "--tokenizer", "t", "--no-auth"]
    assert shown_arguments(words) == " ".join(words)
    assert secrets_of(words, {"MPILLAMA_ISA": "avx2"}) == set()


def test_even_a_short_secret_is_not_among_the_arguments():
    assert shown_arguments(["--api-key", "a"]) == f"--api-key {HIDDEN}"


def test_secrets_of_arguments_environment_and_files_are_hidden_in_any_text(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mpillama", "serve", "--api-key", "from-arguments"])
    monkeypatch.setenv("MPILLAMA_API_KEY", "from-environment")
    monkeypatch.setattr(redaction, "_told", set())
    keep_secret("from-file")
    keep_secret(None)
    text = "a from-arguments, 'from-environment'; from-file! https://me:from-url@host/x and automatic"
    assert hide(text) == f"a {HIDDEN}, '{HIDDEN}'; {HIDDEN}! https://{HIDDEN}@host/x and automatic"


def test_what_is_printed_shows_no_secret(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mpillama", "--api-key", SECRET])
    print_error(f"mpillama: unrecognized arguments: --api-key {SECRET}")
    assert capsys.readouterr().err == f"mpillama: unrecognized arguments: --api-key {HIDDEN}\n"


def test_every_option_that_may_hold_a_secret_is_marked_and_its_flag_known():
    harmless = {"api_key_file", "tls_key", "tokenizer", "prompt_token_ids", "cache_tokens", "max_tokens", "no_auth"}
    harmless |= {"max_token_delay"}
    for options, _ in COMMANDS.values():
        for field in dataclasses.fields(options):
            suspect = any(word in field.name for word in ("key", "token", "secret", "password", "auth"))
            marked = bool(field.metadata.get("secret"))
            assert marked == (suspect and field.name not in harmless), field.name
            assert marked == bool(secrets_of([f"--{field.name.replace('_', '-')}", SECRET], {})), field.name


def test_options_are_shown_and_recorded_without_secrets():
    options = ServeOptions(api_key=SECRET, model="M.h5")
    assert SECRET not in repr(options)
    assert SECRET not in json.dumps(recorded(options))
    assert recorded(options)["model"] == "M.h5"


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("how", ["argument", "environment", "file"])
def test_a_server_s_key_is_in_no_log_and_its_logs_are_private(model_file: ModelFile, tmp_path: Path, how: str):
    model, log = model_file("toy", "q8_0"), tmp_path / "log"
    log.mkdir()
    (log / "mpillama-0-of-2.log").write_text("an older one\n")
    (log / "mpillama-0-of-2.log").chmod(0o644)
    (tmp_path / "key").write_text(SECRET)
    words = {"argument": ("--api-key", SECRET), "environment": (), "file": ("--api-key-file", str(tmp_path / "key"))}
    env = {"MPILLAMA_API_KEY": SECRET} if how == "environment" else None
    options = ("--log-dir", str(log), "--log-level", "debug", "--log-prompts")
    with serving(model, tmp_path, 2, *words[how], *options, env=env) as server, server.http() as http:
        assert server.key == SECRET
        assert http.post("/v1/completions", json={"prompt": f"my key is {SECRET}", "max_tokens": 1}).status_code == 200
        assert http.post("/v1/completions", json={SECRET: 1}).status_code == 400
        said = server.launch.stderr()
    logs = list(log.iterdir())
    assert len(logs) == 2
    for path in logs:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert SECRET not in path.read_text()
        assert "arguments: serve" in path.read_text()
    assert SECRET not in said


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--apikey", SECRET), ("serve", f"--api={SECRET}"), ("--api-key", SECRET, "serve"),
        ("serve", "--api-key", SECRET, "--port", "x"), ("serve", "--api-key", f"{SECRET} ü"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_shows_no_key(words):
    result = run(1, *PROGRAM, *words)
    assert result.status == 2
    assert SECRET not in result.stdout + result.stderr


def test_a_log_record_with_a_secret_is_written_without_it(monkeypatch, tmp_path: Path):
    from mpillama.cli.logs import RankFile

    class World:
        host = "h"
        comm = type("Comm", (), {"rank": 0, "size": 1})

    monkeypatch.setattr(sys, "argv", ["mpillama", "--api-key", SECRET])
    handler = RankFile(tmp_path / "log", World())  # type: ignore[arg-type]
    handler.emit(logging.LogRecord("mpillama", logging.ERROR, "", 0, "cannot use %s", (SECRET,), None))
    handler.close()
    assert (tmp_path / "log").read_text().endswith(f"cannot use {HIDDEN}\n")
