"""The page in a real browser: typing, streaming, stopping, choosing a patch by mouse and keyboard, errors, three looks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import FOUND, Tab, tab
from nextvec.sampling.generate import generate_texts
from nextvec.sampling.settings import Sampling
from serving import Running, running

if FOUND is None:
    pytest.skip("chromium is not on PATH; the page's contract is tested in test_serve.py", allow_module_level=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("chromium") / "profile") as page:
        yield page


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


def opened(browser: Tab, server: Running) -> Tab:
    browser.complaints.clear()
    browser.requested.clear()
    browser.look()
    browser.open(f"{server.url}/")
    browser.wait("document.querySelector('#model').options.length === 2")
    return browser


def test_text_streams_and_a_patch_tells_its_vote(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    page.type("#prompt", "The quick brown fox ")
    page.type("#candidates", "60")
    page.type("#length", "40")
    page.type("#seed", "3")
    page.click("#write")
    page.wait("document.querySelector('#status').textContent.startsWith('Done')")
    settings = Sampling(0.5, 60, 40, 3)
    for index, name in enumerate(("calm", "baseline")):
        text = generate_texts(server.models[name].model, ["The quick brown fox "], settings)[0]
        assert page.run(f"panes[{index}].patches.map((patch) => patch.text).join('')") == text
        figures = page.run(f"[...panes[{index}].node.querySelectorAll('dd')].map((cell) => cell.textContent)")
        assert all(re.search(r"\d", figure) for figure in figures)
        assert figures[3] == ("40 in 20" if name == "calm" else "40 in 40")
    assert not page.run("document.querySelector('#detail').hidden")
    page.run("panes[0].list.focus()")
    page.press("Home", 36)
    page.press("ArrowRight", 39)
    assert page.run("panes[0].chosen") == 1
    assert page.run("document.querySelector('#detail-title').textContent").startswith("Patch 2 of calm")
    assert page.run("panes[0].list.getAttribute('aria-activedescendant')") == "calm-1"
    votes = page.run(
        "[...document.querySelectorAll('#vote tbody td:nth-child(2)')].map((cell) => Number(cell.textContent))"
    )
    assert sum(votes) == 60
    assert page.run("document.querySelectorAll('#vote tr.chosen').length") == 1
    assert page.run("document.querySelectorAll('.strip rect').length") == 8
    spelled = [page.run(f"quoted({text})") for text in (r"' a  b\n  '", "''")]
    assert spelled == ["␣a  b\\n␣␣", "(nothing)"], "spaces at an end are seen"
    assert page.run("document.querySelectorAll('.plot > *').length") == 61  # and a ring
    page.click("#baseline-2")
    assert "needs no candidates" in page.run("document.querySelector('#detail-words').textContent")
    assert page.run("document.querySelectorAll('[aria-selected=true]').length") == 1
    page.click("#boundaries")
    edge = "getComputedStyle(document.querySelector('#calm-3')).boxShadow"
    assert page.run(edge) != "none"
    page.click("#boundaries")
    assert page.run(edge) == "none"
    assert page.complaints == []
    assert all(url.startswith((server.url, "data:")) for url in page.requested), page.requested


def test_the_sampler_is_chosen_and_only_what_is_used_can_be_set(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    page.type("#length", "24")
    page.type("#seed", "3")
    page.type("#candidates", "60")
    choose = """(([field, value]) => {{ const e = document.querySelector(field); e.value = value;
        e.dispatchEvent(new Event('change')); }})({})"""
    page.run(choose.format('["#method", "centre"]'))
    assert page.run("document.querySelector('#candidates').value") == "8"
    assert not page.run("document.querySelector('#temperature').disabled"), "the token model has one"
    page.click("#write")
    page.wait("document.querySelector('#status').textContent.startsWith('Done')")
    for index, (name, settings) in enumerate(
        (("calm", Sampling(0.5, 8, 24, 3, method="centre")), ("baseline", Sampling(0.5, 60, 24, 3)))
    ):
        text = generate_texts(server.models[name].model, ["def "], settings)[0]
        assert page.run(f"panes[{index}].patches.map((patch) => patch.text).join('')") == text
    page.click("#calm-2")
    assert page.run("document.querySelector('#detail-words').textContent").startswith("The mean of 8 latents")
    assert page.run("[...document.querySelectorAll('#vote thead th')].length") == 3, "no chances"
    assert page.run("document.querySelectorAll('#vote tr.chosen').length") == 1
    assert page.run("document.querySelectorAll('.plot > *').length") == 10  # the mean and its ring
    page.run(choose.format('["#beside", ""]'))
    assert page.run("document.querySelector('#temperature').disabled")
    page.run(choose.format('["#model", "baseline"]'))
    assert page.run("document.querySelector('#method').disabled")
    assert not page.run("document.querySelector('#temperature').disabled")
    page.run(choose.format('["#method", "pool"]'))
    assert page.run("document.querySelector('#candidates').value") == "60"
    assert page.complaints == []


def test_token_by_token_can_be_chosen_where_laws_of_tokens_are_known(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    option = "document.querySelector('#method option[value=token]').disabled"
    assert page.run(option), "an energy head has no such laws"
    page.run("models.find((each) => each.id === 'calm').nextvec.by_token = true; suit()")
    assert not page.run(option)
    asked = "JSON.stringify(request(models.find((each) => each.id === '{}')))"
    note = "document.querySelector('#note').hidden ? '' : document.querySelector('#note').textContent"
    told = page.run(asked.format("calm"))
    assert "method" not in told, "the server's own default is the page's"
    assert "candidates" not in told
    assert page.run(note) == ""
    page.run("choose('pool'); suit()")
    page.type("#candidates", "60")
    assert '"candidates":60' in page.run(asked.format("calm"))
    assert page.run(note).startswith("Top p, top k and penalties have no effect on calm, whose sampler here does not")
    assert page.run(note).endswith(": choose the sampler token by token.")
    page.run("choose('token'); suit()")
    told = page.run(asked.format("calm"))
    assert '"method":"token"' in told
    assert '"temperature":0.5' in told
    assert "candidates" not in told
    assert page.run("document.querySelector('#candidates').disabled")
    assert not page.run("document.querySelector('#temperature').disabled")
    page.run("models.find((each) => each.id === 'calm').nextvec.by_token = false; suit()")
    assert (
        page.run("[document.querySelector('#method').value, document.querySelector('#candidates').value].join()")
        == "auto,60"
    )
    assert page.complaints == []


def test_cuts_and_penalties_reach_the_models_whose_tokens_have_laws(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    fields = ("top_p", "top_k", "frequency_penalty", "presence_penalty")
    disabled = "[" + ", ".join(f"document.querySelector('#{name}').disabled" for name in fields) + "]"
    assert page.run(disabled) == [False] * 4, "the token model has them"
    page.run("document.querySelector('#beside').value = ''; suit()")
    assert page.run(disabled) == [True] * 4, "an energy head has no laws of tokens"
    page.run("document.querySelector('#beside').value = 'baseline'; suit()")
    for field, value in zip(fields, ("0.9", "20", "1.5", "0.5"), strict=True):
        page.type(f"#{field}", value)
    page.type("#candidates", "20")
    page.type("#length", "24")
    page.type("#seed", "3")
    page.click("#write")
    page.wait("document.querySelector('#status').textContent.startsWith('Done')")
    cut = Sampling(0.5, None, 24, 3, top_k=20, top_p=0.9, presence_penalty=0.5, frequency_penalty=1.5)
    for index, (name, settings) in enumerate((("calm", Sampling(0.5, 20, 24, 3)), ("baseline", cut))):
        text = generate_texts(server.models[name].model, ["def "], settings)[0]
        assert page.run(f"panes[{index}].patches.map((patch) => patch.text).join('')") == text
    assert page.complaints == []
    page.type("#top_p", "0")
    page.run("document.querySelector('#form').noValidate = true")
    page.click("#write")
    page.wait("!document.querySelector('#error').hidden")
    assert "Top p must be in (0, 1]" in page.run("document.querySelector('#error').textContent")


def test_stop_ends_the_text_and_frees_its_slot(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    page.type("#length", "200")
    page.run("document.querySelector('#model').value = 'baseline'; document.querySelector('#beside').value = ''")
    worker, step = server.models["baseline"].worker, server.models["baseline"].worker._engine.step

    def slow_step() -> list[object]:
        import time

        time.sleep(0.03)
        return list(step())

    worker._engine.step = slow_step  # type: ignore[method-assign, assignment]
    try:
        page.click("#write")
        page.wait("panes.length && panes[0].patches.length > 3")
        assert page.run("document.querySelector('#write').disabled")
        page.click("#stop")
        page.wait("document.querySelector('#status').textContent === 'Stopped.'")
        server.wait_idle()
    finally:
        worker._engine.step = step  # type: ignore[method-assign]
    assert page.run("panes[0].patches.length") < 200
    assert not page.run("document.querySelector('#write').disabled")
    assert page.run("document.querySelector('#stop').disabled")


def test_errors_are_told_in_a_sentence(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    for field, value, told in (  # fields are called as on the page
        ("#length", "1000", "shorten the prompt or lower Tokens"),
        ("#length", "", "Tokens: input should be greater than or equal to 1"),
        ("#candidates", "1", "Temperature 0.5 needs at least 2 candidates"),
    ):
        before = page.run(f"document.querySelector('{field}').value")
        page.type(field, value)
        page.click("#write")
        page.wait("!document.querySelector('#error').hidden")
        assert told in page.run("document.querySelector('#error').textContent")
        assert page.run("document.querySelector('#error').getAttribute('role')") == "alert"
        page.type(field, before)
    page.type("#seed", "")
    page.click("#write")
    page.wait("document.querySelector('#status').textContent.startsWith('Done')")
    assert page.run("document.querySelector('#error').hidden")
    assert page.run("document.querySelector('#seed').value") == "0", "the seed of an empty field is shown"
    page.run(
        "models[0].id = models[1].id = 'gone'; document.querySelectorAll('option').forEach((o) => { o.value = 'gone' })"
    )
    page.click("#write")
    page.wait("document.querySelector('#error').textContent.includes('there is no model')")
    with running() as short:
        opened(browser, short)
    page.click("#write")
    page.wait("document.querySelector('#error').textContent === 'The server cannot be reached.'")


def test_a_key_is_asked_for_and_used(browser: Tab) -> None:
    with running(api_key="secret") as server:
        browser.open(f"{server.url}/")
        browser.wait("document.querySelector('#error').textContent.includes('API key is missing or wrong')")
        assert not browser.run("document.querySelector('#key-field').hidden")
        browser.type("#key", "secret")
        browser.press("Tab", 9)
        browser.wait("document.querySelector('#model').options.length === 2")
        browser.click("#write")
        browser.wait("document.querySelector('#status').textContent.startsWith('Done')")


@pytest.mark.parametrize(("width", "dark"), [(1180, False), (1180, True), (390, False)], ids=["light", "dark", "phone"])
def test_it_fits_and_can_be_read(browser: Tab, server: Running, width: int, dark: bool, tmp_path: Path) -> None:
    page = opened(browser, server)
    page.look(width, 900, dark)
    page.click("#write")
    page.wait("document.querySelector('#status').textContent.startsWith('Done')")
    top = 450 if width < 400 else 800  # a phone shows the text, not the form
    page.wait(f"document.querySelector('#texts').getBoundingClientRect().top < {top}")
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    clipped = """[...document.querySelectorAll('select')].flatMap((select) => {
        const pen = document.createElement('canvas').getContext('2d');
        pen.font = getComputedStyle(select).font;
        return [...select.options].map((each) => each.text)
            .filter((text) => pen.measureText(text).width + 30 > select.clientWidth); })"""  # 30: padding and arrow
    assert page.run(clipped) == []
    contrast = """((text, ground) => {
        const light = (css) => { const c = css.match(/\\d+/g).slice(0, 3).map((v) => { v /= 255;
            return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
        const [a, b] = [light(text), light(ground)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05); })"""
    for what, ground in (
        ("body", "body"),
        (".text", "article"),
        (".prompt", "article"),
        ("label", "form"),
        ("#write", "#write"),
    ):
        style = f"getComputedStyle(document.querySelector('{what}')).color"
        under = f"getComputedStyle(document.querySelector('{ground}')).backgroundColor"
        assert page.run(f"{contrast}({style}, {under})") >= 4.5, what
    unnamed = """[...document.querySelectorAll('input, select, textarea, button')].filter((e) => !e.hidden
        && !(e.labels && e.labels.length) && !e.textContent.trim()).map((e) => e.id)"""
    assert page.run(unnamed) == []
    page.photograph(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_who_wants_no_motion_gets_none(browser: Tab, server: Running) -> None:
    page = opened(browser, server)
    page.look(390, 800)
    page.run("Element.prototype.scrollIntoView = function (options) { window.scrolled = [this.id, options.behavior]; }")
    for motion, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": motion}])
        page.run("scrollTo(0, 0); show(document.querySelector('#status'))")
        assert page.run("scrolled") == ["status", behaviour]
    page.run("scrolled = null; show(document.querySelector('h1'))")
    assert page.run("scrolled") is None, "what is in view stays where it is"
