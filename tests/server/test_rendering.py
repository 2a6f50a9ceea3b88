"""Markdown of answers as HTML: what models write, what strangers try, and texts that are still growing."""

import asyncio
import gc
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mpillama.server.render.code import CONTRAST, _contrast, code_css
from mpillama.server.render.markdown import render
from mpillama.server.render.renderer import NotRendered, Renderer


def html(text: str, growing: bool = False) -> str:
    """The HTML without what every block has, and without the insides of code and formulas."""
    found = "".join(block.html for block in render(text, growing)).replace("\n<", "<").replace(">\n", ">")
    found = re.sub(r' (dir|tabindex|role|aria-label|target|rel|title)="[^"]*"', "", found)
    found = re.sub(r'<div class="code">.*?</pre></div>', "CODE", found, flags=re.DOTALL)
    found = re.sub(r"<math[^>]* alttext=\"([^\"]*)\".*?</math>", r"MATH(\1)", found, flags=re.DOTALL)
    return re.sub(r'<div class="table">(.*?)</div>', r"\1", found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a * b * c and 2*3*4 and snake_case_name", "<p>a * b * c and 2*3*4 and snake_case_name</p>"),
        ("***both*** ~~gone~~ __strong__ _em_ 中文**强**中文", "<p><em><strong>both</strong></em> <s>gone</s> "
         "<strong>strong</strong> <em>em</em> 中文<strong>强</strong>中文</p>"),
        ("**bold *and* more**, *em **and** more*", "<p><strong>bold <em>and</em> more</strong>, "
         "<em>em <strong>and</strong> more</em></p>"),
        ("`a*b*` and ``x ` y`` \\*no\\*", "<p><code>a*b*</code> and <code>x ` y</code> *no*</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# One #\n###### Six\n#hash", "<h3>One</h3><h6>Six</h6><p>#hash</p>"),
        ("One\n===\nTwo\n---", "<h3>One</h3><h4>Two</h4>"),
        ("- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
        ("3. a\n   b\n\n   c\n4. d", '<ol start="3"><li><p>a<br>b</p><p>c</p></li><li><p>d</p></li></ol>'),
        ("text\n- a\n***\n> q\n> > r", "<p>text</p><ul><li>a</li></ul><hr>"
         "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>"),
        ("1 | 2\nno table", "<p>1 | 2<br>no table</p>"),
        ("a|b\n-|-:\n\\||`c`<br>d", '<table><thead><tr><th>a</th><th class="end">b</th></tr></thead>'
         '<tbody><tr><td>|</td><td class="end"><code>c</code><br>d</td></tr></tbody></table>'),
        ("(see https://a.test/x_(y).)", '<p>(see <a href="https://a.test/x_(y)">https://a.test/x_(y)</a>.)</p>'),
        ("[**b** `c`](https://a.test) <me@a.test>", '<p><a href="https://a.test"><strong>b</strong> <code>c</code></a> '
         '<a href="mailto:me@a.test">me@a.test</a></p>'),
        ("[one](/relative) [two](http:) [three]", "<p>[one](/relative) [two](http:) [three]</p>"),
        ("**open and `open", "<p>**open and `open</p>"),
        ("- ```sh\n  a\n\n    b\n  ```\n- x", "<ul><li>CODE</li><li>x</li></ul>"),
        ("    indented", "CODE"),
        ("2<sup>10</sup> H<sub>2</sub>O a<br/>b &nbsp;&copy; <sup>open <br class=x>",
         "<p>2<sup>10</sup> H<sub>2</sub>O a<br>b &nbsp;© &lt;sup&gt;open &lt;br class=x&gt;</p>"),
        ("- [ ] to do\n- [x] *done*\n- [y] no", '<ul><li class="task"><label><input type="checkbox" disabled=""> to do'
         '</label></li><li class="task"><label><input type="checkbox" disabled="" checked=""> <em>done</em></label>'
         "</li><li>[y] no</li></ul>"),
        ("Yes[^1].\n\n[^1]: The *note*.", '<p>Yes<sup>[1]</sup>.</p><div class="notes"><ol><li><p>The <em>note</em>.'
         "</p></li></ol></div>"),
        ("Between `<think>` and </think>.", "<p>Between <code>&lt;think&gt;</code> and &lt;/think&gt;.</p>"),
        ("$a\\,b$ and \\(x_1*y_1*z\\) cost $5 and $6", "<p>MATH(a\\,b) and MATH(x_1*y_1*z) cost $5 and $6</p>"),
        ("So\n\\[\na\n= b\n\\]\nand\n$$\\int x\\,dx$$", '<p>So</p><div class="formula">MATH(a\n= b)</div>'
         '<p>and</p><div class="formula">MATH(\\int x\\,dx)</div>'),
        ("$$x$$ is, for $$y$$ and $5.", '<p><span class="formula">MATH(x)</span> is, for <span class="formula">MATH(y)'
         "</span> and $5.</p>"),
        ("$x$ is $5 or US$6 or $7.", "<p>MATH(x) is $5 or US$6 or $7.</p>"),
        ("\\begin{align}\na &= b \\\\\n&= c\n\\end{align}",
         '<div class="formula">MATH(\\begin{align}\na &amp;= b \\\\\n&amp;= c\n\\end{align})</div>'),
        ("$\\frac{$ $\\nonsense{x}$", "<p><code>\\frac{</code> <code>\\nonsense{x}</code></p>"),
    ],
)  # fmt: skip
def test_markdown_in_detail(source: str, expected: str) -> None:
    assert html(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("This is **bo", "<p>This is <strong>bo</strong></p>"),
        ("This is **", "<p>This is</p>"),
        ("run `ls -l", "<p>run <code>ls -l</code></p>"),
        ("* one\n* **tw", "<ul><li>one</li><li><strong>tw</strong></li></ul>"),
        ("Three things:\n-", "<p>Three things:</p>"),
        ("Three things:\n- a\n-", "<p>Three things:</p><ul><li>a</li></ul>"),
        ("a\n=", "<p>a</p>"),
        ("a | b\n---|", "<p>a | b</p>"),
        ("```py\nx = 2 **", "CODE"),
    ],
)
def test_what_the_end_of_a_growing_text_leaves_open_is_not_seen(source: str, expected: str) -> None:
    assert html(source, growing=True) == expected


def test_blocks_tell_where_they_begin() -> None:
    text = "# One\n\ntwo\nlines\n\n\n- a\n\n- b\n\n```\n\nx\n```\nend"
    assert [block.line for block in render(text)] == [0, 2, 6, 10, 14]
    rest = "\n".join(text.split("\n")[6:])
    assert [block.html for block in render(rest)] == [block.html for block in render(text)[2:]]


def test_code_has_colours_with_contrast() -> None:
    found = render("```python\ndef f():\n    return 'x'  # why\n```")[0].html
    assert '<span class="k">def</span>' in found
    assert '<span class="c1"># why</span>' in found
    assert "style=" not in found
    pairs = re.findall(r"\.code \.\w+ \{ color: light-dark\(#(\w+), #(\w+)\)", code_css())
    assert len(pairs) > 30
    for light, dark in pairs:
        assert min(_contrast(light, "f4f2ec"), _contrast(dark, "1b2020")) >= CONTRAST
    for language in ("nonsense", "", 'html"><img', "python"):
        code = "<img src=x onerror=alert(1)>\n  </code>\n\n"
        plain = re.sub(r"<[^>]*>", "", render(f"```{language}\n{code}```")[0].html)
        assert plain.endswith("&lt;img src=x onerror=alert(1)&gt;\n  &lt;/code&gt;\n")


ATTEMPTS = [
    "<script>window.hurt=1</script>",
    "<img src=x onerror=\"window.hurt=2\">",
    "<svg onload=\"window.hurt=3\"><animate onbegin=window.hurt=3 attributeName=x>",
    "[click](javascript:window.hurt=4) [click](JaVaScRiPt:window.hurt=4) [a](  javascript:window.hurt=4)",
    "[c](data:text/html,<script>window.hurt=5</script>) [c](vbscript:x) [c](file:///etc/passwd)",
    "[c](java\nscript:window.hurt=6) [c](&#106;avascript:window.hurt=6) [c](\x01javascript:window.hurt=6)",
    "![picture](https://elsewhere.test/track.png) ![local](/page/main.js)",
    "![d](data:image/svg+xml,<svg onload=window.hurt=7>) ![j](javascript:window.hurt=7)",
    "<a href=\"javascript:window.hurt=8\">raw</a> <javascript:window.hurt=8>",
    "<https://ok.test/\"onmouseover=\"window.hurt=9> https://ok.test/\"onmouseover=window.hurt=9",
    "[t](https://ok.test \"a\\\" onmouseover=\\\"window.hurt=10\") [t](<https://ok.test/' onclick='window.hurt=10>)",
    "[user@](https://bank.test@evil.test/) [a](//evil.test) [b](\\\\evil.test) [c](#key=x)",
    "| <img src=x onerror=window.hurt=11> |\n|---|\n| <iframe src=javascript:window.hurt=11> |",
    "| `</code><img src=x onerror=window.hurt=12>` |\n|---|",
    "```html\"><img src=x onerror=window.hurt=13>\n</code></pre><img src=x onerror=window.hurt=13>\n```",
    "```python\n'</span><img src=x onerror=window.hurt=14>' # </code>\n```",
    "# <b onclick=window.hurt=15>h</b> <b>x <b onclick=1>",
    "> <details open ontoggle=window.hurt=16><summary>x",
    "- [x] <style>*{display:none}</style> <link rel=stylesheet href=//evil.test>",
    "$$\\href{javascript:window.hurt=17}{x}$$ $\\text{<img src=x onerror=window.hurt=17>}$",
    "$\\style{background:url(//evil.test)}{x}$ $\\class{x\" onclick=\"1}{y}$ $\\unicode{<script>}$",
    "\\(\\text{</mtext></math><img src=x onerror=window.hurt=18>}\\)",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=window.hurt=19&gt;\">",
    "<sup onclick=window.hurt=20>x</sup> <sup>y</sup onclick=1> <br onload=1> <kbd style=position:fixed>k</kbd>",
    "[^<img src=x onerror=window.hurt=21>]\n\n[^<img src=x onerror=window.hurt=21>]: <script>window.hurt=21</script>",
    "[x]: javascript:window.hurt=22\n\n[x] [y][x]\n\n[z]: https://ok.test \"'onclick=window.hurt=22\"\n\n[z]",
    "{{constructor.constructor('window.hurt=23')()}} ${window.hurt=23} <%= 1 %>",
    "\u202e RTL override \u202c <base href=//evil.test> <meta http-equiv=refresh content=0;url=//evil.test>",
    "<form action=//evil.test><input name=q><button formaction=javascript:window.hurt=24>go</button></form>",
    "&lt;script&gt;window.hurt=25&lt;/script&gt; &#x3c;script&#x3e; <!-- <script>window.hurt=25</script> -->",
]  # fmt: skip


class Seen(HTMLParser):
    """The tags and attributes of some HTML."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


FORBIDDEN = {"script", "img", "svg", "iframe", "style", "link", "base", "meta", "form", "button", "object", "embed",
             "details", "animate", "mglyph", "annotation-xml", "javascript:window.hurt=8"}  # fmt: skip


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_that_is_written_becomes_markup_of_its_own(attempt: str, growing: bool) -> None:
    for text in (attempt, f"> - {attempt}", f"**{attempt}** {attempt}\n\n{attempt}"):
        for block in render(text, growing):
            for tag, attributes in Seen(block.html).tags:
                assert tag not in FORBIDDEN
                assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "id")]
                if tag == "a":
                    assert re.match(r"https://(elsewhere|ok)\.test", attributes["href"] or ""), attributes
                    assert (attributes["target"], attributes["rel"]) == ("_blank", "noopener noreferrer")
                if tag == "input":
                    assert attributes["type"] == "checkbox"


@pytest.mark.parametrize(
    "odd",
    ["*a ", "**a ", "`a ", "``a", "[a", "![", "[a](", "<a", "> ", "- ", "_a", "~~a ", "\\", "|", "#", "***", "https://",
     "1. a\n", "a|b\n-|-\n", "(", "\n>", "  - a\n", "[a](b ", "$a", "$$a ", "\\(", "\\[a\n", "<sup>", "<b>a</b>",
     "[^a", "[^a]: x\n", "&", "\\begin{align}\n", "- [ ] a\n", "a\n===\n", "```````a", "<https://a.b> ", "a@b.c "],
)  # fmt: skip
def test_odd_texts_take_no_longer_than_twice_as_much_for_twice_the_length(odd: str) -> None:
    """A quadratic way through one of them would show, in the calls that are made or in each call's own loops."""

    def seconds(count: int) -> float:
        began = time.process_time()
        render(odd * count)
        render(odd * count, growing=True)
        return time.process_time() - began

    render(odd * 100)
    gc.disable()  # a collection looks at everything that this process has, not at the text
    try:
        assert any(seconds(2000) < 12 * seconds(500) + 0.5 for _ in range(3))
    finally:
        gc.enable()


def test_the_renderer_is_a_process_that_is_ended_when_it_takes_too_long() -> None:
    async def ask() -> None:
        renderer = Renderer(seconds=20)
        first, second = await renderer.render([("**a**", False), ("b `c", True)])
        assert first == [{"line": 0, "html": '<p dir="auto"><strong>a</strong></p>'}]
        assert second == [{"line": 0, "html": '<p dir="auto">b <code>c</code></p>'}]
        renderer.seconds = 0.0
        with pytest.raises(NotRendered, match="takes longer than 0 s"):
            await renderer.render([("*a " * 20000, False)])
        renderer.seconds = 20
        (again,) = await renderer.render([("a", False)])
        assert again == [{"line": 0, "html": '<p dir="auto">a</p>'}]
        assert renderer._process is not None
        renderer._process.kill()
        renderer._process.wait()
        assert await asyncio.gather(*(renderer.render([(str(i), False)]) for i in range(20)))

    asyncio.run(ask())


def test_the_start_of_the_renderer_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a slow file system it takes longer than a text may."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(4)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = asyncio.run(Renderer(seconds=3).render([("a", False)]))
    assert found == [[{"line": 0, "html": '<p dir="auto">a</p>'}]]
