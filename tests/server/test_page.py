"""The chat page in a real browser: against a server that answers by a script, and once against the real one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.server.browser import (
    CONTEXT,
    MODEL,
    OTHER_HOST,
    FakeServer,
    Page,
    fake_server,
    refuses,
    running_browser,
    says,
    screenshot,
    thinks,
    until,
    why_not,
)
from tests.server.test_rendering import ATTEMPTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first one may have to install the browser

LESSON = """\
An **all-reduce** adds up what *all* ranks have, and gives all of them the sum; see
[the forum](https://www.mpi-forum.org/) and `MPI_Allreduce`:

1. Every rank brings a vector.
2. The vectors are added:
   - exactly, in `float64`,
   - in any order.
3. Every rank gets the **sum**.

```python
def all_reduce(comm, x):
    \"\"\"The sum over all ranks, on all of them.\"\"\"
    return comm.allreduce(x)  # two of them in every layer, one after attention and one after the feed-forward part
```

| ranks | share of each | messages |
|:------|:-------------:|---------:|
| 2     | half          | 2        |
| 4     | a quarter     | 8        |

> A llama never walks alone.
"""
INJECTIONS = (
    "<img src=x onerror=\"window.hurt=1\">",
    "<script>window.hurt=1</script>",
    "[click](javascript:window.hurt=1)",
    "[click](  JaVaScRiPt:window.hurt=1)",
    "[click](data:text/html,<script>window.hurt=1</script>)",
    "<javascript:window.hurt=1>",
    "![picture](https://elsewhere.test/track.png)",
    "[a](https://ok.test/\"onmouseover=window.hurt=1)",
    "```<img src=x onerror=window.hurt=1>\n</code></pre><img src=x onerror=window.hurt=1>\n```",
    "| <img src=x onerror=window.hurt=1> |\n|---|\n| <svg onload=window.hurt=1> |",
    "> - <iframe srcdoc='<script>parent.hurt=1</script>'></iframe>",
    "# <style>body{display:none}</style>",
)  # fmt: skip
KINDS = "img, script:not(head script), iframe, svg[onload], style, object, embed, link:not(head link), [style*=display]"

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
ROGUES = """
return [...document.querySelectorAll("*")].flatMap((n) => [...n.attributes].map((a) => a.name + "=" + a.value))
  .filter((text) => /^on|^srcdoc|^(?!alttext=).*javascript:/i.test(text));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """One browser for all tests, or skipped ones."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running_browser() as driver:
        yield driver


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """The server that answers by a script."""
    with fake_server() as server:
        yield server


@pytest.fixture
def page(browser: webdriver.Chrome, fake: FakeServer) -> Iterator[Page]:
    """The page of the fake server; afterwards nothing may be wrong in the console, and no one else may be asked."""
    for page in opened(browser, fake.url):
        page.wait_for(MODEL, "#server")
        yield page


def opened(browser: webdriver.Chrome, url: str) -> Iterator[Page]:
    page = Page(browser, url)
    page.resize(1280, 860)
    try:
        yield page.open()
        assert page.problems() == []
    finally:
        page.reset()


def stored(page: Page) -> list[dict[str, Any]]:
    """The stored conversations."""
    entries = page.script("return Object.entries(localStorage)")
    return [json.loads(text) for name, text in entries if name.startswith("mpillama.conversation.")]


def fill_settings(page: Page, **values: str) -> None:
    page.button("System prompt and sampling").click()
    for name, value in values.items():
        field = page.one(f"#settings [name={name}]")
        field.clear()
        field.send_keys(value)
    page.button("Save", "#settings").click()


def nameless(page: Page, within: str = "") -> list[str]:
    """Controls and landmarks that say nothing of what they are."""
    kinds = ("button", "input", "textarea", "a", "[tabindex]", "meter", "nav", "main", "section", "form[id]", "summary")
    seen = [node for kind in kinds for node in page.all(within + kind) if node.is_displayed()]
    return [node.get_attribute("outerHTML")[:90] for node in seen if not node.accessible_name]


# -- answers -----------------------------------------------------------------------------------------------------------


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
    assert fake.left.wait(10), "the server still thinks that somebody listens"
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


# -- Markdown ----------------------------------------------------------------------------------------------------------


def test_markdown_becomes_elements(fake: FakeServer, page: Page) -> None:
    fake.answers = [says(LESSON)]
    page.ask("Teach me.")
    found = page.script("""
        const all = (selector) => [...document.querySelectorAll(".answer .text " + selector)];
        const text = (selector) => all(selector).map((node) => node.textContent);
        return [text("> p > strong"), text("> p > em"), text("> p > code"), text("a"), all("> ol > li").length,
            text("ol ul li"), text(".code .bar span"), text("th"), text("td:last-child"), text("blockquote p")]
    """)
    assert found[:4] == [["all-reduce"], ["all"], ["MPI_Allreduce"], ["the forum"]]
    assert found[4:6] == [3, ["exactly, in float64,", "in any order."]]
    assert found[6:] == [
        ["python"],
        ["ranks", "share of each", "messages"],
        ["2", "8"],
        ["A llama never walks alone."],
    ]
    link = page.one(".answer a")
    assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")
    assert (
        page.one(".code code").get_attribute("textContent") == LESSON.split("```")[1].removeprefix("python\n").rstrip()
    )


def test_nothing_that_is_written_becomes_html(fake: FakeServer, page: Page) -> None:
    fake.answers = [says(*(f"{text}\n\n" for text in INJECTIONS))]
    page.ask(" ".join(INJECTIONS[:3]))
    assert page.script("return window.hurt ?? null") is None
    assert [node.get_attribute("outerHTML") for node in page.all(f"article :is({KINDS})")] == []
    assert page.script(ROGUES) == []
    shown = page.one(".answer .text").text
    for text in (
        *INJECTIONS[:3],
        *INJECTIONS[4:6],
        INJECTIONS[10].removeprefix("> - "),
        INJECTIONS[11].removeprefix("# "),
    ):
        assert text in shown
    assert page.one(".said").text == " ".join(INJECTIONS[:3])
    hrefs = [link.get_attribute("href") for link in page.all("article a")]
    assert hrefs == ["https://elsewhere.test/track.png", "https://ok.test/%22onmouseover=window.hurt=1"]
    page.driver.refresh()
    page.wait_for(INJECTIONS[1])
    assert page.script("return window.hurt ?? null") is None
    assert page.all(f"article :is({KINDS})") == []


def test_markdown_that_has_not_ended_is_shown(fake: FakeServer, page: Page) -> None:
    gates = [fake.gate() for _ in range(4)]
    fake.answers = [
        says(
            "This is **bo", gates[0], "ld**.\n\n```py", gates[1], "thon\nx = 1\n", gates[2], "\ny = 2\n```\n\n1. one\n",
            gates[3], "\n2. two\n",
        )
    ]  # fmt: skip
    page.say("Slowly.")
    page.wait_for("bo", ".answer .text strong")
    gates[0].open()
    page.wait_for("py", ".answer .code .bar")
    gates[1].open()
    page.wait_for("x = 1", ".answer .code")
    node = page.one(".answer .code pre")
    gates[2].open()
    page.wait_for("y = 2", ".answer .code")
    assert node == page.one(".answer .code pre"), "code that grows stays the same element, with its selection"
    page.wait_for("one", ".answer li")
    gates[3].open()
    page.wait_for_end()
    assert [len(page.all(f".answer {tag}")) for tag in ("ol", "li", ".code")] == [1, 2, 1]


RICH = """\
Setext
======

Mass is $E=mc^2$, H<sub>2</sub>O and 2<sup>10</sup>;&nbsp;also \\(a\\,b\\).

$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$

\\[ \\begin{aligned} a_1 &= b*c*d \\\\ &= \\sum_{i=1}^n i \\end{aligned} \\]

- [ ] to do
- [x] done, with a note[^1]

| Function | Description | Complexity | Notes |
|:---|:---:|---:|---|
| `sort_everything` | sorts<br>things | O(n log n) | a rather long note about what it does to the list |
| `find` | finds | O(n) | |

```c
int main(void) { return 0; } // the end, which is a long way to the right, beyond what any phone can show at once
```

> Press <kbd>Ctrl</kbd>+<kbd>C</kbd>.
> > Once.

[^1]: The note.
"""


def test_what_models_write_besides_markdown_is_shown(fake: FakeServer, page: Page) -> None:
    """Formulas are drawn, not printed; line breaks, lists of things to do, notes and headings are what they mean."""
    fake.answers = [says(*RICH.splitlines(keepends=True))]
    page.ask("Show me everything.")
    found = page.script("""
        const all = (selector) => [...document.querySelectorAll(".answer .text " + selector)];
        const text = (selector) => all(selector).map((node) => node.textContent);
        return [text("h3"), text("sub"), text("sup"), all("td br").length, all("li.task input[disabled]").length,
          all("input:checked").length, text(".notes li"), text("kbd"), all("blockquote blockquote").length,
          all("math").map((node) => node.getBoundingClientRect().height > 10), text("mfrac"), text(".k, .kt")]
    """)
    assert found[:6] == [["Setext"], ["2"], ["10", "[1]"], 1, 2, 1]
    assert [text.strip() for text in found[6]] == ["The note."]
    assert found[7:] == [["Ctrl", "C"], 1, [True] * 4, ["13"], ["int", "void", "return"]]
    for raw in ("<br>", "&nbsp;", "[x]", "\\frac", "$$", "===", "[^1]"):
        assert raw not in page.answers()[0]


def test_an_answer_about_marks_of_thoughts_is_whole(fake: FakeServer, page: Page) -> None:
    text = "Remove it with `<think>.*?</think>`: what is between <think> and </think> goes."
    fake.answers = [says(text)]
    assert page.ask("How?") == text.replace("`", "")
    assert not page.one(".answer details").is_displayed()


def test_only_the_end_of_a_growing_answer_is_rendered_anew(fake: FakeServer, page: Page) -> None:
    """The requests stay small while the answer grows, and what is whole stays the same element."""
    paragraphs = [f"Paragraph *{i}* of a long answer.\n\n" for i in range(200)]
    gates = [fake.gate() for _ in range(4)]
    fake.answers = [says("".join(paragraphs), *(p for gate in gates for p in (gate, "One more **word** in it. ")))]
    page.say("Go on and on.")
    page.wait_for("Paragraph 199")
    page.script("document.querySelectorAll('.answer .text > p').forEach((node) => (node.old = true))")
    del fake.rendered[:]
    for i, gate in enumerate(gates):
        gate.open()
        until(lambda i=i: len(page.all(".answer .text strong")) == i + 1, "the next word")
    growing = [one for texts in fake.rendered for one in texts if one["growing"]]
    assert len(growing) >= 3  # the last one may be whole already
    assert max(len(one["text"]) for one in growing) < 300
    page.wait_for_end()
    assert page.script("return [...document.querySelectorAll('.answer .text > p')].filter((n) => !n.old).length") <= 1
    assert len(page.all(".answer .text > p")) == 201


def test_a_text_that_cannot_be_rendered_is_shown_as_it_is_written(fake: FakeServer, page: Page) -> None:
    page.expected = ["status of 422"]
    fake.renders = False
    fake.answers = [says("Some **bold** words.\n\n<script>window.hurt=1</script>")]
    assert page.ask("Go.") == "Some **bold** words.\n\n<script>window.hurt=1</script>"
    fake.renders = True
    page.script("await (await import('/page/server.js')).check()")
    page.wait_for("bold", ".answer .text strong")
    assert page.script("return window.hurt ?? null") is None


def test_many_odd_texts_harm_nothing(fake: FakeServer, page: Page) -> None:
    """The attempts of test_rendering in a browser that would run them."""
    fake.answers = [says(*(f"{text}\n\n" for text in ATTEMPTS))]
    page.ask("Try.")
    assert page.script("return window.hurt ?? null") is None
    assert [node.get_attribute("outerHTML") for node in page.all(f"article :is({KINDS})")] == []
    assert page.script(ROGUES) == []
    assert page.one("#composer").is_displayed()


# -- more that can be done ---------------------------------------------------------------------------------------------


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
    page.one("#conversations li button").click()
    until(lambda: page.one("#title").text == "Where do llamas eat?", "the conversation")
    until(lambda: page.all("article.found"), "the message")
    assert "Café" in page.one("article.found").text
    assert abs(page.script("return document.querySelector('article.found').getBoundingClientRect().top")) < 200
    search.clear()
    search.send_keys("no such words")
    page.wait_for("Nothing found.", "#found")
    assert page.all("#conversations li") == []
    search.send_keys(Keys.ESCAPE)
    until(lambda: len(page.all("#conversations li")) == 2, "all of them")
    assert page.one("#found").text == ""


# -- settings ----------------------------------------------------------------------------------------------------------


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


# -- conversations and their storage -----------------------------------------------------------------------------------


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


# -- errors, keys, states of the server --------------------------------------------------------------------------------


def test_an_error_in_mid_answer_is_shown_and_can_be_tried_again(fake: FakeServer, page: Page) -> None:
    fake.answers = [says("Half an ans", {"error": {"message": "A rank has failed."}}, ends=False), says("Whole.")]
    page.ask("Go.")
    assert page.answers() == ["Half an ans\nA rank has failed."]
    page.button("Answer again").click()
    page.wait_for("Whole.")


def test_a_connection_that_breaks_is_told(fake: FakeServer, page: Page) -> None:
    fake.answers = [says("Half", ends=False)]
    page.ask("Go.")
    assert page.answers() == ["Half\nThe connection ended before the answer did."]


def test_a_server_that_falls_silent_is_not_waited_for(fake: FakeServer, page: Page) -> None:
    page.script("(await import('/page/server.js')).server.patience = 0.5")
    fake.answers = [says("Half", fake.gate(alive=False))]
    page.ask("Go.")
    assert page.answers() == ["Half\nThe server has fallen silent."]


def test_a_refused_request_is_told_and_the_next_one_is_whole(fake: FakeServer, page: Page) -> None:
    page.expected = ["status of 400"]
    fake.answers = [refuses(400), says("Fine.")]
    page.ask("Too long?")
    assert page.answers() == ["The test says 400."]
    assert page.ask("Shorter.") == "Fine."
    assert fake.messages == [("user", "Too long?\n\nShorter.")]


def test_a_full_queue_is_tried_again(fake: FakeServer, page: Page) -> None:
    page.expected = ["status of 429"]
    fake.answers = [refuses(429, Retry_After="1"), says("At last.")]
    assert page.ask("Is there room?") == "At last."
    fake.answers = [refuses(429, Retry_After="50")]
    page.say("And now?")
    page.wait_for("Too many requests are waiting, trying again in 50 s")
    page.button("Stop").click()
    page.wait_for_end()
    assert len(fake.bodies) == 3


def test_a_server_that_loads_is_waited_for(fake: FakeServer, page: Page) -> None:
    page.expected = ["status of 503"]
    fake.health = "loading"
    page.driver.refresh()
    page.wait_for("still loading", "#banner")
    fake.answers = [refuses(503, Retry_After="2"), says("Good morning.")]
    page.say("Anybody there?")
    page.wait_for("The model is still loading, trying again in 2 s")
    fake.health = "ok"
    page.wait_for(MODEL, "#server")
    assert page.one("#banner").text == ""
    page.wait_for("Good morning.")


def test_a_server_that_ends_is_told(fake: FakeServer, page: Page) -> None:
    page.expected = ["status of 503"]
    fake.health = "draining"
    fake.answers = [refuses(503, Retry_After="1")]
    page.ask("One more?")
    assert page.answers() == ["The test says 503."]
    page.wait_for("The server is ending", "#banner")


def test_a_server_that_is_gone_is_told(fake: FakeServer, page: Page) -> None:
    page.expected = ["ERR_CONNECTION_REFUSED"]
    page.wait_for(MODEL, "#server")
    fake.http.shutdown()
    fake.http.server_close()
    page.ask("Hello?")
    assert page.answers() == ["The server cannot be reached."]
    page.wait_for("cannot be reached", "#banner")


@pytest.mark.parametrize(("key", "written"), [("secret one", "secret%20one"), ("secret+one/=%", "secret+one/=%")])
def test_the_key_comes_from_the_address_and_leaves_it(fake: FakeServer, page: Page, key: str, written: str) -> None:
    fake.key = key
    page.driver.get("about:blank")
    fake.keys.clear()
    page.driver.get(f"{page.url}/#key={written}")
    page.wait_for(MODEL, "#server")
    assert page.driver.current_url == f"{page.url}/"
    assert page.ask("Hello?") == "Yes."
    page.driver.refresh()
    page.wait_for(MODEL, "#server")
    assert set(fake.keys) == {f"Bearer {key}"}
    assert page.script("return JSON.stringify(localStorage).includes('secret')") is False
    page.expected = ["status of 401"]
    fake.key = "another"
    page.say("Still there?")
    page.wait_for("does not take this key", "#ask")
    page.press(Keys.ESCAPE)
    page.wait_for("wants an API key", "#banner")
    page.script("location.hash = 'key=another'")
    page.wait_for(MODEL, "#server")


def test_the_key_is_asked_for(fake: FakeServer, page: Page) -> None:
    page.expected = ["status of 401"]
    fake.key = "secret"
    page.driver.refresh()
    page.wait_for("only with its API key", "#ask")
    assert page.one("#ask input").get_attribute("type") == "password"
    page.press("wrong", Keys.ENTER)
    page.wait_for("does not take this key", "#ask")
    page.press(Keys.ESCAPE)
    page.wait_for("wants an API key", "#banner")
    page.say("Hello?")
    page.wait_for("does not take this key", "#ask")
    page.press("secret", Keys.ENTER)
    page.wait_for("Yes.")
    page.wait_for_end()
    page.wait_for(MODEL, "#server")
    page.button("API key").click()
    page.press("secret", Keys.ENTER)
    page.wait_for(MODEL, "#server")


# -- looks, keyboard, accessibility ------------------------------------------------------------------------------------


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


# -- the real server ---------------------------------------------------------------------------------------------------


def test_the_real_server_tells_a_story(browser: webdriver.Chrome, served: Any, tmp_path: Path) -> None:
    """Two turns, a stop and settings, with the demo model."""
    for page in opened(browser, served.url):
        page.driver.get("about:blank")
        page.driver.get(f"{served.url}/" + (f"#key={served.key}" if served.key else ""))
        until(lambda page=page: page.one("#server").get_attribute("data-state") == "ok", "the server ready", 60)
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
