"""What the user may type: defaults as the help says, mistakes as one sentence, no heavy import for --help."""

import argparse
import re
import subprocess
import sys
from dataclasses import MISSING, fields, replace

import pytest

from mpillama.cli.options import COMMANDS, build_parser, options_of, parse, recorded
from mpillama.errors import UserError

DEFAULT = re.compile(r"\(default: (?P<value>.*)\)$")
DESCRIBED = {
    "model": "data/demo.h5",
    "max_seq_len": "the model's own context",
    "threads": "the cores this rank may use, shared fairly with the ranks on them",
    "shares": "evenly",
    "speculate": "0, with a draft model 4, with --mtp 2",
    "tokenizer": "the one beside it",
    "acceptance": "0.7",
    "plan speculate": "none, with a draft model 4",
    "plan pipeline": "1, with --sbatch and no --shares the best number",
    "stride": "the window's size, as llama.cpp does",
    "seed": "a new one, reported",
    "cache_tokens": "what they can need, up to nine tenths of the memory",
    "cache_size": "10GB",
    "max_token_delay": "no bound",
    "state_snapshots": "two for each sequence",
    "time_limit": "the Slurm job's end",
    "rendezvous": "in this folder, named after the job",
    "model_name": "its file's",
    "api_key_file": "that of the rendezvous file, or MPILLAMA_API_KEY",
    "max_tokens": "what the context holds; completions: 16, as in OpenAI's API",
    "client rendezvous": "the newest one in this folder",
    "tensor_parallel": "the fewest ranks that fit the memory",
}
"""Defaults that are None and decided later: the help says how."""


def described(command: str) -> dict[str, tuple[str, object]]:
    """Each optional option's help and default."""
    found = {}
    for name, _, field in options_of(COMMANDS[command][0]):
        if "args" not in field.metadata:
            default = field.default if field.default is not MISSING else field.default_factory()
            found[name] = (field.metadata["help"], default)
    return found


ALL_OPTIONS = [(command, name) for command in COMMANDS for name in described(command)]


@pytest.mark.parametrize(("command", "name"), ALL_OPTIONS)
def test_the_help_says_the_default(command, name):
    text, default = described(command)[name]
    stated = DEFAULT.search(text)
    if default is None:
        assert stated is None or stated["value"] == DESCRIBED.get(f"{command} {name}", DESCRIBED.get(name))
    elif default is False or default == []:
        assert stated is None
    else:
        assert stated is not None, f"{command} --{name}: the help does not say the default"
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        assert type(shown)(stated["value"]) == shown


@pytest.mark.parametrize("command", list(COMMANDS))
def test_parsing_nothing_gives_the_defaults(command):
    required = [f.name for f in fields(COMMANDS[command][0]) if "args" in f.metadata]
    shape = {"shape": "a"} if command in ("bench", "plan") else {}  # one of --shape and --model
    name, options = parse([command, *required, *(f"--{key}={value}" for key, value in shape.items())])
    assert name == command
    assert options == COMMANDS[command][0](**{field: field for field in required}, **shape)
    options = replace(options, **dict.fromkeys(shape))
    found = {**vars(options), **recorded(options)}
    for key, (_, default) in described(command).items():
        if key in found:  # a sampling option that is not given to `client` is the server's
            assert found[key] == default
            assert type(found[key]) is type(default)
        else:
            assert (command, default) == ("client", None)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_printed_help_holds_every_option_and_no_placeholder(command):
    parsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    text = " ".join(parsers.choices[command].format_help().split())
    assert "MISSING" not in text
    assert "dataclasses" not in text
    for name, (help_text, _) in described(command).items():
        assert f"--{name.replace('_', '-')}" in text
        assert " ".join(help_text.split()) in text


def test_without_a_command_generate_runs():
    assert parse([])[0] == "generate"
    command, options = parse(["--prompt", "Hello", "--max-tokens", "3"])
    assert (command, options.prompt, options.sampling.max_tokens) == ("generate", "Hello", 3)


def test_values_have_their_types():
    text = "--max-tokens 3 --temperature 0.5 --seed 7 --threads 2 --stop a b --logit-bias 1=2 3=-4 --json --quiet"
    _, options = parse(["generate", *text.split(), "--model", "m.h5", "--kv-type", "f32"])
    params = options.sampling
    assert (params.max_tokens, params.temperature, params.seed, options.threads) == (3, 0.5, 7, 2)
    assert (params.stop, params.logit_bias) == (("a", "b"), {1: 2, 3: -4})
    assert (options.json, options.quiet, options.chat) == (True, True, False)
    assert (options.model, options.kv_type) == ("m.h5", "f32")


def test_lists_are_not_shared_between_runs():
    first, second = parse(["serve"])[1], parse(["serve"])[1]
    assert first.cors is not second.cors


MISTAKES = [
    (["--no-such-option"], "--no-such-option"),
    (["generate", "--no-such-option"], "--no-such-option"),
    (["generate", "--max-tokens", "many"], "many"),
    (["generate", "--max-tokens", "1.5"], "1.5"),
    (["generate", "--temperature", "warm"], "warm"),
    (["generate", "--kv-type", "f8"], "f8"),
    (["generate", "--max-tokens"], "max-tokens"),
    (["chat", "--prompt", "x"], "--prompt"),
    (["inspect"], "file"),
    (["inspect", "a", "b"], "b"),
    (["no-such-command"], "no-such-command"),
    (["Once upon a time"], "Once upon a time"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(arguments, named, capsys):
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


HEAVY = ("numpy", "mpi4py", "h5py", "tokenizers", "jinja2", "rich")
PROBE = f"""
import sys
from mpillama.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *[name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "mpillama" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"
    assert done.stderr == ""
