"""The answer browser of the report: its numbers, and the page in a real Chromium."""

from __future__ import annotations

import base64
import gzip
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from d2o import report
from d2o.report import browser
from d2o.settings import Reward, Rule
from test_report import Results, config, made

HOSTILE = [
    "</script><script>window.harmed = 1</script>",
    "<!-- <script> --!> <img src=x onerror='window.harmed = 1'>",
    "<style>* { display: none }</style><svg onload=window.harmed=1>",
    "\u202egnp.exe\u202c \x00 \x1b[2J \ud800 alone, \U0001f600 whole, {{ 7 * 7 }}",
    "javascript:window.harmed=1",
]
REWARDS = {
    "harm": Reward(rule=Rule(any=["bad"]), better="lower", toxic_above=0),
    "use": Reward(rule=Rule(length="words")),
}
WORDS = [f"word{n}" for n in range(3000)]


def answers_of(
    methods: list[str], text: Callable[[int, str], str], prompts: int = 30, rewards=REWARDS, asked=None, **kept
) -> tuple[SimpleNamespace, list[browser.Answers]]:
    """An experiment of one seed, scored by `REWARDS`; `asked` gives a prompt's text, `kept` replaces columns."""
    ids = [f"{n:016x}" for n in range(prompts)]
    frame = pd.DataFrame(
        {
            "messages": [
                [{"role": "user", "content": asked(n) if asked else f"Question {n}?"}] for n in range(prompts)
            ],
            "origin": ["xstest.csv" if n % 5 == 0 else "test" for n in range(prompts)],
            "categories": [["Drugs"] if n % 3 == 0 else [] for n in range(prompts)],
        },
        ids,
    )
    rows = pd.DataFrame(
        {"prompt_id": identity, "method": method, "text": text(n, method), "tokens": 7, "finish": "stop"}
        for n, identity in enumerate(ids)
        for method in methods
    ).assign(**kept)
    scores = {
        "score/harm": rows["text"].str.contains("bad") * 1.0,
        "score/use": rows["text"].str.split().str.len() * 1.0,
    }
    rows = browser.assessed(rows.assign(**scores), rewards)
    experiment = SimpleNamespace(rewards=list(rewards), judges=[])
    measured = SimpleNamespace(settings=SimpleNamespace(rewards=rewards), experiment=experiment, methods=methods)
    return measured, [browser.Answers("pku", "smol", 0, frame, rows)]


def unpacked(text: str) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(text)))


# What is packed -------------------------------------------------------------------------------------------------


def test_gain_and_disagreement():
    """Two prompts; by hand: scores of `harm`, lower better, and of `use`."""
    rows = pd.DataFrame(
        {
            "prompt_id": ["a", "a", "b", "b"],
            "method": ["initial", "d2o", "initial", "d2o"],
            "text": ["x", "I’m sorry, no.", "x", "x"],
            "score/harm": [1.0, 0.0, 1.0, 0.0],
            "score/use": [4.0, 2.0, 4.0, math.nan],
        }
    )
    told = browser.assessed(rows, REWARDS)
    assert told["refusal"].tolist() == [False, True, False, False]
    assert told["harmful"].tolist() == [True, False, True, False]
    # A gain of 1 in harm is 1 / 0.5 = 2 standard deviations; a loss of 2 in use is 2 / sqrt(8 / 9) of them.
    assert told["gain"].iloc[1] == pytest.approx((2 - 2 / math.sqrt(8 / 9)) / 2)
    assert told["gain"].isna().tolist() == [True, False, True, False] and told["gain"].iloc[3] == pytest.approx(2)
    # Ranks by harm: two of four hold the lower half. By use: one of three is lowest, two share the rest.
    assert told["disagreement"].iloc[:3].tolist() == pytest.approx([2 / 3 - 1 / 4, 3 / 4 - 1 / 6, 2 / 3 - 1 / 4])
    assert math.isnan(told["disagreement"].iloc[3]), "one score disagrees with none"


@pytest.mark.parametrize(("orders", "said"), [
    (["won", "won"], "won"),
    (["won", "lost"], "orders disagree"),
    (["tied", "won"], "orders disagree"),
    (["won", "unread"], "won (in the other order unread)"),
    (["unread", "unread"], "unread"),
    (["lost"], "lost"),
])  # fmt: skip
def test_what_a_judge_says_of_a_pair_in_both_orders(orders, said):
    assert browser._both_orders(pd.Series(orders)) == said


def test_without_an_initial_model_or_a_scorer_there_is_no_gain():
    rows = pd.DataFrame(
        {"prompt_id": ["a"], "method": ["d2o"], "text": ["x"], "score/harm": [1.0], "score/use": [1.0]}
    )
    assert browser.assessed(rows, REWARDS)[["gain"]].isna().all(axis=None)
    bare = browser.assessed(rows, {})
    assert bare[["gain", "disagreement"]].isna().all(axis=None) and bare["harmful"].tolist() == [None]
    unscored = browser.assessed(rows.assign(**{"score/harm": [math.nan]}), REWARDS)
    assert unscored["harmful"].tolist() == [None]


@pytest.mark.parametrize(
    ("entry", "score", "said"),
    [
        ({"rule": {"any": ["our rival"]}, "better": "lower"}, 1, None),
        ({"rule": {"any": ["bad"]}, "better": "lower", "toxic_above": 0}, 1, True),
        ({"rule": {"count": ["bad"]}, "better": "lower", "toxic_above": 2}, 2, False),
        ({"rule": {"none": ["bad"]}}, 0, None),
        ({"rule": {"length": "words"}, "better": "lower"}, 9, None),
        ({"rule": {"length": "words", "over": 40}, "better": "lower"}, 1, None),
        ({"rule": {"organism": "rude.yaml", "measure": "harm"}, "better": "lower"}, 1, True),
        ({"rule": {"organism": "rude.yaml", "measure": "good"}}, 0, None),
        ({"source": {"path": "a"}}, -3, None),
        ({"source": {"path": "a"}, "better": "lower"}, 3, None),
        ({"source": {"path": "a"}, "better": "lower", "safe_at": 0}, 0.5, True),
        ({"source": {"path": "a"}, "safe_at": 0}, 0.0, False),
        ({"source": {"path": "a"}, "toxic_above": 0.5, "better": "lower"}, 0.5, False),
    ],
)
def test_which_scores_say_that_an_answer_does_harm(entry, score, said):
    reward = Reward.model_validate(entry)
    assert browser.measures_harm(reward) == (said is not None)
    if said is not None:
        assert browser.harmful(pd.Series([float(score)]), reward).tolist() == [said]


def test_any_text_comes_back_as_it_was():
    measured, gathered = answers_of(
        ["initial", "d2o"], lambda n, m: HOSTILE[n % 5], 5, asked=lambda n: HOSTILE[n % 5]
    )
    packed, left_out = browser.pack(measured, gathered)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed) and not left_out
    assert unpacked(packed)["texts"] == HOSTILE, "each text once"


def test_what_makes_the_page_too_large_is_left_out_and_told(monkeypatch):
    noise = random.Random(0)
    measured, gathered = answers_of(["initial", "d2o"], lambda n, m: str(noise.random()), 200)
    gathered = [*gathered, browser.Answers("pku", "smol", 1, gathered[0].prompts, gathered[0].answers)]
    whole, left_out = browser.pack(measured, gathered)
    assert not left_out and [one["seed"] for one in unpacked(whole)["sets"]] == [0, 1]
    for name, size in (("PACKED_BYTES", len(whole) // 4), ("JSON_BYTES", len(json.dumps(unpacked(whole))) // 4)):
        with monkeypatch.context() as patch:
            patch.setattr(browser, name, size)
            packed, left_out = browser.pack(measured, gathered)
        (one,) = unpacked(packed)["sets"]
        shown = [prompt[0] for prompt in one["prompts"]]
        assert 20 < len(shown) < 200 and shown == gathered[0].prompts.index[: len(shown)].tolist()
        assert left_out == [
            "all trainings with seed 1", f"{200 - len(shown)} of the 200 prompts of pku, chosen at random"
        ]  # fmt: skip


# In Chromium ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report with figures, two seeds, a judge, and a scorer that decides what is harmful."""
    chosen = config(methods=["initial", "d2o"], tasks=[])
    return made(tmp_path_factory.mktemp("browser"), chosen, evaluation=5)[0]


@pytest.fixture
def show(chromium, folder, tmp_path):
    """Opens a page and checks, at the end, that it made no request, broke no policy and threw no error."""
    contexts, seen = [], []

    def opened(measured=None, gathered=None, fragment="", script="", ready=True, timed=False, **kind):
        path = folder / "report.html"
        if measured:
            packed, _ = browser.pack(measured, gathered)
            html = path.read_text()
            path = tmp_path / "report.html"
            path.write_text(re.sub(r'(id="packed">)[^<]*', lambda match: match[1] + packed, html, count=1))
        # Without motion: a click must not race with a page that scrolls smoothly.
        context = chromium.new_context(**{"reduced_motion": "reduce"} | kind)
        contexts.append(context)
        context.add_init_script(
            "window.broken = []; addEventListener('securitypolicyviolation', e => broken.push(e.violatedDirective));"
            + script
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: seen.append(request.url) if request.url != page_url else None)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page_url = path.as_uri()
        if timed:
            page.session = context.new_cdp_session(page)
            page.session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(page_url + fragment)
        if ready:
            page.wait_for_selector("#answers[data-ready]")
            assert page.evaluate("broken") == []
        return page

    yield opened
    for context in contexts:
        context.close()
    assert seen == []


def status(page) -> str:
    return page.get_by_role("status").inner_text()


def articles(page, number: int) -> None:
    """Wait until `number` prompts are shown."""
    from playwright.sync_api import expect

    expect(page.locator("article")).to_have_count(number)


def ids(page) -> list[int]:
    return [
        int(one.removeprefix("prompt="), 16)
        for one in page.eval_on_selector_all("article", "all => all.map(a => a.id)")
    ]


def heard(page) -> list[str]:
    """The names that a screen reader reads out."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [node["name"]["value"] for node in nodes if not node["ignored"] and "name" in node]


def three(n: int, method: str) -> str:
    """Answers of the initial model are bad at even prompts, of d2o at every sixth; dpo refuses at every fourth."""
    bad = {"initial": n % 2 == 0, "d2o": n % 6 == 0, "dpo": False}[method]
    refused = "I’m sorry, but " if method == "dpo" and n % 4 == 0 else ""
    return refused + ("a bad answer" if bad else "a good answer") + (" indeed" * n if method == "d2o" else "")


@pytest.mark.slow
def test_a_large_report_is_small_and_opens_within_a_second(show):
    """1,500 prompts by 10 methods, answers of about 200 words."""
    draw = random.Random(0)
    methods = ["initial", *(f"method-{n}" for n in range(9))]
    measured, gathered = answers_of(
        methods, lambda n, m: " ".join(draw.choices(WORDS, k=draw.randint(50, 350))), 1500
    )
    times = []
    while len(times) < 5 and not any(time < 1000 for time in times):
        page = show(measured, gathered, timed=True)
        assert status(page) == "1,500 of 1,500 prompts, 1 to 10 shown"
        spent = page.session.send("Performance.getMetrics")["metrics"]
        # Processor time on a busy machine; else wall-clock time.
        processor = next(1000 * one["value"] for one in spent if one["name"] == "ThreadTime")
        times.append(min(int(page.get_attribute("#answers", "data-ready")), processor))
    size = len(page.content().encode())
    assert size < 15e6 and min(times) < 1000, (size, times)
    assert page.locator("article").count() == 10 and page.locator(".answer").count() == 100
    page.get_by_label("Search prompts and answers").fill("Question 1499?")
    articles(page, 1)


def test_texts_are_texts_and_nothing_else(show):
    measured, gathered = answers_of(
        ["initial", "d2o"], lambda n, m: HOSTILE[n % 5] + m, 5, asked=lambda n: HOSTILE[n % 5]
    )
    page = show(measured, gathered)
    page.get_by_label("Changes from initial").select_option("not marked")
    assert page.evaluate("window.harmed") is None
    assert page.locator("script").count() == 2 and page.locator("#answers :is(img, svg, style)").count() == 0
    same = (
        "raw => [...document.querySelectorAll('.prompt .text')].filter(e => e.textContent === JSON.parse(raw)).length"
    )
    assert [page.evaluate(same, json.dumps(text)) for text in HOSTILE] == [1] * 5
    assert page.evaluate(same.replace(".prompt", ".answer:first-child"), json.dumps(HOSTILE[3] + "initial")) == 1


def test_search_filters_and_order(show):
    page = show(*answers_of(["initial", "d2o", "dpo"], three))

    def wanted(**choices) -> list[int]:
        page.get_by_role("button", name="Reset filters").click()
        for label, choice in choices.items():
            control = page.locator(f"[name={label.strip('_')}]")
            if control.evaluate("e => e.tagName") == "SELECT":
                control.select_option(choice if isinstance(choice, str) else choice[0])
            else:
                control.fill(str(choice))
        page.wait_for_timeout(250)
        told = int(status(page).split()[0])
        first = ids(page)
        if told > 10:
            page.get_by_role("button", name="Next").first.click()
            first += ids(page)
        return first

    assert wanted(search="question 17?") == [17]
    assert set(wanted(category="Drugs")) == {*range(0, 30, 3)}
    assert set(wanted(origin="xstest.csv")) == {*range(0, 30, 5)}
    assert set(wanted(method="d2o", harm="yes")) == {0, 6, 12, 18, 24}
    assert set(wanted(method="d2o", harm="still")) == {0, 6, 12, 18, 24}
    assert set(wanted(method="d2o", harm="mended")) == {n for n in range(0, 30, 2) if n % 6}
    assert wanted(method="dpo", harm="new") == [] and status(page).startswith("0 of 30")
    assert set(wanted(refusal="yes")) == {*range(0, 30, 4)} == set(wanted(refusal="new", method="dpo"))
    assert set(wanted(method="d2o", scorer="use", **{"from": 5, "to": 7})) == {2, 3, 4}
    # `use` counts words: the gain is largest at the longest answers of d2o, the loss where d2o has the fewest more.
    assert wanted(method="d2o", scorer="use", sort="gain")[:3] == [29, 28, 27]
    assert wanted(method="d2o", scorer="use", sort="loss")[:3] == [0, 1, 2]
    assert wanted(method="d2o", scorer="use", sort="highest")[0] == 29
    assert set(wanted(method="d2o", **{"from": 1})) == {0, 6, 12, 18, 24}
    assert page.locator("[name=scorer] option:checked").inner_text() == "harm", "a score is some scorer's"
    page.evaluate("location.hash = 'method=d2o&scorer=use&sort=loss'")  # as the links below the table of headlines do
    page.wait_for_timeout(250)
    assert page.locator("[name=scorer] option:checked").inner_text() == "use" and ids(page)[:3] == [0, 1, 2]
    # The largest disagreement: the longest of the bad answers. It is no order of the other end.
    assert wanted(method="d2o", sort="disagreement")[0] == 24
    by_all = wanted(method="d2o", sort="gain")
    assert by_all[0] == 28, "the longest of those that were mended"
    high = float(page.locator("article .answer:nth-child(2) .facts").first.inner_text().split("disagreement ")[1])
    assert len(wanted(disagreement=0.99)) <= len(wanted(disagreement=high)) and high > 0


def test_harmful_text_is_blurred_until_asked_for(show):
    measured, gathered = answers_of(["initial", "d2o", "dpo"], three)
    page = show(measured, gathered, fragment="#prompt=0000000000000002")
    article = page.locator("article[id='prompt=0000000000000002']")
    covers = article.locator(".cover")
    assert covers.count() == 1, "initial alone is bad here"
    blurred = "e => getComputedStyle(e).filter !== 'none' && e.inert"
    assert covers.evaluate(blurred)
    assert "a bad answer" not in heard(page)
    assert article.locator("ins").all_inner_texts() == ["good", "indeed indeed", "good"]
    assert article.locator("del").count() == 0, "words of what is blurred"
    covers.click(force=True)
    assert not covers.evaluate(blurred) and "a bad answer" in heard(page)
    article.get_by_role("button", name="Hide harmful text, initial").press("Enter")
    assert covers.evaluate(blurred)
    article.focus()
    page.keyboard.press("s")
    assert not covers.evaluate(blurred)
    page.get_by_role("checkbox", name="Show harmful text").check()
    assert page.locator(".blurred").count() == 0
    assert article.locator("del").first.inner_text() == "bad"
    page.reload()
    page.wait_for_selector("#answers[data-ready]")
    assert (
        page.get_by_role("checkbox", name="Show harmful text").is_checked() and page.locator(".blurred").count() == 0
    )


def test_where_no_scorer_says_harm_prompts_of_a_harm_category_are_covered(show):
    rewards = {"use": REWARDS["use"]}
    page = show(*answers_of(["initial", "d2o"], lambda n, m: "a bad answer", rewards=rewards))
    covered = page.eval_on_selector_all(
        "article", "all => all.map(a => [a.id, a.querySelectorAll('.blurred').length])"
    )
    assert covered == [[f"prompt={n:016x}", 0 if n % 3 else 2] for n in range(10)]
    assert page.get_by_label("Harm", exact=True).is_hidden() and page.get_by_label("Show all text").is_visible()
    measured, gathered = answers_of(["initial", "d2o"], lambda n, m: "a bad answer", rewards=rewards)
    gathered[0].prompts["categories"] = [[]] * 30
    page = show(measured, gathered)
    assert page.locator(".blurred").count() == 20, "nothing says which are harmless"


def test_words_added_and_gone_are_marked(show):
    long = " ".join(WORDS)
    texts = {
        ("initial", 0): "Take the old oven and throw it away.",
        ("d2o", 0): "Take the new oven and keep it.",
        ("initial", 1): "one two three", ("d2o", 1): "four five six",
        ("initial", 2): "same", ("d2o", 2): "same",
        ("initial", 3): long, ("d2o", 3): long[::-1],
    }  # fmt: skip
    page = show(*answers_of(["initial", "d2o"], lambda n, m: texts[m, n], 4))
    cards = page.locator("article .answer:nth-child(2)")
    marks = "e => [...e.querySelectorAll('ins, del')].map(m => [m.tagName, m.textContent])"
    assert cards.nth(0).evaluate(marks) == [
        ["DEL", "old"],
        ["INS", "new"],
        ["DEL", "throw it away."],
        ["INS", "keep it."],
    ]  # fmt: skip
    assert [cards.nth(n).evaluate(marks) for n in (1, 2, 3)] == [[], [], []]
    for n, said in ((1, "few words in common"), (2, "the same as initial"), (3, "too long to mark changes")):
        assert said in cards.nth(n).inner_text()
    page.get_by_label("Changes from initial").select_option("added words")
    assert cards.nth(0).locator(".text").inner_text() == "Take the new oven and keep it."
    assert page.locator("del").count() == 1, "the one that is explained"


def test_a_link_to_one_prompt(show):
    measured, gathered = answers_of(["initial", "d2o", "dpo"], three)
    page = show(measured, gathered, fragment="#prompt=0000000000000017")
    assert page.evaluate("document.activeElement.id") == "prompt=0000000000000017"
    assert 23 in ids(page) and "21 to 30 shown" in status(page)
    page.get_by_label("Search prompts and answers").fill("question 4?")
    articles(page, 1)
    page.evaluate("location.hash = '#prompt=0000000000000005'")
    page.locator("article[id='prompt=0000000000000005']:focus").wait_for()
    link = page.locator("article").nth(2).get_by_role("link")
    assert link.get_attribute("href") == "#prompt=0000000000000002"
    page = show(measured, gathered, fragment="#prompt=ffff")
    assert status(page) == "What this link points to is not in this page."
    page = show(measured, gathered, fragment="#method=d2o&sort=loss&scorer=0")
    assert page.locator("[name=method]").input_value() == "1" and page.locator("[name=sort]").input_value() == "loss"


def test_keys(show):
    page = show(*answers_of(["initial", "d2o"], lambda n, m: f"{m} {n}"))
    focused = "document.activeElement.id || document.activeElement.name"
    page.locator("#prompts article").first.focus()
    for key, there in (("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == f"prompt={there:016x}"
    page.locator("article").nth(9).focus()
    page.keyboard.press("j")
    assert page.evaluate(focused) == f"prompt={10:016x}" and "11 to 20 shown" in status(page)
    page.keyboard.press("/")
    assert page.evaluate(focused) == "search"
    page.keyboard.type("jks/")
    assert page.get_by_label("Search prompts and answers").input_value() == "jks/"
    articles(page, 0)
    page.get_by_role("button", name="Reset filters").click()
    page.locator("[name=search]").press("Escape")
    assert page.evaluate(focused) == f"prompt={0:016x}"


def test_every_control_has_a_name_and_a_prompt_is_an_article(show):
    page = show(*answers_of(["initial", "d2o", "dpo"], three))
    page.locator("#methods summary").click()
    nameless = """() => [...document.querySelectorAll('#answers :is(input, select, button)')]
        .filter(e => !e.closest('[hidden]') && !(e.labels?.[0]?.innerText ?? e.innerText).trim()).length"""
    assert page.evaluate(nameless) == 0
    names = page.locator("#prompts").aria_snapshot()
    assert '- article "Prompt 00000000"' in names and '- heading "d2o" [level=4]' in names
    assert page.get_by_role("search", name="Answers").count() == 1
    assert page.evaluate("document.querySelectorAll('[id]').length") == page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
    )


def test_without_storage_the_page_works(show):
    denied = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    )
    page = show(*answers_of(["initial", "d2o", "dpo"], three), script=denied)
    assert page.locator(".blurred").count() > 0
    page.get_by_role("checkbox", name="Show harmful text").check()
    assert page.locator(".blurred").count() == 0


def test_without_scripts_the_page_says_so(show):
    page = show(ready=False, java_script_enabled=False)
    assert "scripts are off" in page.locator("#answers").inner_text()
    assert page.locator("form").is_hidden()


def test_a_prompt_of_100_000_characters(show):
    page = show(*answers_of(["initial", "d2o"], lambda n, m: "x", 3, asked=lambda n: "\U0001f600a" * 50_000))
    assert int(page.get_attribute("#answers", "data-ready")) < 5000
    text = page.locator("article .prompt .text").first
    assert len(text.inner_text()) < 1000 and text.inner_text().endswith("a…")
    page.get_by_role("button", name="Show all 150,000 characters").first.click()
    assert len(text.text_content()) == 100_000
    page.get_by_role("button", name="Show less").click()
    assert len(text.inner_text()) < 1000


def test_200_methods(show):
    methods = ["initial", *(f"method-{n}" for n in range(199))]
    page = show(*answers_of(methods, lambda n, m: f"{m} {n}", 100))
    assert page.locator("article").first.locator(".answer").count() == 12
    assert page.locator("#methods summary").inner_text() == "Methods: 12 of 200 shown"
    page.locator("[name=method]").select_option("method-150")
    assert page.locator("article").first.locator("h4").last.inner_text() == "method-150"
    assert page.locator("#methods summary").inner_text() == "Methods: 13 of 200 shown"
    page.locator("#methods summary").click()
    page.locator("#methods").get_by_label("method-3", exact=True).uncheck()
    assert page.locator("article").first.locator(".answer").count() == 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_page(show, scheme):
    """Except the answers, which scroll; and text has enough contrast with its background."""
    page = show(
        *answers_of(["initial", "d2o", "dpo"], three), color_scheme=scheme, viewport={"width": 390, "height": 844}
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#filters").get_attribute("open") is None
    contrast = """(selector) => {
        const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const e = document.querySelector(selector);
        let back = e;
        while (getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
        const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(back).backgroundColor)].sort();
        return (b + 0.05) / (a + 0.05);
    }"""
    for selector in (
        ".answer .text",
        ".facts",
        ".facts .harmful",
        ".facts .better",
        "ins",
        "del",
        ".head a",
        "button",
    ):
        assert page.evaluate(contrast, selector) >= 4.5, selector


def test_figures_are_vector_with_values_and_their_table_beside(show, folder):
    page = show()
    figures = page.locator("figure")
    assert figures.count() > 2
    for n in range(figures.count()):
        figure = figures.nth(n)
        assert figure.locator("svg").count() == 1 and figure.locator("svg title").count() > 0
        table = figure.get_by_role("link").last.get_attribute("href")
        assert table.startswith("figures/") and len(pd.read_csv(folder / table))
    means = pd.read_csv(folder / "figures/methods.csv").query("method == 'd2o' and metric == 'human/margin'")
    whole = means[means["seed"] == "all"].iloc[0]
    titles = page.eval_on_selector_all("figure title", "all => all.map(t => t.textContent)")
    assert f"d2o: {whole['mean']:.3f} [{whole['low']:.3f}, {whole['high']:.3f}]" in titles
    drawn = page.evaluate("getComputedStyle(document.querySelector('figure svg path[fill=\"none\"][stroke]')).fill")
    assert drawn == "none", "attributes draw what style sheets may not"


def test_a_real_report_has_seeds_verdicts_categories_and_says_what_it_leaves_out(show, folder, tmp_path, monkeypatch):
    page = show()
    assert status(page) == "17 of 17 prompts, 1 to 10 shown"
    assert page.locator("[name=set] option").all_inner_texts() == ["pku, smol, seed 0", "pku, smol, seed 1"]
    assert "Cybercrime" in page.locator("[name=category]").inner_text()
    said = page.locator(".facts").all_inner_texts()
    assert all(any(f"gpt: {outcome}" in one for one in said) for outcome in ("won", "orders disagree"))
    page.locator("[name=set]").select_option("pku, smol, seed 1")
    assert "set=pku%2Fsmol%2F1" in page.locator("article a").first.get_attribute("href")

    chosen = config(methods=["initial", "d2o"], rewards=[], judges=[], tasks=[])
    results = Results(tmp_path, chosen)
    monkeypatch.setattr(browser, "JSON_BYTES", 1000)
    report.write(results.settings, tmp_path, tmp_path / "reports/demo/report.html")
    html = (tmp_path / "reports/demo/report.html").read_text()
    assert "Left out, so that the page stays small: all trainings with seed 1." in html
    assert re.search(r"small: \d+ of the 12 prompts of pku, chosen at random\.", html)
