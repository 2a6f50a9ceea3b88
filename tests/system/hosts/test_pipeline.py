"""A stage on each host: the answer of one rank, and two rows a token on the wire in place of sums."""

import json
from pathlib import Path

import pytest

from tests.system.hosts.network import Count, Hosts
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

FEW, MANY = 4, 124
"""Tokens: between these, what starting up sends differs by a few bytes a token."""
OPTIONS = ("--temperature", "0", "--prompt", "Once upon a time", "--json", "--max-seq-len", "256")


def generated(hosts: Hosts, demo: Path, tokens: int, stages: int) -> tuple[str, dict[str, Count]]:
    """The digest of the logits, and what each host sent."""
    hosts.counts()
    words = ("--model", demo, "--max-tokens", str(tokens), "--pipeline", str(stages), "--threads", "1", *OPTIONS)
    result = hosts.run(2, *PROGRAM, "generate", *words)
    assert result.status == 0, result.stderr
    return json.loads(result.stdout)["logits_sha256"], hosts.counts()


def test_a_token_crosses_once_from_stage_to_stage(two_hosts: Hosts, demo: Path) -> None:
    """Each of two ranks sends its partner a row; back comes the plan. Sums would cross 13 times, both ways."""
    command = ("generate", "--model", demo, "--max-tokens", str(MANY), *OPTIONS)
    alone = json.loads(run(None, *PROGRAM, *command).stdout)
    _, few = generated(two_hosts, demo, FEW, stages=2)
    digest, many = generated(two_hosts, demo, MANY, stages=2)
    assert digest == alone["logits_sha256"]
    steps = MANY - FEW
    sent = {name: (many[name].messages - few[name].messages) / steps for name in two_hosts.names}
    size = {name: (many[name].bytes - few[name].bytes) / steps for name in two_hosts.names}
    hidden = json.loads(run(None, *PROGRAM, "inspect", demo, "--json").stdout)["config"]["hidden_size"]
    assert sent["h1"] + sent["h2"] < 13
    assert 0.9 * 2 * 4 * hidden <= size["h2"] < 3 * 4 * hidden + 1000
