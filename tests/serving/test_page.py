"""The chat page in a headless browser, used as people use it."""

import re
import threading
import time

import pytest
from accessible import assert_accessible

from serving import schema

expect = pytest.importorskip("playwright.sync_api").expect

TOOL_ANSWER = ["That is ", ("python", "12 * "), ("python", "37"), ("python_output", "444"), " eggs."]
TOOL_PARTS = [
    {"type": "text", "text": "That is "},
    {"type": "python", "text": "12 * 37"},
    {"type": "python_output", "text": "444"},
    {"type": "text", "text": " eggs."},
]


def send(page, text: str, wait: bool = True) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    if wait:
        finished(page)


def finished(page) -> None:
    page.locator(".assistant[aria-busy=false]").last.wait_for()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def wait_for_cancel(scripted) -> None:
    deadline = time.monotonic() + 10
    while scripted.script.cancelled == 0:
        assert time.monotonic() < deadline, "the service still streams to a page that does not read"
        time.sleep(0.02)


def answers(page) -> list[str]:
    return page.locator(".assistant .body").all_inner_texts()


def questions(page) -> list[str]:
    return page.locator(".bubble").all_inner_texts()


def test_conversation_outlives_reload_until_deleted(service, page):
    page.goto(service)
    page.get_by_label("Your message").fill("What is a fox?")
    page.get_by_role("button", name="Send").click()
    finished(page)
    expect(page.locator(".stats").last).to_contain_text(re.compile(r"to first token.* tokens?"))
    send(page, "And a hen?")
    before = answers(page)
    assert len(before) == 2
    page.reload()
    assert questions(page) == ["What is a fox?", "And a hen?"] and answers(page) == before
    page.get_by_role("link", name="What is a fox?").hover()
    page.get_by_role("button", name="Delete conversation: What is a fox?").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(0)
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation'))") == []


def test_text_appears_as_it_comes(scripted, page):
    rest = threading.Event()
    scripted.script.answer = ["one ", "two ", rest, "three"]
    page.goto(scripted.url)
    send(page, "Count", wait=False)
    body = page.locator(".assistant .body")
    expect(body).to_have_text("one two")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    time.sleep(0.25)
    rest.set()
    finished(page)
    assert body.inner_text() == "one two three"
    rate = re.fullmatch(r"(.+) s to first token · (.+) tokens/s · 3 tokens", page.locator(".stats").inner_text())
    assert 0 <= float(rate[1]) < 30 and 0 < float(rate[2]) <= 2 / 0.25


def test_words_that_come_at_once_appear_one_after_another(scripted, page):
    first, rest, words = threading.Event(), threading.Event(), "word " * 60
    scripted.script.answer = ["one ", first, words, rest, "end"]
    page.goto(scripted.url)
    send(page, "Count", wait=False)
    body = page.locator(".assistant .body")
    expect(body).to_have_text("one")
    page.evaluate("""() => {
        const body = document.querySelector(".assistant .body");
        window.lengths = [];
        const look = () => lengths.push(body.textContent.trim().length);
        new MutationObserver(look).observe(body, { childList: true, subtree: true });
    }""")
    time.sleep(0.3)  # as long as the words took to come, so long they take to appear
    first.set()
    expect(body).to_have_text(("one " + words).strip())
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths) and len(set(lengths)) >= 5, lengths
    rest.set()
    finished(page)
    assert body.inner_text() == "one " + words + "end"


@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_stop_keeps_the_text_and_cancels_the_request(scripted, page, how):
    scripted.script.answer = ["more and ", "more", threading.Event()]
    page.goto(scripted.url)
    send(page, "Talk", wait=False)
    expect(page.locator(".assistant .body")).to_have_text("more and more")
    if how == "Stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_contain_text("stopped")
    wait_for_cancel(scripted)
    scripted.script.answer = ["yes"]
    send(page, "Go on?")
    assert answers(page) == ["more and more", "yes"]
    assert scripted.script.requests[-1]["messages"][1] == {"role": "assistant", "content": "more and more"}


def test_edit_drops_what_followed(scripted, page):
    page.goto(scripted.url)
    send(page, "first")
    send(page, "second")
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit message").first.click()
    page.get_by_label("Edit your message").fill("changed")
    scripted.script.answer = ["another answer"]
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .body")).to_have_text("another answer")
    assert questions(page) == ["changed"]
    assert scripted.script.requests[-1]["messages"] == [{"role": "user", "content": "changed"}]


def test_cancelled_edit_changes_nothing(scripted, page):
    page.goto(scripted.url)
    send(page, "first")
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit message").click()
    page.get_by_label("Edit your message").fill("changed")
    page.keyboard.press("Escape")
    assert questions(page) == ["first"] and len(scripted.script.requests) == 1


def test_regenerate_replaces_the_last_answer(scripted, page):
    page.goto(scripted.url)
    send(page, "first")
    send(page, "second")
    scripted.script.answer = ["another"]
    page.locator(".assistant").last.hover()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .body").last).to_have_text("another")
    assert answers(page) == ["Hello there.", "another"]
    assert scripted.script.requests[-1]["messages"] == scripted.script.requests[-2]["messages"]


def test_request_says_what_the_settings_say(scripted, page):
    page.goto(scripted.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("1.1")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Max tokens").fill("33")
    page.get_by_role("button", name="Done").click()
    page.reload()  # they are kept
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")  # once the service has told its models
    send(page, "Hi")
    assert scripted.script.requests == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "temperature": 1.1,
            "top_k": 7,
            "max_tokens": 33,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top-k").fill("0")  # not a number of tokens: the last good one stays
    page.get_by_label("Max tokens").fill("")
    page.get_by_role("button", name="Done").click()


def test_choice_of_model(scripted, page):
    scripted.script.models = ["d6", "d12"]
    page.goto(scripted.url)
    page.get_by_label("Model", exact=True).select_option("d12")
    page.reload()
    send(page, "Hi")
    assert scripted.script.requests[-1]["model"] == "d12"
    expect(page.locator(".stats")).to_contain_text("d12")


def test_tool_call_is_shown_and_sent_back(scripted, page):
    scripted.script.answer = TOOL_ANSWER
    page.goto(scripted.url)
    send(page, "How many eggs are in 37 boxes?")
    tool = page.locator(".assistant .tool")
    assert tool.locator("code").all_inner_texts() == ["12 * 37", "444"] and "calculator" in tool.inner_text()
    assert page.locator(".assistant p").count() == 1  # the call stands within its sentence
    expect(page.get_by_role("status")).to_have_text("That is calculator: 12 * 37 gives 444.  eggs.")
    page.reload()
    assert tool.locator("code").all_inner_texts() == ["12 * 37", "444"]
    send(page, "Thanks")
    assert scripted.script.requests[-1]["messages"][1] == {"role": "assistant", "content": TOOL_PARTS}


def test_markdown_and_copy(scripted, page):
    text = "# Title\n\n1. *one*\n2. `two`\n\n```python\nprint('<b>')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n![seen](http://127.0.0.1:9/x)"
    scripted.script.answer = [text[i : i + 5] for i in range(0, len(text), 5)]
    page.goto(scripted.url)
    send(page, "Show me")
    body = page.locator(".assistant .body")
    for selector, inside in {
        "h1": "Title",
        "li em": "one",
        "li code": "two",
        "pre": "print('<b>')",
        "td >> nth=1": "2",
        "a": "seen",
    }.items():
        expect(body.locator(selector)).to_have_text(inside)
    page.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')\n"
    page.get_by_role("button", name="Copy answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_text_is_shown_as_typed(scripted, page):
    """Line breaks of both sides, single tildes, GFM's struck text, task lists."""
    scripted.script.answer = [
        "Roses are red,\nviolets blue.\n\nabout ~5 and ~6, not ~~7~~ or ~8~\n\n- [ ] buy\n- [x] eat\n- talk\n"
    ]
    page.goto(scripted.url)
    field = page.get_by_label("Your message")
    field.fill("one\ntwo\n\n  about ~5 and ~6")
    field.press("Enter")
    finished(page)
    assert questions(page) == ["one\ntwo\n\n  about ~5 and ~6"]
    body = page.locator(".assistant .body")
    assert body.inner_text().split("\n\n")[:2] == ["Roses are red,\nviolets blue.", "about ~5 and ~6, not 7 or ~8~"]
    assert body.locator("del").all_inner_texts() == ["7"]
    assert body.locator("li").all_inner_texts() == ["☐ buy", "☑ eat", "talk"]
    styles = body.locator("li").evaluate_all("items => items.map((item) => getComputedStyle(item).listStyleType)")
    assert styles[:2] == ["none", "none"] != styles[2:]
    page.reload()
    assert questions(page) == ["one\ntwo\n\n  about ~5 and ~6"] and body.locator("li").count() == 3


# What is shown of an answer while nothing has come after it, and what then becomes of it.
STREAMED = {
    "heading": (["Over it\n", "-"], " one\n- two", "Over it\n-", "li"),
    "underlined": (["Over it\n", "="], "> so", "Over it\n=", None),
    "number": (["1."], "5 apples", "1.", None),
    "hash": (["#"], "tag", "#", None),
    "star": (["*"], "*bold**", "*", "strong"),
    "half bold": (["so **bo", "ld*"], "* it is", "so **bold*", "strong"),
    "rule": (["---"], " it said", "---", None),
    "table": (["|a|b|\n|-", "|-|"], "\n|1|2|", "|a|b|\n|-|-|", "td >> nth=1"),
    "in code": (["```\na\n-"], "\n```", "a\n-", "pre"),
    "in code of a list": (["- x\n  ```\n  a\n  *"], "\n  ```", "x\na\n*", "pre"),
}


@pytest.mark.parametrize(("pieces", "rest", "shown", "becomes"), STREAMED.values(), ids=STREAMED)
def test_nothing_flashes_while_it_streams(scripted, page, pieces, rest, shown, becomes):
    go_on = threading.Event()
    scripted.script.answer = [*pieces, go_on, rest]
    page.goto(scripted.url)
    send(page, "Go", wait=False)
    body = page.locator(".assistant .body")
    try:
        expect(body).to_have_text(re.compile(re.escape(shown[-1]) + r"\s*$"))
        text = re.sub(r"\s*Copy\s*", "\n", body.inner_text()).strip()
        assert text.split("\n") == shown.split("\n")
        assert body.locator("h1, h2, hr, em").count() == 0
        assert body.locator("li").count() == (1 if "x" in shown else 0)
    finally:
        go_on.set()
    finished(page)
    assert body.locator("h1, h2, hr, em").count() == 0
    if becomes:
        expect(body.locator(becomes).first).to_be_visible()


def test_enter_of_an_input_method_does_not_send(scripted, page):
    """Chrome says isComposing; Safari ends the composition first, and the key that ended it has the code 229."""
    page.goto(scripted.url)
    field = page.get_by_label("Your message")
    field.fill("にほん")
    press = """(field, init) => field.dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...init }))"""
    field.evaluate(press, {"isComposing": True, "keyCode": 229})
    field.evaluate(press, {"isComposing": False, "keyCode": 229})
    field.evaluate(press, {"isComposing": True, "keyCode": 13})
    assert field.input_value() == "にほん" and scripted.script.requests == []
    field.press("Enter")
    finished(page)
    assert questions(page) == ["にほん"]


HOSTILE = {
    "image": "<img src=x onerror='window.pwned = 1'>",
    "remote image": "![see](http://127.0.0.1:9/leak?secret)",
    "script": "before <script>window.pwned = 1</script> after",
    "script block": "<script>\nwindow.pwned = 1\n</script>\n",
    "svg": "<svg onload='window.pwned = 1'><style>*{display:none}</style></svg>",
    "iframe": "<iframe srcdoc='<script>parent.pwned = 1</script>'></iframe>",
    "javascript link": "[click](javascript:window.pwned=1)",
    "disguised link": "[](java\tscript:window.pwned=1) [b](&#106;avascript:window.pwned=1) <javascript:window.pwned=1>",
    "data link": "[click](data:text/html,<script>opener.pwned=1</script>)",
    "reference": "[click][x]\n\n[x]: javascript:window.pwned=1 \"' onmouseover='window.pwned=1\"",
    "attribute": '[a](http://x "\\" onmouseover=\\"window.pwned=1")',
    "code": "```html onload=window.pwned=1\n<img src=x onerror=window.pwned=1>\n```",
    "fence": '```"><img/src/onerror=window.pwned=1>\ntext\n```',
    "marks": "\ue0007\ue001 \ue000x\ue001 <b>\ue0000\ue001</b>",
    "form": "<form action='http://127.0.0.1:9'><button>Log in</button></form>",
}


RAW = {"image", "script", "script block", "svg", "iframe", "form"}  # nothing in them is Markdown: shown to the letter

THREAD = """() => {
  const all = (selector) => [...document.querySelectorAll(`#thread ${selector}`)];
  all("a").forEach((link) => link.dispatchEvent(new MouseEvent("mouseover")));
  return {
    texts: [...all(".bubble"), ...all(".tool code")].map((element) => element.textContent),
    elements: all(":is(img, script, svg, iframe, style, form, input, [onerror], [onload], [onmouseover])").length,
    links: all("a").map((link) => [link.protocol, link.rel]),
    pwned: window.pwned ?? null,
  };
}"""


def test_hostile_text_is_inert(scripted, page):
    """In what the user says (also as the conversation's title), in the answer, in a tool call; shown and reloaded."""
    outside = []
    page.on("request", lambda request: request.url.startswith(scripted.url) or outside.append(request.url))
    for name, text in HOSTILE.items():
        scripted.script.answer = [text, ("python", text), ("python_output", text)]
        page.goto(f"{scripted.url}/#new")
        send(page, text)
        for _ in range(2):
            page.wait_for_timeout(30)  # what runs at all has run
            thread = page.evaluate(THREAD)
            assert set(thread["texts"]) == {text} and len(thread["texts"]) == 3, name
            assert thread["elements"] == 0 and thread["pwned"] is None, name
            if name in RAW:
                assert "".join(answers(page)[0].split()).count("".join(text.split())) == 3, name
            for protocol, rel in thread["links"]:
                assert protocol in ("http:", ":") and rel == "noopener noreferrer", name
            page.reload()
    assert outside == []


def test_policy_forbids_html_from_strings(scripted, browser):
    page = browser.new_page()
    page.goto(scripted.url)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>hello</b>'")
    blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)")
    assert blocked == "Failed to fetch"
    page.context.close()


FAILURES = {
    "error event": (["Well, ", {"error": {"message": "replica died"}}, None], [], "failed while it was"),
    "cut": (["Well, ", None], [], "connection broke"),
    "bad request": ([], [(400, "replica died", {})], "did not accept"),
    "context": ([], [(413, "replica died", {})], "longer than the model can read"),
    "model": ([], [(404, "replica died", {})], "does not have this model"),
    "crash": ([], [(500, "replica died", {})], "error 500"),
    "busy": ([], [(503, "replica died", {})], "is busy"),
    "busy for long": ([], [(429, "replica died", {"Retry-After": "600"})], "in 600 s"),
}


@pytest.mark.parametrize(("answer", "refusals", "words"), FAILURES.values(), ids=FAILURES)
def test_error_in_plain_words_and_again(scripted, page, answer, refusals, words):
    scripted.script.answer, scripted.script.refusals = answer, refusals
    page.goto(scripted.url)
    send(page, "Hi")
    alert = page.locator(".assistant [role=alert]")
    expect(alert).to_contain_text(words)
    if answer != FAILURES["cut"][0]:
        expect(alert).to_contain_text("replica died")
    assert answers(page) == (["Well,"] if answer else [""])
    scripted.script.answer = ["better"]
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".assistant .body")).to_have_text("better")
    assert alert.count() == 0 and questions(page) == ["Hi"]


def test_stream_is_given_up_after_an_error(scripted, page):
    scripted.script.answer = ["Well, ", {"error": {"message": "replica died"}}, threading.Event()]
    page.goto(scripted.url)
    send(page, "Hi")
    wait_for_cancel(scripted)


def test_unanswered_question_is_sent_with_the_next(scripted, page):
    scripted.script.refusals = [(500, "out of order", {})]
    page.goto(scripted.url)
    send(page, "one")
    send(page, "two")
    assert scripted.script.requests[-1]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]


def test_busy_service_is_asked_again_when_it_said(scripted, page):
    scripted.script.refusals = [(429, "queue full", {"Retry-After": "2"}), (503, "queue full", {"Retry-After": "0"})]
    page.goto(scripted.url)
    began = time.monotonic()
    send(page, "Hi", wait=False)
    expect(page.locator(".waiting")).to_contain_text("Trying again in")
    finished(page)
    assert time.monotonic() - began >= 3 and len(scripted.script.requests) == 3  # never sooner than after a second
    assert answers(page) == ["Hello there."] and page.locator("[role=alert]:visible").count() == 0


def test_service_that_is_not_there(scripted, page):
    page.goto(scripted.url)
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    send(page, "Hi")
    expect(page.locator(".assistant [role=alert]")).to_contain_text("can’t be reached")
    page.reload()
    expect(page.locator("#notice")).to_contain_text("can’t be reached")
    page.unroute("**/v1/**")
    page.locator("#notice").get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_hidden()


def test_api_key_is_asked_for_and_kept_with_the_tab_only(scripted, page, context):
    scripted.script.key = "secret-key"
    page.goto(scripted.url)
    page.get_by_role("button", name="Open settings").click()
    page.get_by_label("API key").fill("secret-key")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#notice")).to_be_hidden()
    send(page, "Hi")
    assert answers(page) == ["Hello there."]
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")
    another = context.new_page()
    another.goto(scripted.url)
    expect(another.locator("#notice")).to_contain_text("API key")


def test_phone_has_no_horizontal_scroll(scripted, page):
    page.set_viewport_size({"width": 360, "height": 640})
    wide = "x" * 300
    scripted.script.answer = [
        f"{wide}\n\n```\n{wide}\n```\n\n|{'a|' * 30}\n|{'-|' * 30}\n",
        ("python", wide),
        ("python_output", wide),
    ]
    page.goto(scripted.url)
    send(page, wide)

    def widths() -> list[int]:
        within = "e => e.scrollWidth - e.clientWidth"
        return [page.locator(selector).evaluate(within) for selector in ("html", "#scroller", "#sidebar")]

    assert widths() == [0, 0, 0]
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    assert widths() == [0, 0, 0]
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_keyboard_alone(scripted, page):
    page.goto(scripted.url)
    keys = page.keyboard
    skip = page.get_by_role("link", name="Skip to the message field")
    while not skip.evaluate("e => e === document.activeElement"):
        keys.press("Shift+Tab")  # it is the first thing of the page
    expect(skip).to_be_in_viewport()
    keys.press("Enter")
    keys.type("two")
    keys.press("Shift+Enter")
    keys.type("lines")
    keys.press("Enter")
    finished(page)
    assert questions(page) == ["two\nlines"]
    assert page.evaluate("document.activeElement.id") == "question"
    seen = []
    for _ in range(14):  # backwards through everything that can be reached, once around
        keys.press("Shift+Tab")
        focused = page.evaluate(
            """() => {
              const e = document.activeElement, style = getComputedStyle(e);
              return e === document.body ? null : [e.ariaLabel || e.textContent, style.outlineStyle];
            }"""
        )
        if focused is None:
            break
        seen.append(focused)
    names = [name for name, _ in seen]
    assert ["Regenerate", "Copy answer", "Edit message", "Copy message", "Settings"] == names[:5]
    assert {"New conversation", "Delete all conversations", "Delete conversation: two"} <= set(names)
    assert {outline for _, outline in seen} <= {"solid", "auto"}


def test_finished_answers_are_announced_not_each_token(scripted, page):
    scripted.script.answer, scripted.script.delay = ["one ", "two ", "three"], 0.05
    page.goto(scripted.url)
    page.evaluate(
        """() => {
          window.said = [];
          const status = document.querySelector("[role=status]");
          new MutationObserver(() => said.push(status.textContent)).observe(status, {childList: true});
        }"""
    )
    send(page, "Count")
    assert page.evaluate("said") == ["Answering", "one two three"]
    assert page.get_by_role("log").get_attribute("aria-live") == "off"
    for landmark in ("main", "navigation", "banner"):
        assert page.get_by_role(landmark).count() == 1
    unnamed = "e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)"
    assert not any(e.evaluate(unnamed) for e in page.locator("button, a, input, textarea, select").all())


def test_answers_go_on_in_the_background(scripted, page):
    rest = threading.Event()
    scripted.script.answer = ["one ", rest, "two ", "three"]
    page.goto(scripted.url)
    send(page, "Count", wait=False)
    expect(page.locator(".assistant .body")).to_have_text("one")
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    rest.set()
    page.get_by_role("link", name="Count").click()
    finished(page)
    assert answers(page) == ["one two three"]


def test_half_an_answer_outlives_reload(scripted, page):
    scripted.script.answer = ["more and ", "more", threading.Event()]
    page.goto(scripted.url)
    send(page, "Talk", wait=False)
    expect(page.locator(".assistant .body")).to_have_text("more and more")
    page.reload()
    assert answers(page) == ["more and more"]
    expect(page.locator(".stats")).to_contain_text("stopped")


def test_tabs_share_conversations(scripted, page, context):
    page.goto(scripted.url)
    another = context.new_page()
    another.goto(scripted.url)
    page.bring_to_front()
    send(page, "From the first tab")
    another.bring_to_front()
    another.get_by_role("link", name="From the first tab").click()
    assert answers(another) == ["Hello there."]
    page.bring_to_front()
    page.get_by_role("button", name="Delete all conversations").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(another.locator("#conversations li")).to_have_count(0)
    expect(another.locator("#welcome")).to_be_visible()


def test_the_pages_are_accessible(scripted, page):
    """Empty, with an answer of all parts, and the API's description."""
    scripted.script.answer = [*TOOL_ANSWER, "\n\n```python\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"]
    page.goto(scripted.url)
    assert_accessible(page)
    send(page, "How many eggs?")
    assert_accessible(page)
    page.goto("about:blank")
    page.set_content(schema.page())
    assert_accessible(page)
