"""The page at / in a headless browser: by keyboard alone, in light and dark, on a desk and on a phone.

usage: page.py URL BROWSER [FOLDER_FOR_SCREENSHOTS]

Stdin holds what `/v1` answers for the text that is typed: {"text": .., "tasks": {TASK: {LABEL: SCORE}}}; the server has a
task `broken` too, which no question reaches.
"""

import json
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

SIZES = {"desk": (1280, 900), "phone": (390, 844)}


def focused(page):
    return page.evaluate("document.activeElement.id")


def tab_to(page, wanted):
    for _ in range(40):
        if focused(page) == wanted:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{wanted} is not reached by the Tab key")


def contrast(page):
    """The least contrast of a text on what lies behind it, as WCAG 2 defines it."""
    return page.evaluate(
        """() => {
          const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
          const light = ([r, g, b]) => {
            const part = (x) => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; };
            return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
          };
          const behind = (e) => {
            for (; e; e = e.parentElement) {
              const c = parse(getComputedStyle(e).backgroundColor);
              if (c.length === 3 || c[3] > 0) return c;
            }
            return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
          };
          let least = { ratio: 21 };
          for (const e of document.querySelectorAll("body *")) {
            const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
            if (!own || e.disabled || e.getClientRects().length === 0) continue;
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < least.ratio) least = { ratio, text: e.textContent.trim().slice(0, 40) };
          }
          return least;
        }"""
    )


def shown(page):
    """What the answers say: of each task its labels, in order of their scores, and these as they are written."""
    found = {}
    for box in page.locator("#answers article").all():
        name = box.locator("h3").evaluate("e => e.firstChild.textContent")
        bars = box.locator(".bar").all()
        found[name] = [tuple(bar.locator("span").all_text_contents()) for bar in bars]
    return found


def visit(browser, url, expected, scheme, size, folder):
    context = browser.new_context(color_scheme=scheme, viewport=dict(zip(("width", "height"), SIZES[size])))
    page = context.new_page()
    errors, foreign = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    rows = page.locator("#tasks tr")
    expect(rows).to_have_count(len(expected["tasks"]) + 1)

    tab_to(page, "text")
    page.keyboard.type(expected["text"])
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answers article")).to_have_count(len(expected["tasks"]))
    wanted = {}
    for task, scores in expected["tasks"].items():
        order = sorted(scores.items(), key=lambda of: -of[1])
        wanted[task] = [(label, f"{100 * score:.1f} %") for label, score in order]
    assert shown(page) == wanted, (shown(page), wanted)
    meters = page.locator("#answers meter").evaluate_all("all => all.map(m => m.value)")
    assert meters == [score for of in expected["tasks"].values() for score in sorted(of.values(), reverse=True)]

    # One task, chosen and asked by keyboard.
    tab_to(page, "text")
    tab_to(page, "task")
    name = next(iter(expected["tasks"]))
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    tab_to(page, "send")
    page.keyboard.press("Enter")
    expect(page.locator("#answers article")).to_have_count(1)
    assert list(shown(page)) == [name]

    expect(page.locator("#live-tasks")).not_to_have_text("0")
    expect(page.locator("#about")).to_contain_text("version")
    # A task that cannot serve says why, in the table.
    page.locator("#tasks button", has_text="broken").click()
    expect(page.locator("#tasks tr", has_text="broken").locator(".bad")).to_be_visible()

    page.locator("#filter").fill(name)
    expect(rows).to_have_count(1)
    page.locator("#filter").fill("")
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], f"wider than the {size}: {width}"
    least = contrast(page)
    assert least["ratio"] >= 4.5, f"{scheme}: {least}"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select, button, meter")]
            .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).length"""
    )
    assert unnamed == 0, f"{unnamed} controls without a name"
    if folder:
        page.screenshot(path=folder / f"{scheme}-{size}.png", full_page=True)
    page.goto(url + "/docs")
    expect(page.locator("body")).to_contain_text("/v1/predict")
    refused = [error for error in errors if "422" not in error]
    assert not refused, refused
    assert not foreign, foreign
    context.close()


def main():
    url, browser_path = sys.argv[1:3]
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    expected = json.load(sys.stdin)
    with sync_playwright() as playwright:
        # Tests run as root in containers, where the browser's own sandbox cannot.
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        visits = [(scheme, size) for scheme in ("light", "dark") for size in SIZES]
        for scheme, size in visits:
            visit(browser, url, expected, scheme, size, folder)
        browser.close()
    print(f"{len(visits)} visits")


main()
