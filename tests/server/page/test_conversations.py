"""What the chat page keeps: conversations, settings, and a storage that is damaged, full or missing."""

import json
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser import (
    FakeServer,
    Page,
    fill_settings,
    says,
    stored,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first one may have to install the browser
CLICK_AND_SEE_WHAT_IS_FOUND = """
document.querySelector("#conversations li button").click();
for (;;) {
  const found = document.querySelector("article.found");
  if (found) return [found.innerText, found.getBoundingClientRect().top];
  await new Promise((done) => setTimeout(done, 20));
}
"""
"""In one go: it is marked for two seconds only."""


def test_conversations_are_searched(fake: FakeServer, page: Page) -> None:
    """Every word must occur, accents and capitals make no difference; the message that has them comes into sight."""
    long = "\n\n".join(["A line of the answer."] * 60)
    fake.answers = [says("The Café is at the corner.\n\n" + long), says(long), says("Nothing.")]
    page.ask("Where do llamas eat?")
    page.ask("And sleep?")
    page.button("New conversation").click()
    page.ask("Something else?")
    search = page.one("#search")
    search.send_keys("cafe CORNER")
    until(lambda: len(page.all("#conversations li")) == 1, "one conversation")
    assert page.one("#conversations li small").text.startswith("The Café is at the corner.")
    text, top = page.script(CLICK_AND_SEE_WHAT_IS_FOUND)
    assert "Café" in text
    assert abs(top) < 200
    until(lambda: page.one("#title").text == "Where do llamas eat?", "the conversation")
    search.clear()
    search.send_keys("no such words")
    page.wait_for("Nothing found.", "#found")
    assert page.all("#conversations li") == []
    search.send_keys(Keys.ESCAPE)
    until(lambda: len(page.all("#conversations li")) == 2, "all of them")
    assert page.one("#found").text == ""


def test_settings_are_sent_if_they_are_set(fake: FakeServer, page: Page) -> None:
    page.ask("Before.")
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 99, "seed": 7,
        "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25,
    }  # fmt: skip
    fill_settings(page, system="Be kind.", stop="END\n\\n\\n", **{name: str(value) for name, value in values.items()})
    page.ask("After.")
    common = {"model", "messages", "stream", "stream_options"}
    assert fake.bodies[0].keys() == common
    assert {name: v for name, v in fake.bodies[1].items() if name not in common} == {**values, "stop": ["END", "\n\n"]}
    assert fake.messages[:2] == [("system", "Be kind."), ("user", "Before.")]
    page.driver.refresh()
    page.button("New conversation").click()
    page.ask("New ones have the same.")
    assert fake.bodies[2] == {**fake.bodies[1], "messages": fake.bodies[2]["messages"]}
    assert fake.messages == [("system", "Be kind."), ("user", "New ones have the same.")]
    page.button("System prompt and sampling").click()
    assert page.one("[name=stop]").get_attribute("value") == "END\n\\n\\n"
    page.button("Clear", "#settings").click()
    page.button("Save", "#settings").click()
    page.ask("Nothing is set.")
    assert fake.bodies[3].keys() == common
    assert fake.messages[0][0] == "user"


def test_settings_out_of_range_are_not_taken_and_can_be_left(fake: FakeServer, page: Page) -> None:
    fill_settings(page, temperature="3")
    assert page.one("#settings").is_displayed()
    assert page.script("return document.querySelector('[name=temperature]').validity.rangeOverflow")
    page.press(Keys.ESCAPE)
    until(lambda: not page.one("#settings").is_displayed(), "the dialog closed")
    page.ask("Nothing is set.")
    assert "temperature" not in fake.bodies[0]


def test_conversations_outlive_a_reload(fake: FakeServer, page: Page) -> None:
    page.press("The first one.", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "With two lines?", Keys.ENTER)
    page.wait_for("Yes.")
    page.wait_for_end()
    assert fake.messages == [("user", "The first one.\nWith two lines?")]
    page.button("New conversation").click()
    page.ask("The second one.")
    page.button("The first one.", "#conversations").click()
    page.driver.refresh()
    page.wait_for("The first one.")
    assert page.one("#title").text == "The first one."
    assert [b.text for b in page.all("#conversations li > button:first-child")] == ["The second one.", "The first one."]
    page.ask("Go on.")
    assert len(fake.messages) == 3


def test_conversations_are_renamed_and_deleted(fake: FakeServer, page: Page) -> None:
    page.ask("One.")
    page.button("Rename conversation").click()
    page.press(Keys.CONTROL, "a")
    page.press("A better name", Keys.ENTER)
    until(lambda: page.one("#title").text == "A better name", "the new title")
    assert page.driver.switch_to.active_element.accessible_name == "Rename conversation"
    page.ask("Two.")
    page.driver.refresh()
    assert page.one("#title").text == "A better name"
    page.button("New conversation").click()
    page.ask("Another.")
    page.button("Delete conversation").click()
    page.button("Delete", "#ask").click()
    until(lambda: page.one("#title").text == "A better name", "the other conversation")
    page.button("Delete conversation").click()
    page.button("Delete", "#ask").click()
    until(lambda: page.one("#welcome").is_displayed(), "an empty page")
    assert stored(page) == []


def test_a_conversation_is_exported(page: Page, tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    fill_settings(page, system="Be kind.", top_k="3")
    page.ask("Keep this / safe.")
    page.button("Export conversation").click()
    path = tmp_path / "Keep-this-safe-.json"
    until(path.exists, "the file")
    found = json.loads(path.read_text())
    assert (found["title"], found["settings"]) == ("Keep this / safe.", {"system": "Be kind.", "top_k": 3})
    assert [(m["role"], m["content"]) for m in found["messages"]] == [
        ("user", "Keep this / safe."),
        ("assistant", "Yes."),
    ]


def test_what_is_damaged_in_the_storage_harms_nothing_else(page: Page) -> None:
    page.ask("A good one.")
    damaged = ["{", "null", "[]", '{"id":"x","title":"t","updated":1,"messages":[{"role":"user"}]}', '{"id":1}']
    page.script(
        "a[0].forEach((text, i) => localStorage.setItem('mpillama.conversation.damaged-' + i, text));"
        "localStorage.setItem('mpillama.theme', '<b>');"
        "const id = Object.keys(localStorage).find((k) => k.includes('conversation') && !k.includes('damaged'));"
        "const whole = JSON.parse(localStorage[id]);"
        "Object.assign(whole, { settings: 7 }); whole.messages[1].stats = 'fast';"
        "localStorage.setItem(id, JSON.stringify(whole));",
        damaged,
    )
    page.driver.refresh()
    page.wait_for("5 of the stored conversations", "#notice")
    page.wait_for("A good one.")
    assert page.ask("Does it work?") == "Yes."
    assert page.script("return localStorage.getItem('mpillama.conversation.damaged-0')") == "{"


def test_a_full_storage_is_told(page: Page) -> None:
    page.script("localStorage.setItem('full', 'x'.repeat(5 * 1024 * 1024 - 20))")
    assert page.ask("Is there room?") == "Yes."
    page.wait_for("storage is full", "#notice")
    assert page.ask("And now?") == "Yes."


def test_a_browser_without_storage_still_chats(fake: FakeServer, page: Page) -> None:
    page.driver.get("about:blank")
    denied = "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name,"
    source = denied + "{ get() { throw new DOMException('denied', 'SecurityError') } });"
    added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page.driver.get(f"{page.url}/#key=k")
        page.wait_for("stores nothing", "#notice")
        assert page.ask("Hello?") == "Yes."
        assert fake.keys[-1] == "Bearer k"
        page.button("Dark colours").click()
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_two_tabs_see_each_others_conversations(page: Page) -> None:
    page.ask("In the first tab.")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        page.driver.get(page.url)
        page.wait_for("In the first tab.")
        page.ask("In the second tab.")
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)
    page.wait_for("In the second tab.")
