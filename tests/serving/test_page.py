"""The page, as files and in a real browser: headless Chromium, driven from outside as somebody would use it."""

import json
import os
import re
import shutil
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATHS = {
    "/": "text/html",
    "/page/page.css": "text/css",
    "/page/page.js": "text/javascript",
    "/page/icon.svg": "image/svg+xml",
}
LIMIT_BYTES = 40_000
SCENE = 5003  # wider than high, with a number on a heart that is too small to be read at first sight
HACK = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
KEY = "sesame"
Open = Callable[..., Any]


# ---- servers and browsers


class TalkingEngine:
    """Does nothing but talk, or refuse: for what the page makes of it."""

    def __init__(self) -> None:
        self.said: tuple[str, ...] = ()
        self.error: Exception | None = None
        self.endless = self.closed = False
        self.state = "ready"

    async def start(self) -> None:
        pass

    async def stop(self, grace: float) -> None:
        pass

    async def models(self) -> tuple[Any, ...]:
        from qr_integrations.serving.work import ModelCard

        if self.state != "ready":
            return ()
        return (ModelCard("talker", ranks=True, chats=True, sees_pictures=False),)

    async def rank(self, work: Any) -> Any:
        from qr_integrations.reranking import Relevance
        from qr_integrations.serving.work import Ranked

        if self.error is not None:
            raise self.error
        places = range(len(work.documents))
        relevances = [Relevance(place, 0.5, 0.01, "share", place + 1, truncated=place == 0) for place in places]
        return Ranked(tuple(relevances), 10, self.said)

    async def chat(self, work: Any) -> Any:
        raise NotImplementedError

    async def stream(self, work: Any) -> AsyncIterator[Any]:
        import asyncio

        from qr_integrations.serving.work import Said
        from qr_integrations.types import Usage

        try:
            for piece in self.said:
                yield piece
            if self.error is not None:
                raise self.error
            while self.endless:
                await asyncio.sleep(0.02)
                yield "and "
            yield Said("".join(self.said), "length", Usage(7, 3))
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def talker() -> TalkingEngine:
    return TalkingEngine()


@pytest.fixture(scope="module")
def talker_url(serving: Any, talker: TalkingEngine) -> Iterator[str]:
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini"), talker) as url:
        yield url


@pytest.fixture
def talking(talker: TalkingEngine) -> TalkingEngine:
    """The engine of `talker_url`, as new."""
    talker.__init__()  # type: ignore[misc]
    return talker


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("needs playwright: pip install playwright")
    found = os.environ.get("QR_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs Chromium: install it, or set QR_CHROMIUM to its program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """``visit(url)`` opens the page. No test may end with errors in its console or requests to other hosts.

    `refusals` are the statuses that the test provokes; what else is named is for the browser's context.
    """
    contexts: list[Any] = []
    complaints: list[str] = []
    asked_of: list[str] = []
    expected: set[int] = set()
    own = ["data:", "blob:"]

    def said(message: Any) -> None:
        status = re.search(r"responded with a status of (\d+)", message.text)
        if message.type in ("error", "warning") and not (status and int(status[1]) in expected):
            complaints.append(message.text)

    def visited(url: str, refusals: tuple[int, ...] = (), wait: str = "Serving", **options: Any) -> Any:
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        expected.update(refusals)
        page.on("console", said)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked_of.append(request.url))
        own.append(f"{url}/")
        page.goto(url)
        has(page, "#server", wait)
        return page

    yield visited
    for context in contexts:
        context.close()
    assert not complaints
    assert asked_of and all(address.startswith(tuple(own)) for address in asked_of)


def has(page: Any, selector: str, text: str) -> None:
    """Wait until an element shows a text."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=15_000)


def rank(page: Any, query: str, documents: str) -> None:
    page.fill("#query", query)
    page.fill("#documents", documents)
    page.click("#rank-button")


def ranked(page: Any) -> list[int]:
    """Which documents the page shows, best first."""
    has(page, "#rank-status", "ranked in")
    return [int(item.get_attribute("data-index")) for item in page.locator("#ranking > li").all()]


def asked(page: Any, question: str) -> str:
    """The events of an answer, as they came."""
    page.fill("#question", question)
    with page.expect_response("**/v1/chat/completions") as answered:
        page.click("#ask-button")
    has(page, "#ask-status", "Answered in")
    return str(answered.value.text())


def told_at_the_end(events: str) -> dict[str, Any]:
    """What the chunk with the reason why the answer ended says besides."""
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    (last,) = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    return dict(last)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn scene; "which number is on the red heart ?" is 4."""
    from qr_integrations.evaluation.drawn_world import held_out_scene, render, resized

    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    render(resized(held_out_scene(SCENE), 0, 0.08)).save(path)
    return path


# ---- the files


@pytest.mark.parametrize("path", PATHS)
def test_files_have_their_types_and_are_sent_once(path: str, talker_url: str) -> None:
    whole = httpx.get(talker_url + path)
    assert whole.status_code == 200 and whole.content
    assert whole.headers["content-type"].partition(";")[0] == PATHS[path]
    head = httpx.head(talker_url + path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", whole.headers["etag"])
    assert head.headers["content-length"] == str(len(whole.content))
    for tag in (whole.headers["etag"], f'"other", W/{whole.headers["etag"]}'):
        again = httpx.get(talker_url + path, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(talker_url + path, headers={"If-None-Match": '"other"'}).status_code == 200
    assert whole.headers["cache-control"] == "no-cache"


def test_the_page_is_small_and_may_load_nothing_from_elsewhere(talker_url: str) -> None:
    answers = [httpx.get(talker_url + path) for path in PATHS]
    assert sum(len(answer.content) for answer in answers) < LIMIT_BYTES
    policy = answers[0].headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert not re.search(r"(src|href)=\"(https?:)?//|style=|\son\w+=", answers[0].text)


def test_examples_are_the_questions_that_ship_with_the_package(talker_url: str) -> None:
    from qr_integrations.bundled import read_sample

    sample = read_sample()
    last = httpx.get(f"{talker_url}/page/examples/questions/{len(sample) - 1}").json()
    assert last["query"] == sample[-1].question and last["of"] == len(sample) and "CC BY-SA" in last["source"]
    assert [one["text"] for one in last["documents"]] == [one.text for one in sample[-1].documents]
    for beyond in (len(sample), -1):
        assert httpx.get(f"{talker_url}/page/examples/questions/{beyond}").status_code == 404


def test_example_pictures_come_with_a_question(talker_url: str) -> None:
    first = httpx.get(f"{talker_url}/page/examples/pictures/0").json()
    kind, _, data = first["picture"].partition(",")
    assert kind == "data:image/png;base64" and first["question"].endswith("?")
    assert Image.open(BytesIO(b64decode(data))).size > (100, 100)
    assert httpx.get(f"{talker_url}/page/examples/pictures/{first['of']}").status_code == 404


# ---- ranking


def test_an_example_is_ranked_and_its_words_are_marked(visit: Open, server_url: str) -> None:
    from qr_integrations.bundled import read_sample

    page = visit(server_url)
    page.click("#rank-example")
    has(page, "#documents-count", "20 documents")
    with page.expect_response("**/v1/rerank") as response:
        page.click("#rank-button")
    results = response.value.json()["results"]
    query = page.input_value("#query")
    gold = next(one.gold for one in read_sample() if one.question == query)
    order = ranked(page)
    assert order == [result["index"] for result in results] and order[0] == gold
    has(page, "#rank-status", "Scores are shares of this list.")
    for item, result in zip(page.locator("#ranking > li").all(), results, strict=True):
        spans = sorted(result["qr_spans"], key=lambda span: span["start"])
        marks = "".join(mark.text_content() for mark in item.locator("mark").all())
        assert marks == "".join(span["text"] for span in spans).replace("\n", "")  # a title ends where its line does
        shown = item.locator(".title").text_content() + "\n" + item.locator(".text").text_content()
        assert shown == result["document"]["text"]
        assert item.locator(".score").text_content() == f"{result['relevance_score']:.3f}"
    assert any(result["qr_spans"] for result in results)


def test_marks_are_stronger_for_more_of_the_score_and_count_as_python_does(visit: Open, server_url: str) -> None:
    page = visit(server_url)
    with page.expect_response("**/v1/rerank") as response:
        rank(
            page, "who wrote dracula", "🦇🦇🦇 Dracula is a novel by Bram Stoker. 🦇\n\n🐈 Cats sleep most of the day."
        )
    (first, *_) = response.value.json()["results"]
    assert ranked(page)[0] == first["index"] == 0
    marks = page.locator("#ranking > li").first.locator("mark").all()
    spans = sorted(first["qr_spans"], key=lambda span: span["start"])
    assert [mark.text_content() for mark in marks] == [span["text"] for span in spans]
    strengths = [float(mark.evaluate("mark => mark.style.getPropertyValue('--strength')")) for mark in marks]
    assert strengths.index(max(strengths)) == max(range(len(spans)), key=lambda place: spans[place]["score"])
    assert min(strengths) >= 0.0 and max(strengths) == 1.0


def test_what_is_in_a_document_is_shown_and_not_run(visit: Open, server_url: str) -> None:
    page = visit(server_url)
    rank(page, f"what is this {HACK}", f"{HACK} is a line.\n\n<b>Title</b>\n{HACK}")
    assert sorted(ranked(page)) == [0, 1]
    assert HACK in page.inner_text("#ranking li[data-index='0'] .text")
    assert page.inner_text("#ranking li[data-index='1'] .title") == "<b>Title</b>"
    assert page.locator("#ranking").locator("img, script, b").count() == 0
    assert page.title() == "qr-integrations"


def test_notes_and_cut_documents_are_told(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    talking.said = (f"read in two parts {HACK}",)
    page = visit(talker_url)
    rank(page, "a query", "one\n\ntwo")
    assert ranked(page) == [0, 1]
    assert page.locator("#rank-notes li").all_text_contents() == list(talking.said)
    assert page.locator("#ranking > li").nth(0).locator(".tag").inner_text() == "cut to fit"
    assert page.locator("#ranking > li").nth(1).locator(".tag").count() == 0


def test_files_bring_documents_and_a_query(visit: Open, talker_url: str, tmp_path: Path) -> None:
    page = visit(talker_url)
    (tmp_path / "notes.txt").write_text("first\r\nstill first\r\n\r\n\r\nsecond\r\n")
    page.set_input_files("#documents-files", tmp_path / "notes.txt")
    has(page, "#documents-count", "2 documents")
    rows = [{"query": "who", "documents": ["a\n\nb", {"title": "T", "text": "c"}]}, "d"]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    page.set_input_files("#documents-files", tmp_path / "list.jsonl")
    has(page, "#documents-count", "3 documents")
    assert page.input_value("#documents") == "a\nb\n\nT\nc\n\nd" and page.input_value("#query") == "who"
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"nothing": 1}\n')
    page.set_input_files("#documents-files", tmp_path / "bad.jsonl")
    has(page, "#rank-error", "bad.jsonl, line 2")


def test_files_are_dropped_on_the_documents(visit: Open, talker_url: str) -> None:
    page = visit(talker_url)
    dropped = page.evaluate_handle(
        "() => { const d = new DataTransfer(); d.items.add(new File(['one\\n\\ntwo'], 'notes.txt')); return d; }"
    )
    page.dispatch_event("#documents", "drop", {"dataTransfer": dropped})
    has(page, "#documents-count", "2 documents")


# ---- pictures

PEAK = """() => {
  const { width, height } = document.getElementById("heat");
  const { data } = document.getElementById("heat").getContext("2d").getImageData(0, 0, width, height);
  const opacity = Array.from({ length: width * height }, (_, place) => data[4 * place + 3]);
  const highest = opacity.reduce((one, other) => Math.max(one, other));
  const places = opacity.flatMap((value, place) => (value === highest ? [place] : []));
  const mean = (numbers) => numbers.reduce((one, other) => one + other, 0) / numbers.length;
  return [highest, mean(places.map((p) => p % width)) / width, mean(places.map((p) => Math.floor(p / width))) / height];
}"""


def strongest_cell(heat: dict[str, Any]) -> tuple[float, float]:
    """Where its middle is, as shares of the picture's width and height."""
    (width, height), (left, top, right, bottom), rows = heat["image_size"], heat["covers"], heat["values"]
    _, row, column = max((value, y, x) for y, values in enumerate(rows) for x, value in enumerate(values))
    across = left + (column + 0.5) / len(rows[0]) * (right - left)
    down = top + (row + 0.5) / len(rows) * (bottom - top)
    return across / width, down / height


def test_a_picture_is_asked_and_shows_where_the_model_looked(visit: Open, server_url: str, picture: Path) -> None:
    page = visit(server_url)
    page.set_input_files("#picture-file", picture)
    page.wait_for_selector("#picture")
    told = told_at_the_end(asked(page, "which number is on the red heart ?"))
    assert page.text_content("#answer") == "4"
    (look,) = told["qr_steps"]["crop"]
    (heat,) = told["qr_heat_maps"]
    shown = page.locator("#picture").bounding_box()
    scale = shown["width"] / heat["image_size"][0]
    box = page.locator("#box").bounding_box()
    left, top, right, bottom = (edge * scale for edge in look["box"])
    found = (box["x"] - shown["x"], box["y"] - shown["y"], box["width"], box["height"])
    assert found == pytest.approx((left, top, right - left, bottom - top), abs=1.5)
    opacity, across, down = page.evaluate(PEAK)
    assert opacity > 200 and (across, down) == pytest.approx(strongest_cell(heat), abs=0.02)
    facts = page.inner_text("#facts")
    assert f"{look['lift']:.2f}" in facts
    assert f"{look['box'][2] - look['box'][0]} × {look['box'][3] - look['box'][1]} pixels" in facts


def test_the_heat_map_fades_and_goes(visit: Open, server_url: str) -> None:
    page = visit(server_url)
    page.click("#picture-example")
    page.wait_for_selector("#picture")
    asked(page, page.input_value("#question"))
    assert page.text_content("#answer") == "milk"
    page.fill("#heat-opacity", "20")
    assert page.locator("#heat").evaluate("heat => getComputedStyle(heat).opacity") == "0.2"
    assert "Heat map: it looked most at" in page.get_attribute("#heat", "aria-label")
    page.uncheck("#heat-shown")
    assert not page.is_visible("#heat") and not page.is_visible("#box")
    page.check("#heat-shown")
    assert page.is_visible("#heat") and page.is_visible("#box")
    page.click("#picture-remove")
    assert not page.is_visible("#stage") and not page.is_visible("#said") and not page.is_visible("#ways")


def test_ways_to_look_can_be_chosen(visit: Open, server_url: str, picture: Path) -> None:
    page = visit(server_url)
    page.set_input_files("#picture-file", picture)
    page.wait_for_selector("#picture")
    page.uncheck("#crop")
    page.check("#deco")
    page.check("#prune")
    told = told_at_the_end(asked(page, "what color is the heart ?"))
    assert page.text_content("#answer") == "red"
    assert set(told["qr_steps"]) == {"prune", "deco"}
    assert "50 of 100 tokens" in page.inner_text("#facts") and "Earlier layers changed" in page.inner_text("#facts")
    assert not page.is_visible("#heat") and not page.is_visible("#box")


def test_pictures_are_pasted_and_dropped(visit: Open, server_url: str) -> None:
    page = visit(server_url)
    make = """async () => {
      const canvas = document.createElement("canvas");
      const blob = await new Promise((resolve) => canvas.toBlob(resolve));
      const given = new DataTransfer();
      given.items.add(new File([blob], "drawn.png", { type: "image/png" }));
      return given;
    }"""
    give = """([given, target, kind, event, name]) => document.querySelector(target).dispatchEvent(
      new window[kind](event, { [name]: given, bubbles: true }))"""
    events = (
        ("#question", "ClipboardEvent", "paste", "clipboardData"),
        ("#frame", "DragEvent", "drop", "dataTransfer"),
    )
    for event in events:
        page.evaluate(give, [page.evaluate_handle(make), *event])
        page.wait_for_selector("#picture")
        page.click("#picture-remove")


def test_what_is_no_picture_is_told(visit: Open, server_url: str, tmp_path: Path) -> None:
    page = visit(server_url)
    (tmp_path / "no.png").write_text("no picture")
    page.set_input_files("#picture-file", tmp_path / "no.png")
    has(page, "#ask-error", "no picture that the browser can show")
    assert not page.is_visible("#stage")


def test_without_sight_there_is_text_and_a_command(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    talking.said = ("hello ", HACK)
    page = visit(talker_url)
    assert "qr-integrations serve --model qr-mini --vision-model qr-mini-vl" in page.inner_text("#ask-none")
    assert not page.is_visible("#picture-part") and not page.is_visible("#model-part")
    asked(page, "hi")
    assert page.text_content("#answer") == f"hello {HACK}"
    assert page.locator("#answer").locator("img, script").count() == 0 and page.title() == "qr-integrations"
    assert "read 7 tokens and wrote 3" in page.inner_text("#facts") and "was cut" in page.inner_text("#facts")


def test_stop_ends_the_answer_on_the_server_too(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    talking.endless = True
    page = visit(talker_url)
    page.fill("#question", "tell me everything")
    page.click("#ask-button")
    has(page, "#answer", "and and")
    page.click("#ask-stop")
    has(page, "#ask-status", "Stopped.")
    for _ in range(100):
        if talking.closed:
            break
        page.wait_for_timeout(20)
    assert talking.closed and page.is_enabled("#ask-button") and not page.is_visible("#ask-stop")


# ---- what goes wrong


def test_refusals_are_put_into_words(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    from qr_integrations.serving.refusals import Overloaded

    page = visit(talker_url, refusals=(429, 500))
    talking.error = Overloaded("the queue is full", retry_after=3.0)
    rank(page, "a query", "a document")
    has(page, "#rank-error", "too much to do just now: the queue is full. Try again in 3 seconds.")
    talking.error = RuntimeError("secret")
    page.click("#rank-button")
    has(page, "#rank-error", "The server failed: internal error")
    assert "secret" not in page.content()
    talking.error = None
    page.click("#rank-button")
    assert ranked(page) == [0] and not page.is_visible("#rank-error")


def test_an_answer_that_breaks_off_says_so(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    from qr_integrations.errors import InputError

    talking.said, talking.error = ("half an ",), InputError("there is no more: ask again")
    page = visit(talker_url)
    page.fill("#question", "hi")
    page.click("#ask-button")
    has(page, "#ask-error", "there is no more: ask again.")
    assert page.text_content("#answer") == "half an " and page.is_enabled("#ask-button")


def test_models_that_are_not_there_yet_are_waited_for(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    talking.state = "loading"
    page = visit(talker_url, refusals=(503,), wait="Loading the models")
    assert not page.is_visible("#ask-form")
    talking.state = "ready"
    has(page, "#server", "Serving talker")
    assert page.is_visible("#ask-form")


def test_a_server_that_is_gone_is_told(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    page = visit(talker_url)
    page.evaluate("() => { window.fetch = () => Promise.reject(new TypeError('Failed to fetch')); }")
    rank(page, "a query", "a document")
    has(page, "#rank-error", "cannot be reached")


def test_a_key_is_asked_for_and_kept_only_if_wanted(visit: Open, serving: Any, talking: TalkingEngine) -> None:
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini", api_keys=(KEY,)), talking) as url:
        page = visit(url, refusals=(401,), wait="asks for an API key")
        assert page.evaluate("() => document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        has(page, "#server", "does not know this key")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        has(page, "#server", "Serving talker")
        assert not page.is_visible("#key-form")
        assert page.evaluate("() => sessionStorage.length + localStorage.length") == 0
        rank(page, "a query", "a document")
        assert ranked(page) == [0]
        page.reload()
        has(page, "#server", "asks for an API key")
        rank(page, "a query", "a document")
        has(page, "#rank-error", "asks for an API key")
        page.check("#key-keep")
        page.fill("#key", KEY)
        page.click("#key-form button")
        assert ranked(page) == [0]  # what was refused is done once there is a key
        page.reload()
        has(page, "#server", "Serving talker")


def test_too_much_is_not_even_sent(visit: Open, serving: Any, talking: TalkingEngine) -> None:
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini", max_documents=2, max_body_bytes=5000), talking) as url:
        page = visit(url)
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.method))
        rank(page, "a query", "a\n\nb\n\nc")
        has(page, "#rank-error", "2 documents at a time; these are 3")
        rank(page, "a query", "a" * 6000)
        has(page, "#rank-error", "This is 6 kB; the server takes 5 kB.")
        assert "POST" not in sent


# ---- for everybody


def test_it_can_be_used_with_the_keyboard_alone(visit: Open, talker_url: str, talking: TalkingEngine) -> None:
    page = visit(talker_url)

    def focused() -> str:
        return str(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))

    page.keyboard.press("Tab")
    assert focused() == "Skip to ranking" and page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    for wanted, typed in (("query", "a query"), ("documents", "one"), ("rank-button", None)):
        page.keyboard.press("Tab")
        assert focused() == wanted
        if typed:
            page.keyboard.type(typed)
    page.keyboard.press("Enter")
    assert ranked(page) == [0] and focused() == "rank-button"
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.tagName") == "SUMMARY"
    assert page.locator("#ranking details").evaluate("details => details.open")
    page.keyboard.press("Enter")
    assert not page.locator("#ranking details").evaluate("details => details.open")
    page.focus("#documents")
    page.keyboard.press("Control+End")
    page.keyboard.type("\n\ntwo")
    page.keyboard.press("Control+Enter")
    has(page, "#rank-status", "2 documents ranked")


OUTLINE = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const named = (e) => e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim();
  const references = all("*").flatMap((e) => ["aria-labelledby", "aria-describedby", "for"].flatMap(
    (name) => (e.getAttribute(name) ?? "").split(" ").filter(Boolean)));
  const ids = all("[id]").map((e) => e.id);
  return {
    language: document.documentElement.lang,
    landmarks: ["header", "nav", "main"].map((name) => all(`body ${name}`).length),
    unnamed: all("input, textarea, select, button, canvas, summary").filter((e) => !named(e)).map((e) => e.outerHTML),
    pictures: all("img:not([alt])").length,
    headings: all("h1, h2, h3, h4").map((e) => Number(e.tagName[1])),
    lost: references.filter((id) => !ids.includes(id)),
    twice: ids.filter((id, place) => ids.indexOf(id) !== place),
    live: all("[role=status], [role=alert], [aria-live]").length,
    small: all("button, summary, nav a").map((e) => e.getBoundingClientRect()).filter(
      (box) => box.width && Math.min(box.width, box.height) < 24).length,
    jumps: all("[tabindex]").filter((e) => e.tabIndex > 0).length,
  };
}"""


def test_everything_has_a_name_and_a_place(visit: Open, server_url: str) -> None:
    page = visit(server_url)
    rank(page, "who wrote dracula", "Dracula is a novel by Bram Stoker.\n\nCats sleep.")
    ranked(page)
    outline = page.evaluate(OUTLINE)
    headings = outline.pop("headings")
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(lower - upper <= 1 for upper, lower in pairwise(headings))
    assert outline.pop("live") >= 6
    assert outline == {
        "language": "en",
        "landmarks": [1, 1, 1],
        "unnamed": [],
        "pictures": 0,
        "lost": [],
        "twice": [],
        "small": 0,
        "jumps": 0,
    }


COLOURS = """(selector) => {
  const element = document.querySelector(selector);
  const grounds = [];
  for (let e = element; e; e = e.parentElement) grounds.push(getComputedStyle(e).backgroundColor);
  return [getComputedStyle(element).color, grounds];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(scheme: str, visit: Open, server_url: str) -> None:
    page = visit(server_url, color_scheme=scheme)
    rank(page, "who wrote dracula", "Dracula is a novel by Bram Stoker.\n\nCats sleep.")
    ranked(page)
    page.evaluate("() => { for (const e of document.querySelectorAll('[hidden]')) e.hidden = false; }")
    texts = ("h1", ".lead", "#server", "nav a", "#query", ".hint", "#rank-example", "#rank-button", "#rank-status")
    more = (".alert", ".place", ".title", ".score", ".text", "mark", ".tag", "h3", "#facts", "#frame-hint")
    low = {}
    for selector in (*texts, *more):
        if page.locator(selector).count():
            ink, grounds = page.evaluate(COLOURS, selector)
            low[selector] = contrast(ink, grounds)
    assert {"mark", ".alert", "#rank-button"} <= set(low)
    assert not {selector: round(value, 2) for selector, value in low.items() if value < 4.5}


def contrast(ink: str, grounds: list[str]) -> float:
    """Of a colour over what lies below it, from the element itself outwards, as WCAG 2 defines it."""
    below = (1.0, 1.0, 1.0)
    for ground in reversed(grounds):
        *colour, opacity = rgba(ground)
        below = tuple(opacity * new + (1 - opacity) * old for new, old in zip(colour, below, strict=True))
    lighter, darker = sorted([luminance(rgba(ink)[:3]), luminance(below)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def rgba(colour: str) -> tuple[float, ...]:
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
    return (*(number / 255 for number in numbers[:3]), numbers[3] if len(numbers) > 3 else 1.0)


def luminance(colour: tuple[float, ...]) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_fits_on_narrow_screens_and_keeps_still(visit: Open, server_url: str) -> None:
    page = visit(server_url, viewport={"width": 320, "height": 640}, reduced_motion="reduce")
    rank(page, "who wrote dracula", f"{'Dracula' * 40} is a novel.\n\nCats sleep.")
    ranked(page)
    page.click("#picture-example")
    page.wait_for_selector("#picture")
    asked(page, page.input_value("#question"))
    assert page.evaluate("() => document.documentElement.scrollWidth") == 320
    assert page.evaluate("() => getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    moving = "() => document.getAnimations().length"
    page.locator("#answer").evaluate("answer => answer.setAttribute('aria-busy', 'true')")
    assert page.evaluate(moving) == 0
