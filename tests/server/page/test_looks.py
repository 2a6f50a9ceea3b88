"""How the chat page looks and is used: colours, contrast, keyboard, names, phones; and once the real server."""

from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.server.browser import (
    MODEL,
    FakeServer,
    Page,
    fill_settings,
    opened,
    refuses,
    says,
    screenshot,
    thinks,
    until,
)
from tests.server.page.texts import LESSON, RICH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first one may have to install the browser

CONTRAST = """
const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (node) => {
  for (let n = node; n; n = n.parentElement) {
    const colour = parse(getComputedStyle(n).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !node.checkVisibility({ visibilityProperty: true }) || node.disabled) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${node.tagName} ${node.className} ${node.textContent.slice(0, 40)}`);
}
return poor;
"""
BEYOND_THE_EDGE = """
return [...document.querySelectorAll("body *")].filter((n) => n.checkVisibility({ visibilityProperty: true }))
  .filter((n) => !n.closest("pre, .table, .formula, .unseen, .skip"))
  .filter((n) => n.getBoundingClientRect().right > innerWidth + 0.5)
  .map((n) => n.outerHTML.slice(0, 80));
"""


def nameless(page: Page, within: str = "") -> list[str]:
    """Controls and landmarks that say nothing of what they are."""
    kinds = ("button", "input", "textarea", "a", "[tabindex]", "meter", "nav", "main", "section", "form[id]", "summary")
    seen = [node for kind in kinds for node in page.all(within + kind) if node.is_displayed()]
    return [node.get_attribute("outerHTML")[:90] for node in seen if not node.accessible_name]


def test_colours_follow_the_system_until_the_reader_chooses(page: Page) -> None:
    page.prefer(prefers_color_scheme="light")
    light = page.colour("body")
    page.prefer(prefers_color_scheme="dark")
    dark = page.colour("body")
    assert light != dark
    page.button("Light colours").click()
    assert page.colour("body") == light
    page.driver.refresh()
    assert page.colour("body") == light
    page.button("Dark colours").click()
    assert page.colour("body") == dark
    assert page.script("return localStorage.getItem('mpillama.theme')") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(fake: FakeServer, page: Page, scheme: str) -> None:
    page.prefer(prefers_color_scheme=scheme)
    page.expected = ["status of 400"]
    page.settle()
    assert page.script(CONTRAST) == []
    fake.answers = [says(LESSON + RICH), refuses(400)]
    page.ask("Teach me.")
    page.ask("And again.")
    page.settle()
    assert page.script(CONTRAST) == []
    page.button("System prompt and sampling").click()
    assert page.script(CONTRAST) == []
    page.press(Keys.ESCAPE)
    page.button("Delete conversation").click()
    assert page.script(CONTRAST) == []


def test_everything_is_done_with_the_keyboard(fake: FakeServer, page: Page) -> None:
    fake.answers = [says("One."), says("Two.")]
    assert page.driver.switch_to.active_element.get_attribute("id") == "text"
    page.press("First line", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "second line", Keys.ENTER)
    page.wait_for_end()
    assert fake.messages == [("user", "First line\nsecond line")]
    stops: list[str] = []
    while "Message" not in stops and len(stops) < 40:
        page.press(Keys.TAB)
        focused = page.driver.switch_to.active_element
        if focused.tag_name == "body":  # behind the last one
            continue
        stops.append(focused.accessible_name)
        width = focused.value_of_css_property("outline-width")
        assert (focused.value_of_css_property("outline-style"), width) == ("solid", "2px") or stops[-1] == "Message"
    assert stops == [
        "Skip to the message field",
        "New conversation",
        "Search conversations",
        "First line",
        "Rename conversation",
        "Export conversation",
        "Delete conversation",
        "Dark colours",
        "System prompt and sampling",
        "Edit and send again",
        "Copy message",
        "Delete with its answer",
        "Copy answer",
        "Answer again",
        "Delete with its question",
        "Attach text files",
        "Message",
    ]
    page.script("document.querySelector('.skip').focus()")
    page.press(Keys.ENTER)
    assert page.driver.switch_to.active_element.get_attribute("id") == "text"
    page.press("half a word")
    page.script(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
        " { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"
    )
    assert page.one("#text").get_attribute("value") == "half a word", "Enter took a proposal of the input method"
    page.script("document.querySelector('.retry').focus()")
    page.press(Keys.SPACE)
    page.wait_for("Two.")


def test_controls_have_names_and_the_page_has_landmarks(fake: FakeServer, page: Page) -> None:
    fake.answers = [says(LESSON + RICH, finish="length")]
    page.ask("Teach me.")
    assert nameless(page) == []
    page.button("System prompt and sampling").click()
    assert nameless(page, "#settings ") == []
    page.press(Keys.ESCAPE)
    page.button("Rename conversation").click()
    assert nameless(page, "#ask ") == []
    page.press(Keys.ESCAPE)
    roles = {e.aria_role for e in page.all("nav, main, form, h1, h2, [role=status]") if e.is_displayed()}
    assert {"navigation", "main", "form", "heading"} <= roles
    ids = page.script("return [...document.querySelectorAll('[id]')].map((n) => n.id)")
    assert len(ids) == len(set(ids))
    assert page.script("return document.documentElement.lang") == "en"


def test_a_phone_has_a_drawer_and_no_sideways_scrolling(fake: FakeServer, page: Page, tmp_path: Path) -> None:
    page.resize(320, 640, touch=True)
    page.driver.refresh()
    fake.answers = [says(LESSON + "\n" + "verylongword" * 20 + "\n\n" + RICH + "\n$$" + "a + " * 60 + "b$$")]
    page.say("W" * 60)
    page.wait_for_end()
    sizes = page.script(
        "return [...document.querySelectorAll('input, textarea')].map((n) => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 16
    for open_it in (
        lambda: page.press(""),
        lambda: page.button("Conversations").click(),
        lambda: page.button("Close the list").click(),
        lambda: page.button("System prompt and sampling").click(),
    ):
        open_it()
        page.settle()
        assert page.script("return document.scrollingElement.scrollWidth") == 320
        assert page.script(BEYOND_THE_EDGE) == []
    page.press(Keys.ESCAPE)
    wide = "[...document.querySelectorAll('.table, .formula, pre')].filter((n) => n.scrollWidth > n.clientWidth)"
    found = page.script(f"return {wide}.map((n) => n.className || n.tagName)")
    assert found == ["PRE", "table", "table", "PRE", "formula"]
    assert not page.one("#sidebar").is_displayed()
    page.button("Conversations").click()
    until(page.one("#sidebar").is_displayed, "the drawer")  # it slides in
    assert page.driver.switch_to.active_element.accessible_name == "Close the list"
    assert page.script("return document.querySelector('#main').inert")
    page.press(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.accessible_name == "Conversations"
    page.button("Conversations").click()
    page.button("New conversation", "#sidebar").click()
    until(lambda: page.one("#welcome").is_displayed() and not page.one("#sidebar").is_displayed(), "an empty page")


def test_new_text_moves_the_page_only_for_a_reader_at_its_end(fake: FakeServer, page: Page) -> None:
    gates = [fake.gate(), fake.gate()]
    fake.answers = [says("A line.\n\n" * 60, gates[0], "More.\n\n" * 20, gates[1], "The end.")]
    at = "const log = document.querySelector('#log'); return [log.scrollTop, log.scrollHeight - log.clientHeight]"
    page.say("Go on and on.")
    page.wait_for("A line.")
    until(lambda: abs(page.script(at)[0] - page.script(at)[1]) < 2 and page.script(at)[1] > 500, "the end in sight")
    assert not page.one("#newest").is_displayed()
    page.script("document.querySelector('#log').scrollTop = 100")
    until(page.one("#newest").is_displayed, "the way back")
    gates[0].open()
    page.wait_for("More.")
    assert page.script(at)[0] == 100
    page.button("Go to the newest text").click()
    gates[1].open()
    page.wait_for_end()
    top, end = page.script(at)
    assert abs(top - end) < 2


def test_less_motion_for_those_who_want_less(page: Page) -> None:
    page.prefer(prefers_reduced_motion="reduce")
    moving = page.script(
        "return [...document.querySelectorAll('*')].filter((n) => getComputedStyle(n).transitionDuration !== '0s'"
        " && getComputedStyle(n).transitionProperty !== 'none').length"
    )
    assert moving == 0


@pytest.mark.parametrize(("name", "scheme"), [("desktop-light", "light"), ("desktop-dark", "dark"), ("phone", "light")])
def test_screenshots(fake: FakeServer, page: Page, tmp_path: Path, name: str, scheme: str) -> None:
    page.prefer(prefers_color_scheme=scheme)
    if name == "phone":
        page.resize(390, 780, touch=True)
    page.wait_for(MODEL, "#server")
    screenshot(page, f"{name}-new", tmp_path)
    fake.answers = [says("Once upon a time, there was a llama named Stella."), says(*LESSON.splitlines(keepends=True))]
    page.ask("Tell me a story about a llama on a cluster.")
    page.button("Conversations").click() if name == "phone" else None
    page.button("New conversation", "#sidebar").click()
    page.ask("What does an all-reduce do? Explain it with an example and a table.")
    screenshot(page, name, tmp_path)
    page.button("Conversations").click() if name == "phone" else None
    page.button("New conversation", "#sidebar").click()
    fake.answers = [says(thinks("They want to see *all* of it."), RICH, finish="length")]
    page.script("""
        const data = new DataTransfer();
        data.items.add(new File(["#!/bin/sh\\n"], "job.sh"));
        document.querySelector("#main").dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
    """)
    page.wait_for("job.sh", "#attached")
    screenshot(page, f"{name}-attached", tmp_path)
    page.ask("Show me everything that you can write.")
    screenshot(page, f"{name}-rich", tmp_path)
    page.script("document.querySelector('#log').scrollTop = 0")
    screenshot(page, f"{name}-rich-top", tmp_path)
    page.button("Conversations").click() if name == "phone" else None
    page.one("#search").send_keys("llama stella")
    screenshot(page, f"{name}-search", tmp_path)
    page.one("#search").send_keys(Keys.ESCAPE)
    page.button("Close the list").click() if name == "phone" else None
    page.button("System prompt and sampling").click()
    screenshot(page, f"{name}-settings", tmp_path)


def test_the_real_server_tells_a_story(browser: webdriver.Chrome, served: Any, tmp_path: Path) -> None:
    """Two turns, a stop and settings, with the demo model."""
    for page in opened(browser, served.url):
        page.driver.get("about:blank")
        page.driver.get(f"{served.url}/" + (f"#key={served.key}" if served.key else ""))
        until(lambda page=page: page.one("#server").get_attribute("data-state") == "ok", "the server ready", 240)
        fill_settings(page, system="You tell stories.", temperature="0", max_tokens="40")
        story = page.ask("Tell me a story about a llama, a fox and a lamp.")
        assert len(story.split()) > 10
        assert " tokens/s" in page.one(".stats").text
        assert " of 768" in page.one(".stats").text
        page.button("Answer again").click()
        page.wait_for_end()
        assert page.answers() == [story], "temperature 0 gives the same answer again"
        screenshot(page, "real-server", tmp_path)
        fill_settings(page, max_tokens="10")
        page.button("Answer again").click()
        page.wait_for_end()
        assert story.startswith(page.answers()[0])
        fill_settings(page, max_tokens="30")
        page.button("Continue this answer").click()
        page.wait_for_end()
        assert page.answers() == [story], "an answer in two parts is the same answer"
        fill_settings(page, max_tokens="700")
        page.say("Another one, please.")
        until(lambda page=page: len(page.answers()) == 2 and len(page.answers()[1]) > 20, "some text")
        page.press(Keys.ESCAPE)
        page.wait_for_end()
