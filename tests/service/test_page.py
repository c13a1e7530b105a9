"""The search page in a real browser, over a gateway whose worker, index and store the test controls."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from gateway_harness import TOPICS, GatewayBench
from protocols.encoding import decode
from protocols.events import ImageNew, RerankRequest, RerankResponse, WordSimilarities
from protocols.source_position import SourcePosition
from protocols.thumbnail import encode_thumbnail, thumbnail_key
from skipping import missing
from workers.gateway.api_keys import new_key
from workers.ports import Record

NAMES = [f"img-{number}" for number in range(20)]
#: Folder for the documentation's screenshots, if set.
SCREENSHOTS = os.environ.get("PAGE_SCREENSHOTS")
PHONE = {"width": 360, "height": 740}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (96, 96), (250, 250, 245))
    draw = ImageDraw.Draw(image)
    colour = [(200, 40, 40), (40, 90, 200), (40, 150, 70), (230, 180, 30)][number % 4]
    draw.ellipse((10 + 2 * number, 20, 50 + 2 * number, 60), fill=colour)
    image.save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        missing("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def make() -> Iterator[Callable[..., GatewayBench]]:
    benches: list[GatewayBench] = []

    def build(**options: object) -> GatewayBench:
        bench = GatewayBench(options=options)
        benches.append(bench)
        bench.add_images(*NAMES)
        thumbnails = {
            thumbnail_key(name): encode_thumbnail(picture(number), SourcePosition(1, 1))
            for number, name in enumerate(NAMES)
        }
        bench.store.put_many(thumbnails)
        return bench

    yield build
    for bench in benches:
        bench.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Page]]:
    """Open the page of a gateway; a script error, a foreign request or a policy violation fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_at(bench: GatewayBench, path: str = "/", **options: object) -> Page:
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1200, "height": 850}), **options)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.extend(foreign(request.url, bench)))
        page.on("console", lambda message: complaints.extend(policy_violations(message.text)))
        page.goto(f"http://127.0.0.1:{bench.port}{path}")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []


def foreign(url: str, bench: GatewayBench) -> list[str]:
    is_ours = url.startswith((f"http://127.0.0.1:{bench.port}/", "blob:"))
    return [] if is_ours else [f"a request to {url}"]


def policy_violations(text: str) -> list[str]:
    return [text] if "Content Security Policy" in text else []


def ids(page: Page, section: str) -> list[str | None]:
    return [card.get_attribute("data-id") for card in page.locator(f"#{section} .card").all()]


def ask(page: Page, query: str = "a dog") -> None:
    page.get_by_role("searchbox").fill(query)
    with page.expect_response("**/v1/search"):
        page.get_by_role("button", name="Search").click()


def screenshot(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def test_a_search_shows_both_orders_and_the_moves_between_them(make, open_page):
    bench = make()
    page = open_page(bench)

    ask(page)

    expect(page.locator("#after .card")).to_have_count(12)
    assert ids(page, "before") == NAMES[:12]
    assert ids(page, "after") == list(reversed(NAMES))[:12]
    expect(page.locator("#after .card").first).to_contain_text("▲19")
    expect(page.locator("#status")).to_contain_text("12 of 20 candidates")
    expect(page.locator("#legend")).to_contain_text("ms in all")
    expect(page.locator("#after .card img").first).to_have_js_property("naturalWidth", 96)
    screenshot(page, "search")


def test_an_example_is_a_search(make, open_page):
    page = open_page(make(examples=("a red circle", "a <b>bold</b> & strange one")))

    page.get_by_role("link", name="a <b>bold</b> & strange one").click()

    expect(page.locator("#after .card")).to_have_count(12)
    expect(page.get_by_role("searchbox")).to_have_value("a <b>bold</b> & strange one")


def test_the_address_is_the_state_and_the_buttons_of_the_browser_work(make, open_page):
    bench = make()
    page = open_page(bench)
    ask(page, "a dog")
    page.get_by_label("Order").select_option("reranked")
    expect(page.locator("#before")).to_be_hidden()
    page.locator("#after .card").nth(1).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    address = page.url

    linked = open_page(bench, address.partition(str(bench.port))[2])
    expect(linked.get_by_role("dialog")).to_contain_text("img-18")
    expect(linked.locator("#before")).to_be_hidden()
    expect(linked.get_by_role("searchbox")).to_have_value("a dog")

    page.go_back()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.go_back()
    expect(page.locator("#before")).to_be_visible()


def test_k_sets_how_many_candidates_are_reranked(make, open_page):
    bench = make()
    page = open_page(bench)
    ask(page)

    with page.expect_response("**/v1/search"):
        page.get_by_label("Candidates to rerank").select_option("10")

    expect(page.locator("#status")).to_contain_text("of 12 candidates")  # at least as many as are shown
    assert len(bench.worker.requests[-1].candidates) == 12


def explaining(bench: GatewayBench) -> Callable[[RerankRequest], RerankResponse]:
    def rule(request: RerankRequest) -> RerankResponse:
        response = bench.worker.in_reverse(request)
        if not request.explain:
            return response
        words = [
            WordSimilarities(word="dog", similarities=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
            WordSimilarities(word="beach", similarities=[0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ]
        first = response.results[0].model_copy(update={"explanation": words})
        return response.model_copy(update={"results": [first, *response.results[1:]]})

    return rule


def test_a_picture_opens_large_with_a_map_for_each_word(make, open_page):
    bench = make()
    bench.worker.rule = explaining(bench)
    page = open_page(bench)
    ask(page)

    page.locator("#after .card").first.click()
    page.get_by_role("button", name="beach").click()

    expect(page.locator("#map span")).to_have_count(9)
    opacities = page.locator("#map span").evaluate_all("cells => cells.map(cell => cell.style.background)")
    assert "0.7" in opacities[0]
    assert opacities[1].endswith("0)")
    assert "word=1" in page.url
    screenshot(page, "words")
    page.get_by_role("button", name="beach").click()
    expect(page.locator("#map")).to_be_hidden()


def test_everything_works_from_the_keyboard(make, open_page):
    bench = make()
    bench.worker.rule = explaining(bench)
    page = open_page(bench)

    page.keyboard.type("a dog")
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Enter")
    expect(page.locator("#after .card")).to_have_count(12)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#after') !== null"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.get_by_role("button", name="dog")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#map")).to_be_visible()
    page.keyboard.press("Escape")

    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.id") == "img-19"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(make, open_page, scheme):
    bench = make()
    bench.worker.rule = explaining(bench)
    page = open_page(bench, viewport=PHONE, color_scheme=scheme, has_touch=True)
    ask(page)
    expect(page.locator("#after .card")).to_have_count(12)
    screenshot(page, f"phone-{scheme}")
    page.locator("#after .card").first.tap()
    expect(page.get_by_role("button", name="dog")).to_be_visible()

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 26)") == (scheme == "dark")


def test_an_upload_is_made_small_published_and_watched_until_it_can_be_found(make, open_page):
    bench = make()
    page = open_page(bench)
    large = io.BytesIO()
    Image.effect_noise((2_000, 1_500), 80).convert("RGB").save(large, "PNG")
    page.get_by_text("Add pictures").click()

    page.get_by_label("Choose pictures").set_input_files(
        {"name": "dog.png", "mimeType": "image/png", "buffer": large.getvalue()}
    )
    row = page.locator("#upload-list li")
    expect(row).to_contain_text("failed")  # noise does not become small enough: the sentence says so
    expect(row).to_contain_text("bytes are too many")

    small = io.BytesIO()
    Image.new("RGB", (3_000, 2_000), (10, 120, 200)).save(small, "PNG")
    page.get_by_label("Choose pictures").set_input_files(
        {"name": "sky.png", "mimeType": "image/png", "buffer": small.getvalue()}
    )
    row = page.locator("#upload-list li").nth(1)
    expect(row).to_contain_text("being encoded")
    [record] = bench.broker.log(TOPICS.images_new)
    image = published(record)
    assert image.metadata == {"name": "sky.png"}
    assert Image.open(io.BytesIO(image.data)).size == (1_024, 683)
    bench.add_images(image.image_id)

    expect(row).to_contain_text("can be found")


def published(record: Record) -> ImageNew:
    return decode(ImageNew, record.value, dict(record.headers)["content-type"].decode())


def test_a_worker_that_is_away_leaves_the_first_stages_order_and_a_notice(make, open_page):
    bench = make(timeout_s=0.3)
    bench.worker.rule = bench.worker.never
    page = open_page(bench)

    ask(page)

    expect(page.get_by_role("alert")).to_contain_text("Not reranked")
    assert ids(page, "after") == NAMES[:12]
    screenshot(page, "degraded")


def test_an_index_that_is_away_is_reported_in_a_sentence(make, open_page):
    bench = make()
    page = open_page(bench)
    bench.index.away = True

    ask(page)

    expect(page.get_by_role("alert")).to_contain_text("index of images is not available")
    expect(page.locator("#results")).to_be_hidden()


def test_a_store_that_is_away_shows_names_in_place_of_pictures(make, open_page):
    bench = make()
    bench.store.away = True
    page = open_page(bench)

    ask(page)

    expect(page.locator("#after .card").first).to_contain_text("img-19")


def test_a_slow_reply_shows_that_the_search_goes_on_and_a_new_one_replaces_it(make, open_page):
    bench = make()
    bench.worker.rule = bench.worker.never
    page = open_page(bench)
    page.get_by_role("searchbox").fill("a slow one")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#status")).to_have_text("Searching…")
    bench.eventually(lambda: bench.worker.requests)

    bench.worker.rule = bench.worker.in_reverse
    ask(page, "a quick one")

    expect(page.locator("#after .card")).to_have_count(12)
    bench.eventually(lambda: bench.worker.cancelled)  # the first one's caller has hung up


def test_a_gateway_with_keys_asks_for_one_once(make, open_page):
    key, entry = new_key("me")
    bench = make(api_keys=entry)
    page = open_page(bench)

    page.get_by_label("This gateway needs an API key").fill(key)
    page.get_by_role("button", name="Use it").click()
    ask(page)

    expect(page.locator("#after .card")).to_have_count(12)
    expect(page.locator("#after .card img").first).to_have_js_property("naturalWidth", 96)


def test_hostile_names_and_metadata_are_text(make, open_page):
    hostile = "<img src=x onerror=alert(1)>"
    bench = make()
    bench.add_images(hostile, name="<script>alert(2)</script>")
    page = open_page(bench)
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))

    ask(page)
    page.locator("#before .card", has_text="<script>").click()

    expect(page.get_by_role("dialog")).to_contain_text(hostile)


def test_the_page_needs_nothing_from_other_hosts(make, open_page):
    requested: list[Response] = []
    page = open_page(make())
    page.on("response", lambda response: requested.append(response))
    page.reload()
    page.wait_for_load_state("networkidle")

    assert {response.status for response in requested} == {200}
    [document] = [response for response in requested if response.url.endswith("/")]
    assert "connect-src 'self'" in document.headers["content-security-policy"]
