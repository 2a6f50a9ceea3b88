"""The chat command from end to end: through pipes, and on a terminal."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpillama.formats.native.table import read_table
from mpillama.loading.texts import make_tokenizer
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.tokenizer import Tokenizer
from tests import tiny_models as models
from tests.system.mpi.launch import END_SECONDS, PROGRAM, SCRIPTS, TIMEOUT, Result, python, run
from tests.system.mpi.terminal import CTRL_C, CTRL_D, Terminal, on_terminal

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

OPTIONS = ("--temperature", "0", "--max-tokens", "12", "--logit-bias", "1=-1000")
Messages = list[tuple[str, str]]
Reply = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(toy: Path) -> Tokenizer:
    return make_tokenizer(read_table(str(toy)))


@pytest.fixture(scope="module")
def reply(toy: Path, tokenizer: Tokenizer) -> Reply:
    """Give the answer to a conversation that is computed from its first token on, without a chat."""
    template = ChatTemplate(models.TOY_CHAT_TEMPLATE, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    known: dict[str, str] = {}

    def answer(*messages: tuple[str, str]) -> str:
        prompt = template.render([{"role": role, "content": text} for role, text in messages])
        if prompt not in known:
            ids = ",".join(map(str, tokenizer.encode(prompt)))
            result = run(None, *PROGRAM, "--model", toy, *OPTIONS, "--json", "--prompt-token-ids", ids)
            known[prompt] = json.loads(result.stdout)["text"]
        return known[prompt]

    return answer


def talk(ranks: int | None, toy: Path, lines: str, *options: str) -> Result:
    """Type the lines into a quiet chat that ends well."""
    result = run(ranks, *PROGRAM, "chat", "--model", toy, "--quiet", *OPTIONS, *options, stdin=lines.encode())
    assert result.status == 0, result.stderr
    return result


@pytest.mark.parametrize("ranks", [None, 1, 2, 3])
def test_an_answer_depends_on_the_whole_conversation(ranks: int | None, toy: Path, reply: Reply) -> None:
    first = reply(("user", "hello"))
    second = reply(("user", "hello"), ("assistant", first), ("user", "and then?"))
    third = reply(
        ("user", "hello"), ("assistant", first), ("user", "and then?"), ("assistant", second), ("user", "and then?")
    )
    assert second not in (first, reply(("user", "and then?")))
    result = talk(ranks, toy, "hello\nand then?\nand then?\n")
    assert result.stdout == f"{first}\n{second}\n{third}\n"
    assert result.stderr == ""


def test_reset_forgets(toy: Path, reply: Reply) -> None:
    first = reply(("user", "hello"))
    second = reply(("user", "hello"), ("assistant", first), ("user", "hello"))
    assert talk(None, toy, "hello\nhello\n/reset\nhello\n").stdout == f"{first}\n{second}\n{first}\n"


def test_system_message(toy: Path, reply: Reply) -> None:
    system = ("system", "be brief, llama")
    with_system, without = reply(system, ("user", "hello")), reply(("user", "hello"))
    assert with_system != without
    typed = talk(None, toy, "hello\n/system be brief, llama\nhello\n/reset\nhello\n")
    assert typed.stdout == f"{without}\n{with_system}\n{with_system}\n"
    assert talk(None, toy, "hello\n", "--system", "be brief, llama").stdout == f"{with_system}\n"


@pytest.mark.parametrize("ranks", [None, 2])
def test_quit_leaves_the_rest_unread(ranks: int | None, toy: Path, reply: Reply) -> None:
    assert talk(ranks, toy, "hello\n/quit\nhello\n").stdout == reply(("user", "hello")) + "\n"


@pytest.mark.parametrize("ranks", [None, 2])
def test_input_may_end_in_the_middle_of_a_line(ranks: int | None, toy: Path, reply: Reply) -> None:
    assert talk(ranks, toy, "hello").stdout == reply(("user", "hello")) + "\n"


def test_no_input_at_all(toy: Path) -> None:
    result = talk(None, toy, "")
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_empty_lines_say_nothing_and_unknown_commands_help(toy: Path, reply: Reply) -> None:
    result = talk(None, toy, "\n   \n/rest\n/system\nhello\n")
    assert result.stdout == reply(("user", "hello")) + "\n"
    assert result.stderr.count("/reset forgets") == 2
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("ranks", [None, 2])
def test_message_that_is_too_long_is_told_and_dropped(ranks: int | None, toy: Path, reply: Reply) -> None:
    first = reply(("user", "hello"))
    second = reply(("user", "hello"), ("assistant", first), ("user", "and?"))
    result = talk(ranks, toy, f"hello\n{'too long ' * 60}\nand?\n", "--max-seq-len", "80")
    (line,) = result.stderr.splitlines()
    assert line.startswith("mpillama: ")
    assert "80" in line
    assert result.stdout == f"{first}\n{second}\n"


def test_full_conversation_goes_on_after_reset(toy: Path, reply: Reply) -> None:
    result = talk(None, toy, "hello\n" * 9 + "/reset\nhello\n", "--max-seq-len", "60")
    told = result.stderr.splitlines()
    assert told
    assert all(line.startswith("mpillama: ") for line in told)
    first = reply(("user", "hello"))
    assert result.stdout.startswith(first)
    assert result.stdout.endswith(first + "\n")


def test_seed_repeats_a_chat_but_not_its_turns(toy: Path) -> None:
    seeded = ("--temperature", "1.5", "--seed", "3")
    lines = "hello\n/reset\nhello\n"
    once, again = (talk(None, toy, lines, *seeded).stdout for _ in range(2))
    assert once == again
    assert once != talk(None, toy, lines, "--temperature", "1.5", "--seed", "4").stdout
    assert once != talk(None, toy, "hello\n", *seeded).stdout * 2


def test_help_unless_quiet_and_no_prompts_on_a_pipe(toy: Path, reply: Reply) -> None:
    result = run(None, *PROGRAM, "chat", "--model", toy, *OPTIONS, stdin=b"hello\n")
    assert result.status == 0
    assert "/quit leaves" in result.stderr
    assert result.stdout == f"{reply(('user', 'hello'))}\n", "a pipe is not asked for lines"


@pytest.mark.parametrize("ranks", [None, 2])
def test_model_without_chat_template(ranks: int | None, tmp_path: Path) -> None:
    path = tmp_path / "plain.h5"
    models.write_random(path, models.TOY, "q8_0", {"tokenizer.json": models.toy_tokenizer()})
    logs = tmp_path / "logs"
    result = run(ranks, *PROGRAM, "chat", "--model", path, "--quiet", "--log-dir", logs, stdin=b"hello\n")
    assert result.status == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("mpillama: ")
    assert "chat template" in line
    texts = [log.read_text() for log in logs.iterdir()]
    assert len(texts) == (ranks or 1)
    assert not any("bytes in" in text for text in texts), "the table says it, before the weights are read"


# -- on a terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(toy: Path, tokenizer: Tokenizer, tmp_path: Path) -> tuple[str | Path, ...]:
    """A chat whose answers are z after z, slowly."""
    (letter,) = tokenizer.encode("z", add_bos=False)
    slow = (SCRIPTS / "reading_faults.py", "slow", "all", tmp_path)
    return (*slow, "chat", "--model", toy, "--logit-bias", f"{letter}=1000", "--max-tokens", "4000")


def quits(terminal: Terminal) -> None:
    """At its prompt the chat ends when it is told to."""
    terminal.type("/quit\n")
    assert terminal.launch.gone_within(END_SECONDS)
    assert terminal.launch.process.returncode == 0


ON_TERMINAL = pytest.mark.parametrize("ranks", [None, 2])


@ON_TERMINAL
def test_ctrl_c_stops_the_answer_and_not_the_program(ranks: int | None, endless: tuple[str | Path, ...]) -> None:
    with on_terminal(ranks, *endless) as terminal:
        for message in ("hello", "again"):
            terminal.expect("> ")
            terminal.type(message + "\n")
            terminal.expect("zzz")
            terminal.type(CTRL_C)
            terminal.expect("(stopped)", timeout=END_SECONDS)
        terminal.expect("> ", timeout=END_SECONDS)
        quits(terminal)
        assert terminal.interrupt_key() == CTRL_C.encode()


@ON_TERMINAL
def test_ctrl_c_at_the_prompt_asks_again(ranks: int | None, endless: tuple[str | Path, ...]) -> None:
    with on_terminal(ranks, *endless) as terminal:
        terminal.expect("> ")
        for _ in range(20):  # as soon as the prompt is there, perhaps before anything reads
            terminal.type("forget this" + CTRL_C)
            terminal.expect("> ", timeout=END_SECONDS)
        terminal.type("hello\n")
        terminal.expect("zzz", timeout=END_SECONDS)
        terminal.type(CTRL_C)
        terminal.expect("> ", timeout=END_SECONDS)
        quits(terminal)


@ON_TERMINAL
def test_ctrl_c_forgets_what_was_typed_ahead(ranks: int | None, endless: tuple[str | Path, ...]) -> None:
    with on_terminal(ranks, *endless) as terminal:
        terminal.expect("> ")
        terminal.type("hello\nagain\nand again\n")
        terminal.expect("zzz")
        terminal.type(CTRL_C)
        terminal.expect("(stopped)", timeout=END_SECONDS)
        terminal.expect("> ", timeout=END_SECONDS)
        quits(terminal)


@ON_TERMINAL
def test_ctrl_d_ends_the_chat(ranks: int | None, endless: tuple[str | Path, ...]) -> None:
    with on_terminal(ranks, *endless) as terminal:
        assert "/quit leaves" in terminal.expect("> "), "the help comes before the first prompt"
        terminal.type(CTRL_D)
        assert terminal.launch.gone_within(END_SECONDS)
        assert terminal.launch.process.returncode == 0
        assert terminal.interrupt_key() == CTRL_C.encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@ON_TERMINAL
def test_signal_to_rank_0_ends_the_chat(
    ranks: int | None, number: signal.Signals, endless: tuple[str | Path, ...]
) -> None:
    with on_terminal(ranks, *endless) as terminal:
        terminal.expect("> ")
        terminal.type("hello\n")
        terminal.expect("zzz")
        terminal.launch.ranks()[0].send_signal(number)
        assert terminal.launch.gone_within(END_SECONDS)
        assert terminal.launch.process.returncode != 0
        if number == signal.SIGTERM:
            assert terminal.interrupt_key() == CTRL_C.encode()


def test_terminal_is_as_before_when_another_rank_fails(endless: tuple[str | Path, ...]) -> None:
    with on_terminal(2, *endless) as terminal:
        terminal.expect("> ")
        terminal.type("hello\n")
        terminal.expect("zzz")
        terminal.launch.ranks()[1].kill()
        assert terminal.launch.gone_within(END_SECONDS)
        assert terminal.interrupt_key() == CTRL_C.encode()


@pytest.mark.parametrize("stuck", [0, 1])
def test_ctrl_c_twice_leaves_a_chat_that_is_stuck(stuck: int, toy: Path, tmp_path: Path) -> None:
    arguments = ("hang", "decode", str(stuck), tmp_path, "chat", "--model", toy, "--logit-bias", "1=-1000")
    with on_terminal(2, SCRIPTS / "sabotage.py", *arguments) as terminal:
        terminal.expect("> ")
        terminal.type("hello\n")
        while not (tmp_path / "failed").exists():
            assert terminal.launch.process.poll() is None
            time.sleep(0.05)
        terminal.type(CTRL_C + CTRL_C)
        assert terminal.launch.gone_within(END_SECONDS)
        assert terminal.interrupt_key() == CTRL_C.encode()


@ON_TERMINAL
def test_chat_with_a_file_as_input_leaves_the_terminal_alone(
    ranks: int | None, endless: tuple[str | Path, ...], tmp_path: Path
) -> None:
    """A shell on a terminal starts it with `< file`: Ctrl-C must still be a signal."""
    (tmp_path / "lines").write_text("hello\n")
    shell = (  # Ctrl-C is for the program: a parent that it interrupts too kills its child soon
        "import signal, subprocess, sys\n"
        "program = subprocess.Popen(sys.argv[2:], stdin=open(sys.argv[1]))\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.exit(program.wait())"
    )
    command = python(ranks, *endless)
    assert sys.executable in command
    with on_terminal(None, "-c", shell, tmp_path / "lines", *command) as terminal:
        terminal.expect("zzz")
        assert terminal.interrupt_key() == CTRL_C.encode()
        terminal.type(CTRL_C)
        terminal.expect("(stopped)", timeout=END_SECONDS)
        assert terminal.launch.gone_within(END_SECONDS)


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, 3)])
def test_a_session_goes_on_as_if_it_had_not_ended(
    before: int | None, after: int | None, toy: Path, tmp_path: Path
) -> None:
    """The same answers and seeds as in one run, from what was computed already, on another number of ranks."""
    seeded = ("--temperature", "1.1", "--seed", "5", "--system", "be brief, llama " * 12)
    whole = talk(None, toy, "hello\nand then?\nand then?\n", *seeded).stdout
    session = ("--session", str(tmp_path / "talk.json"))
    first = talk(before, toy, "hello\nand then?\n", *seeded, *session).stdout
    kept = sorted((tmp_path / "talk.json.cache").rglob("*.kv"))
    assert kept
    second = talk(after, toy, "and then?\n", *seeded[:4], *session)
    assert first + second.stdout == whole
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", *("user", "assistant") * 3]
    assert saved["turns"] == 3


def test_a_session_that_is_killed_keeps_what_was_said(
    toy: Path, endless: tuple[str | Path, ...], tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    with on_terminal(None, *endless, "--session", path) as terminal:
        terminal.expect("> ")
        terminal.type("hello\n")
        terminal.expect("zzz")
        terminal.type(CTRL_C)
        terminal.expect("> ", timeout=END_SECONDS)
        terminal.type("again\n")
        terminal.expect("zzz")
        terminal.launch.ranks()[0].kill()
        assert terminal.launch.gone_within(END_SECONDS)
    saved = json.loads(path.read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["content"].startswith("zzz")
    result = run(None, *PROGRAM, "chat", "--model", toy, *OPTIONS, "--session", path, stdin=b"/reset\n")
    assert "goes on after 2 messages" in result.stderr
    assert json.loads(path.read_text())["messages"] == []


def test_a_session_that_cannot_go_on_is_refused(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text('{"messages": [{"role": "system", "content": "be brief"}], "turns": 0}')
    for options in (("--session", path, "--system", "be long"), ("--session", toy), ("--session", tmp_path)):
        result = run(2, *PROGRAM, "chat", "--model", toy, *options, stdin=b"hello\n")
        assert result.status == 2
        (line,) = result.stderr.splitlines()
        assert "--session" in line
