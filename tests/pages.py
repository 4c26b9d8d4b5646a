"What the tests of the chat's pages share: that of `serve` and that of the site."
import re, time


def until(done, seconds=60):
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, f"it did not happen in {seconds} s"
        time.sleep(0.03)
    return found


def bubbles(page, who="assistant"): return [t.strip() for t in page.locator(f".message.{who} .bubble").all_inner_texts()]

def settle(page): page.wait_for_selector("#send:not([hidden])")

def choose(page, **settings):
    "Settings, by the dialog."
    page.click("#settings")
    for name, value in settings.items(): page.fill(f"#fields [name={name}]", str(value))
    page.click("#fields button[type=submit]")
    page.wait_for_selector("#dialog", state="hidden")

def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")

def act(page, name, who="assistant", nth=-1): page.locator(f".message.{who} .actions button", has_text=re.compile(f"^{name}$")).nth(nth).click()


def contrast(page, selector):
    "The smallest ratio of contrast between the text of elements and the ground that they stand on."
    return page.evaluate("""selector => {
        const parse = c => c.match(/[\\d.]+/g).map(Number), light = c => { const [r, g, b] = parse(c).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b };
        const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, p = parse(c); if (p.length < 4 || p[3] > 0) return c } return 'rgb(255, 255, 255)' };
        const ratios = [...document.querySelectorAll(selector)].filter(e => e.offsetParent && e.innerText?.trim()).map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x); return (a + .05) / (b + .05) });
        return Math.min(...ratios) }""", selector)


def nameless(page):
    "Controls without a name for those who do not see them."
    return page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea')].filter(e =>
        !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)""")


# By keyboard

def here(page): return page.evaluate("document.activeElement.id || document.activeElement.textContent")

def tab_to(page, wanted, key="Tab", most=60):
    "Go on to what bears this id or text; whatever has the focus on the way shows it."
    for _ in range(most):
        if here(page) == wanted: return
        page.keyboard.press(key)
        assert page.evaluate("() => { const e = document.activeElement; return e === document.body || getComputedStyle(e).outlineStyle !== 'none' }"), here(page)
    raise AssertionError(f"{wanted} is not reached; it ended at {here(page)!r}")

def choose_by_keys(page, **settings):
    "Settings, by the dialog, from the text box and back to it; in the order in which they stand there."
    tab_to(page, "settings", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#dialog[open]")
    for name, value in settings.items():
        for _ in range(12):
            if page.evaluate("document.activeElement.name") == name: break
            page.keyboard.press("Tab")
        page.keyboard.type(str(value))
    page.keyboard.press("Enter")
    page.wait_for_selector("#dialog", state="hidden")
    tab_to(page, "text")

def stop_by_keys(page):
    "Escape while a reply is written, once it is long enough to see."
    until(lambda: bubbles(page) and len(bubbles(page)[-1]) > 120)
    page.keyboard.press("Escape")
    settle(page)
    assert "stopped" in page.locator(".assistant .actions").inner_text() and here(page) == "text"
