"""What the chat page does when its server refuses, breaks off, loads, ends or asks for a key."""

import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser import (
    MODEL,
    FakeServer,
    Page,
    refuses,
    says,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first one may have to install the browser


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
    page.script("(await import('/page/server.js')).server.patience = 3")
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
    fake.answers = [refuses(503, Retry_After="5"), says("Good morning.")]
    page.say("Anybody there?")
    page.wait_for("The model is still loading, trying again in 5 s")
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
