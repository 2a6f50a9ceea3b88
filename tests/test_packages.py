"""Installing what tests need, by an apt-get that is none."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import packages

APT = """#!/bin/sh
mkdir {folder}/lock || exit 1
sleep 0.1
rmdir {folder}/lock
"""
"""Refuses to run twice at the same time."""


def test_two_tests_install_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text(APT.format(folder=tmp_path))
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(packages, "LOCK", tmp_path / "file")
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(packages.install, [["some"], ["more"]], [["sh"], ["sh"]])) == ["", ""]
