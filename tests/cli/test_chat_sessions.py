"""The file of `chat --session`: what is written is read again, and what cannot go on is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpillama.cli.chat import SavedChat
from mpillama.errors import UserError
from tests.system.mpi.launch import DEMO_MODEL, PROGRAM, run

SYSTEM = {"role": "system", "content": "be brief"}
ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def test_any_text_is_kept_in_any_locale(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ("chat", "--model", DEMO_MODEL, "--quiet", "--max-tokens", "2", "--session", path)
    for _ in range(2):
        result = run(None, *PROGRAM, *words, stdin="café €\n".encode(), env=plain)
        assert result.status == 0, result.stderr
    saved = SavedChat.read(str(path), None)
    assert [m["role"] for m in saved.messages] == ["user", "assistant"] * 2
    assert saved.messages[0]["content"] == "café €"
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["talk.json"]


def test_two_chats_that_write_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    names = []
    for pid in (1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda new, to: names.append(new.name))
            SavedChat(ASKED, pid).write(str(path))
    assert len(set(names)) == 2


def test_what_cannot_be_written_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    SavedChat(ASKED, 1).write(str(path))
    with pytest.raises(TypeError):
        SavedChat([{"role": "user", "content": b"bytes"}], 2).write(str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]
    assert SavedChat.read(str(path), None) == SavedChat(ASKED, 1)


@pytest.mark.parametrize(
    ("messages", "system", "goes_on"),
    [
        ([], "be long", True),
        ([], "", True),
        (ASKED, None, True),
        (ASKED, "", True),
        (ASKED, "be brief", False),
        ([SYSTEM, *ASKED], None, True),
        ([SYSTEM, *ASKED], "be brief", True),
        ([SYSTEM, *ASKED], "be long", False),
        ([SYSTEM, *ASKED], "", False),
    ],
)
def test_a_conversation_goes_on_with_its_own_system_message(
    messages: list[Any], system: str | None, goes_on: bool, tmp_path: Path
) -> None:
    path = str(tmp_path / "talk.json")
    SavedChat(messages, 3).write(path)
    if goes_on:
        assert SavedChat.read(path, system) == SavedChat(messages, 3)
        return
    with pytest.raises(UserError, match="another system message"):
        SavedChat.read(path, system)


@pytest.mark.parametrize(
    "found",
    [
        {"messages": [], "turns": -7},
        {"messages": [], "turns": "3"},
        {"messages": [], "turns": True},
        {"messages": [{"role": "user", "content": 5}], "turns": 1},
        {"messages": [{"role": "user", "content": None}], "turns": 1},
        {"messages": [{"role": 3, "content": "hello"}], "turns": 1},
        {"messages": ["hello"], "turns": 1},
        {"messages": []},
        [],
    ],
)
def test_what_no_chat_has_written_is_refused(found: object, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="holds no conversation"):
        SavedChat.read(str(path), None)
