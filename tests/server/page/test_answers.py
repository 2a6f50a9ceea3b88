"""Questions and answers on the chat page: streams, stops, edits, thoughts, files."""

from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.server.browser import (
    CONTEXT,
    MODEL,
    OTHER_HOST,
    FakeServer,
    Page,
    says,
    stored,
    thinks,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first one may have to install the browser


def test_an_answer_is_shown_as_it_comes(fake: FakeServer, page: Page) -> None:
    gate = fake.gate()
    fake.answers = [says("Once upon ", "a time,", gate, " there was", " a llama.")]
    page.say("Tell me a story.")
    page.wait_for("Once upon a time,")
    assert page.one(".answer").get_attribute("aria-busy") == "true"
    assert page.one("#spoken").get_attribute("textContent") == ""
    gate.open()
    page.wait_for_end()
    assert page.answers() == ["Once upon a time, there was a llama."]
    assert page.one("#spoken").get_attribute("textContent") == "Answer: Once upon a time, there was a llama."
    assert fake.bodies == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_each_answer_shows_its_speed_and_the_context_in_use(fake: FakeServer, page: Page) -> None:
    fake.answers = [says(*["word "] * 30)]
    page.ask("Thirty words, please.")
    facts = page.one(".stats").text
    assert "30 tokens" in facts
    assert " tokens/s" in facts
    assert f"context 50 of {CONTEXT}" in facts
    assert MODEL in facts
    assert page.one(".stats meter").get_attribute("value") == "50"


def test_an_answer_that_was_cut_says_so(fake: FakeServer, page: Page) -> None:
    full = says("Once", " upon", finish="length", prompt_tokens=CONTEXT - 2)
    fake.answers = [says("Once upon", finish="length"), full]
    page.ask("A story?")
    assert "cut off: most tokens" in page.one(".stats").text
    page.ask("A longer one?")
    assert "cut off: context full" in page.all(".stats")[1].text


def test_the_conversation_so_far_is_sent(fake: FakeServer, page: Page) -> None:
    fake.answers = [says("A llama."), says("Stella.")]
    page.ask("Who is there?")
    page.ask("What is her name?")
    assert fake.messages == [
        ("user", "Who is there?"),
        ("assistant", "A llama."),
        ("user", "What is her name?"),
    ]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_the_text(fake: FakeServer, page: Page, how: str) -> None:
    fake.answers = [says("This goes on", fake.gate(), " for ever.")]
    page.say("Talk.")
    page.wait_for("This goes on")
    page.button("Stop").click() if how == "button" else page.press(Keys.ESCAPE)
    page.wait_for_end()
    assert fake.left.wait(60), "the server still thinks that somebody listens"
    assert page.answers() == ["This goes on"]
    assert "stopped" in page.one(".stats").text
    assert page.ask("And now?") == "Yes."
    assert fake.messages[1] == ("assistant", "This goes on")


def test_an_answer_can_be_asked_for_again(fake: FakeServer, page: Page) -> None:
    fake.answers = [says("First."), says("Second."), says("Third.")]
    page.ask("One?")
    page.ask("Two?")
    assert len([b for b in page.all(".retry") if b.is_displayed()]) == 1
    page.button("Answer again").click()
    page.wait_for("Third.")
    page.wait_for_end()
    assert page.answers() == ["First.", "Third."]
    assert fake.messages == [("user", "One?"), ("assistant", "First."), ("user", "Two?")]


def test_a_message_is_edited_and_sent_again(fake: FakeServer, page: Page) -> None:
    page.ask("One?")
    page.ask("Two?")
    page.all(".user [aria-label^=Edit]")[0].click()
    page.press(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.accessible_name == "Edit and send again"
    page.press(Keys.ENTER)
    page.press(Keys.END, " Or two?", Keys.ENTER)
    page.wait_for("One? Or two?")
    page.wait_for_end()
    assert fake.messages == [("user", "One? Or two?")]
    assert len(page.answers()) == 1


def test_a_question_is_deleted_with_its_answer(fake: FakeServer, page: Page) -> None:
    fake.answers = [says("First."), says("Second.")]
    page.ask("One?")
    page.ask("Two?")
    page.all(".user [aria-label^=Delete]")[0].click()
    page.button("Cancel", "#ask").click()
    assert page.answers() == ["First.", "Second."]
    page.all(".user [aria-label^=Delete]")[0].click()
    page.button("Delete", "#ask").click()
    until(lambda: page.answers() == ["Second."], "the first answer gone")
    assert [m["content"] for m in stored(page)[0]["messages"]] == ["Two?", "Second."]
    page.button("Delete with its question").click()
    page.button("Delete", "#ask").click()
    until(lambda: not page.answers() and not stored(page), "all gone")
    assert page.one("#welcome").is_displayed()


def test_nothing_is_lost_while_an_answer_comes(fake: FakeServer, page: Page) -> None:
    gate = fake.gate()
    fake.answers = [says("Slowly", gate, ".")]
    page.say("Go.")
    page.wait_for("Slowly")
    page.say(" And more.")
    page.button("Delete with its answer").click()
    page.wait_for("Stop the answer first.", "#notice")
    gate.open()
    page.wait_for_end()
    assert page.one("#text").get_attribute("value") == " And more."
    assert page.answers() == ["Slowly."]


@pytest.mark.parametrize("host", ["127.0.0.1", OTHER_HOST])
def test_an_answer_is_copied_as_it_was_written(
    fake: FakeServer, browser: webdriver.Chrome, page: Page, host: str
) -> None:
    """Also where the browser gives no clipboard, as for a node's name over plain HTTP."""
    page.url = page.url.replace("127.0.0.1", host)
    page.open()
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    fake.answers = [says("Some **bold** words.")]
    page.ask("Copy this.")
    assert page.script("return isSecureContext") == (host == "127.0.0.1")
    page.button("Copy answer").click()
    page.wait_for("Copied.", "#notice")
    page.one("#text").send_keys(Keys.CONTROL, "v")
    assert page.one("#text").get_attribute("value") == "Some **bold** words."


def test_thoughts_of_a_reasoning_model_are_folded(fake: FakeServer, page: Page) -> None:
    gate = fake.gate()
    fake.answers = [says(thinks("Llamas "), gate, thinks("are *kind*."), "Yes.")]
    page.say("Are llamas kind?")
    summary = page.one("details summary")
    until(summary.is_displayed, "the thoughts")
    gate.open()
    page.wait_for("Yes.")
    page.wait_for_end()
    assert page.answers() == ["Thoughts\nYes."]
    summary.click()
    assert page.answers() == ["Thoughts\nLlamas are kind.\nYes."]
    assert page.ask("Sure?") == "Yes."
    assert fake.bodies[1]["messages"][1] == {"role": "assistant", "content": "Yes."}
    page.driver.refresh()
    page.wait_for("Yes.")
    assert page.answers()[0] == "Thoughts\nYes."


def test_other_conversations_go_on_meanwhile(fake: FakeServer, page: Page) -> None:
    gate = fake.gate()
    fake.answers = [says("Slow", gate, " but sure."), says("Quick.")]
    page.say("Slowly.")
    page.wait_for("Slow")
    page.button("New conversation").click()
    assert page.ask("Quickly.") == "Quick."
    assert page.all("#conversations .running")
    gate.open()
    until(lambda: not page.all("#conversations .running"), "the end of the slow answer")
    assert page.answers() == ["Quick."]
    page.button("Slowly.", "#conversations").click()
    page.wait_for("Slow but sure.")


def test_an_answer_that_was_cut_off_goes_on(fake: FakeServer, page: Page) -> None:
    thoughts = thinks("Stella. "), "Once upon", " a"
    fake.answers = [says(*thoughts, finish="length"), says(" time", ", there **was**."), says("New.")]
    page.ask("A story?")
    page.button("Continue this answer").click()
    page.wait_for("there was")
    page.wait_for_end()
    assert page.answers() == ["Thoughts\nOnce upon a time, there was."]
    assert fake.bodies[1]["messages"] == [
        {"role": "user", "content": "A story?"},
        {"role": "assistant", "content": "Once upon a", "reasoning_content": "Stella. "},
    ]
    assert (fake.bodies[1]["continue_final_message"], fake.bodies[1]["add_generation_prompt"]) == (True, False)
    assert "4 tokens" in page.one(".stats").text
    assert not [b for b in page.all(".proceed") if b.is_displayed()]
    page.ask("And then?")
    assert "continue_final_message" not in fake.bodies[2]
    assert fake.messages[1] == ("assistant", "Once upon a time, there **was**.")
    assert page.driver.execute_script("return document.querySelectorAll('.answer').length") == 2


def test_a_text_file_goes_with_a_message(fake: FakeServer, page: Page, tmp_path: Path) -> None:
    """Chosen or dropped; what is no text, or too large, is told."""
    (tmp_path / "job.sh").write_text("#!/bin/sh\necho '```'\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "large.txt").write_text("x" * 300_000)
    for name, told in (("picture.png", "is not a text file"), ("large.txt", "is larger than 256 KB")):
        page.one("#files").send_keys(str(tmp_path / name))
        page.wait_for(f"{name} {told}", "#notice")
    page.one("#files").send_keys(str(tmp_path / "job.sh"))
    page.wait_for("job.sh", "#attached")
    page.button("Leave out job.sh").click()
    until(lambda: not page.all("#attached li"), "the file gone")
    assert not page.button("Send").is_enabled()
    page.one("#files").send_keys(str(tmp_path / "job.sh"))
    page.wait_for("job.sh", "#attached")
    page.script("""
        const data = new DataTransfer();
        data.items.add(new File(["1,2\\n"], "table.csv"));
        document.querySelector("#main").dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
    """)
    page.wait_for("table.csv", "#attached")
    page.ask("What is wrong?")
    sent = "job.sh:\n\n````sh\n#!/bin/sh\necho '```'\n````\n\ntable.csv:\n\n```csv\n1,2\n```\n\nWhat is wrong?"
    assert fake.messages == [("user", sent)]
    assert not page.all("#attached li")
    page.driver.refresh()
    page.wait_for("table.csv", ".user .file")
    page.one(".user .file summary").click()
    page.wait_for("echo", ".user .file pre")
    page.button("Edit and send again").click()
    page.press(Keys.END, "?", Keys.ENTER)
    page.wait_for_end()
    assert fake.messages == [("user", sent + "?")]
