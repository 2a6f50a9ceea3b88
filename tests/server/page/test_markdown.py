"""Answers on the chat page: Markdown becomes elements, and nothing that is written becomes more than that."""

import pytest

from tests.server.browser import (
    FakeServer,
    Page,
    says,
    until,
)
from tests.server.page.texts import LESSON, RICH
from tests.server.test_rendering import ATTEMPTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first one may have to install the browser

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
ROGUES = """
return [...document.querySelectorAll("*")].flatMap((n) => [...n.attributes].map((a) => a.name + "=" + a.value))
  .filter((text) => /^on|^srcdoc|^(?!alttext=).*javascript:/i.test(text));
"""


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
