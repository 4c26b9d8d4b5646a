"""The site's page *Talk to it* in Chromium: a model that answers in the browser, from a folder on loopback.

In the place of onnxruntime-web stands standin_ort.js, which answers the same calls and says what is dictated. With the package at hand
(`npm pack onnxruntime-web@1.30.0`, its file named by TINY_LLM_TALK) all of it runs in the real runtime too, and its numbers are compared with onnxruntime's.
Screenshots are written to pytest's tmp_path; `pytest --basetemp=shots tests/test_site_talk.py` keeps them in shots/.
"""
import functools, http.server, json, math, os, random, re, subprocess, sys, threading, time, unicodedata, urllib.request

import numpy as np
import pytest

from pages import act, bubbles, choose, choose_by_keys, contrast, here, nameless, say, settle, stop_by_keys, tab_to, until

pytest.importorskip("onnxruntime", reason="the extra export is not installed: pip install 'tiny_llm[export]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
import talk
from house import NBS, ROOT, environment
from serving import LOOP, SAID, dictated
from test_chat_browser import FLAGS, WAIT, chromium
from tiny_llm.basics import UserError
from tiny_llm.deployment.export import OnnxRuntime
from tiny_llm.text.tokenizer import pretokenize
from tiny_llm.training.folder import load, save

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]
PLAIN = SAID.replace("**", "").replace("`", "")        # as the page shows it
PACKAGE = os.environ.get("TINY_LLM_TALK")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


class Folder:
    "A folder behind loopback; .url."
    def __init__(self, path):
        self.path, self.server = path, http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(path)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "The folder of a model that says SAID, and then a loop without end."
    path = tmp_path_factory.mktemp("model")/"said"
    save(*dictated(SAID, LOOP, layers=2), path)
    return path


@pytest.fixture(scope="module", params=["stand-in", "onnxruntime-web"])
def site(request, model, tmp_path_factory):
    "The page, built as the workflow builds it, and served."
    place = tmp_path_factory.mktemp("site")
    if request.param == "stand-in":
        net, tok = load(model, "cpu")
        c = net.cfg
        head = net.head.weight.detach()
        links = {i: [j for j in head[:, i].topk(2).indices.tolist() if head[j, i] > 0] for i in range(len(tok))}
        it = dict(links=links, layers=c.n_layers, heads=c.n_heads, kv=c.n_kv_heads, dim=c.head_dim, rows=c.vocab_size, wait=4)
        (place/"ort.wasm").write_text(json.dumps(it))
        (place/"ort.js").write_text((ROOT/"tests"/"standin_ort.js").read_text())
        talk.build(model, place/"talk", place=place, contexts=4, most=40)
    elif not PACKAGE: pytest.skip("TINY_LLM_TALK names no package of onnxruntime-web")
    else: talk.build(model, place/"talk", package=PACKAGE)
    found = Folder(place/"talk")
    found.real, (found.model, found.tok) = request.param != "stand-in", load(model, "cpu")
    yield found
    found.server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not chromium(): pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=[*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    "The page, not yet open; what it asked for elsewhere and what went wrong in it fail the test."
    context = browser.new_context(viewport=dict(width=1100, height=800), color_scheme="light")
    page, asked, wrong = context.new_page(), [], []
    page.set_default_timeout(WAIT)
    context.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "Failed to load resource" not in m.text else None)
    page.on("dialog", lambda d: (wrong.append(f"dialog {d.message}") if "Delete all" not in d.message else None, d.accept()))
    yield page
    assert asked and all(url.startswith((site.url, "data:")) for url in asked), [u for u in asked if not u.startswith(site.url)]
    assert not wrong, wrong
    assert page.evaluate("() => window.hacked") is None
    context.close()


alone = pytest.mark.parametrize("site", ["stand-in"], indirect=True)      # the runtime has no part in it

def ready(page): page.wait_for_selector("#model option", state="attached")

def opened(page, site):
    page.goto(site.url)
    ready(page)


def test_type_stream_stop_regenerate_edit_reload(page, site, tmp_path):
    def shot(name): page.screenshot(path=tmp_path/f"{name}.png")
    opened(page, site)
    until(lambda: "million parameters" in page.inner_text("#log"))
    shot("1_empty")
    assert page.evaluate("() => !crossOriginIsolated"), "no special headers"
    choose(page, temperature=0, max_tokens=60)
    typed, seen = "Hello <script>window.hacked=2</script> <img src=x onerror=window.hacked=3> <|end|>", []
    say(page, typed)
    while True:                                               # streamed: each text is the beginning of the next
        now = bubbles(page)
        if now and now[-1] and now[-1] not in seen: seen.append(now[-1])
        if page.locator("#send").is_visible(): break
    text = bubbles(page)[-1]
    assert text.startswith(PLAIN) and " one two three" in text
    assert len(seen) >= 3 and all(PLAIN.startswith(t) or t.startswith(PLAIN) or "`" in t or "*" in t for t in seen), seen
    assert bubbles(page, "user") == [typed] and page.input_value("#text") == ""
    assert page.locator(".bubble script, .bubble img").count() == 0
    assert page.locator(".assistant .bubble strong").inner_text() == "bold" and page.locator(".assistant .bubble code").inner_text() == "code"
    assert "60 tokens" in page.locator(".assistant .actions").inner_text()
    shot("2_said")

    page.evaluate("() => { window.runs = 0; new BroadcastChannel('runs').onmessage = () => { window.runs++ } }")
    choose(page, max_tokens=900)                              # stopped in the middle
    say(page, "And then?")
    until(lambda: len(bubbles(page)) == 2 and len(bubbles(page)[-1]) > 150)
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    page.click("#stop")
    settle(page)
    part = bubbles(page)[-1]
    assert "stopped" in page.locator(".assistant .actions").last.inner_text() and part.startswith(PLAIN)
    time.sleep(0.1)
    runs = page.evaluate("window.runs")                       # the stand-in says when it computes
    time.sleep(0.3)
    assert page.evaluate("window.runs") == runs and (runs > 30 or site.real), "the model goes on"
    assert bubbles(page)[-1] == part and page.evaluate("document.activeElement.id") == "text"

    choose(page, temperature=3, max_tokens=40, seed=1)        # another reply; the first stays within reach
    act(page, "Regenerate")
    settle(page)
    second = bubbles(page)[-1]
    assert second != part and "2/2" in page.locator(".assistant .actions").last.inner_text()
    act(page, "Regenerate")                                   # the same seed, the same reply; another seed, another
    settle(page)
    assert bubbles(page)[-1] == second
    choose(page, seed=2)
    act(page, "Regenerate")
    settle(page)
    assert bubbles(page)[-1] != second and "4/4" in page.locator(".assistant .actions").last.inner_text()
    for _ in range(3): page.get_by_label("Version before").last.click()
    assert bubbles(page)[-1] == part

    choose(page, temperature=0)                               # something else said in the first place
    act(page, "Edit", "user", 0)
    page.get_by_label("Edit your message").fill("Good evening")
    page.get_by_label("Edit your message").press("Enter")
    until(lambda: bubbles(page, "user") == ["Good evening"])
    settle(page)
    assert len(bubbles(page)) == 1 and "2/2" in page.locator(".user .actions").first.inner_text()
    page.get_by_label("Version before").first.click()
    assert bubbles(page, "user") == [typed, "And then?"] and len(bubbles(page)) == 2

    before = bubbles(page), bubbles(page, "user")             # kept in the browser
    page.reload()
    ready(page)
    assert (bubbles(page), bubbles(page, "user")) == before and page.locator("#list li").count() == 1
    page.click("#new")
    page.locator(".examples button").first.click()            # an example is sent by a click
    settle(page)
    until(lambda: page.locator("#list li").count() == 2)
    assert bubbles(page, "user") == [talk.EXAMPLES[0]] and bubbles(page)[-1].startswith(PLAIN)
    page.click("#settings")
    assert page.locator("#fields [name=key]").count() == 0, "there is no server that would take a key"
    page.click("#forget")
    page.click("#fields button[type=submit]")
    assert page.locator(".message").count() == 0 and page.evaluate("localStorage['tiny_llm.chats']") == "[]"


def test_probabilities_alternatives_and_attention(page, site, tmp_path):
    opened(page, site)
    choose(page, temperature=0, max_tokens=30)
    say(page, "Hello")
    settle(page)
    assert page.locator(".xray").count() == 0
    act(page, "X-ray")
    tokens, tok = page.locator(".bubble > .xray button"), site.tok
    chain = tok.encode(SAID)
    shown = tokens.all_text_contents()
    assert shown[:len(chain)] == [tok.decode([i]) for i in chain] and page.locator(".xray script, .xray img").count() == 0
    at = 5
    tokens.nth(at).click()
    assert tokens.nth(at).get_attribute("aria-expanded") == "true"
    rows = page.locator(".beside > .others tr")
    assert rows.count() == 8 and page.locator(".beside > .others tr.chosen td").first.inner_text() == tok.decode([chain[at]]).strip()
    shares = [float(r.split("\t")[-1].strip("<% ")) for r in rows.all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and shares[0] + shares[1] > 60
    if not site.real:                                          # logits 8, 6.5 and V - 2 zeros
        V = site.model.cfg.vocab_size
        assert abs(shares[0] - 100 * math.exp(8) / (math.exp(8) + math.exp(6.5) + V - 2)) < 0.06

    page.wait_for_selector(".looked select")                   # attention: one choice for each head, and their mean
    prompt = tok.prompt([dict(role="user", content="Hello")])
    text, cfg = prompt + chain[:at], site.model.cfg
    pieces = [tok.decode([i], special=False) or tok.pieces([i])[0] for i in text]
    heads = page.locator(".looked option").all_inner_texts()
    assert len(heads) == 1 + cfg.n_layers * cfg.n_heads and heads[0].startswith("all heads")
    reader = OnnxRuntime(site.path/"model", "int8")
    reader.run(np.array([text]))
    for n in range(cfg.n_layers * cfg.n_heads):
        page.select_option(".looked select", str(n + 1))
        layer, h = divmod(n, cfg.n_heads)
        assert heads[n + 1].startswith(f"layer {layer + 1}, head {h + 1}:")
        spans = page.locator(".looked .xray span")
        found = spans.evaluate_all("all => all.map(e => [e.textContent, e.title, e.style.background])")
        assert len(found) == len(text) and [f[0] for f in found][len(prompt):] == pieces[len(prompt):]
        if site.real: wanted = reader.shares[layer][0, h, -1]
        else:
            wanted = np.zeros(len(text))
            wanted[0] += 0.25
            wanted[max(0, len(text) - 1 - n)] += 0.75
        for (_, title, _), x in zip(found, wanted):
            said = 0.0 if title.startswith("<") else float(title.rstrip("%"))
            assert abs(said - 100 * x) < (2 if site.real else 0.06), (n, title, x)
        most = int(np.argmax(wanted))
        assert len({f[2] for f in found}) > 1 and found[most][2] == min((f[2] for f in found), key=lambda c: int(c.strip("rgb()").split(",")[2]))
    assert contrast(page, ".looked .xray span, .looked label, .others td, .others caption, .others button") >= 4.5
    page.screenshot(path=tmp_path/"3_attention.png")

    # the reply goes on from another token
    second = page.locator(".beside > .others button").first
    assert second.get_attribute("aria-label").startswith("Go on with ")
    other = tok.decode([chain[at + 1]])                        # the model's second thought is to leave a token out
    assert second.text_content() == other
    second.click()
    settle(page)
    shown = page.locator(".bubble > .xray button").all_text_contents()
    assert shown[:len(chain) - 1] == [tok.decode([i]) for i in chain[:at] + chain[at + 1:]]
    assert "2/2" in page.locator(".assistant .actions").inner_text() and "30 tokens" in page.locator(".assistant .actions").inner_text()
    act(page, "X-ray")
    plain = "".join(tok.decode([i]) for i in chain[:at] + chain[at + 1:]).replace("**", "").replace("`", "")
    assert bubbles(page)[-1].startswith(plain)
    page.get_by_label("Version before").click()
    assert page.locator(".bubble > .xray button").all_text_contents()[:len(chain)] == [tok.decode([i]) for i in chain]


def test_phone_dark_and_keyboard_alone(page, site, tmp_path):
    page.set_viewport_size(dict(width=390, height=780))
    opened(page, site)
    until(lambda: here(page) == "text")
    choose_by_keys(page, temperature=0, max_tokens=900)
    page.keyboard.type("A message that is long enough to take several lines on a telephone, and a wordthatislongerthananytelephoneiswide")
    page.keyboard.press("Enter")
    stop_by_keys(page)
    tab_to(page, "X-ray", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".xray")
    assert here(page) == "X-ray"
    tab_to(page, site.tok.decode(site.tok.encode(SAID)[2:3]), "Shift+Tab", 200)
    page.keyboard.press("Enter")
    page.wait_for_selector(".looked select")
    def wide(): return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    words = ".bubble, .bubble code, .actions, .actions button, #status, #send, h1, h1 a, #model, #new, .xray button, .looked .xray span, .looked label, .others td, .others caption, .others button"
    assert wide() <= 0 and contrast(page, words) >= 4.5 and not nameless(page)
    page.screenshot(path=tmp_path/"4_phone.png")
    page.locator(".looked").scroll_into_view_if_needed()
    page.screenshot(path=tmp_path/"5_phone_attention.png")
    for name in ("#send", "#text", "#model", "#settings", "#menu", "#theme"):
        box = page.locator(name).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 780, name
    chosen = page.locator(".looked select")
    chosen.focus()
    page.keyboard.press("ArrowDown")
    until(lambda: chosen.input_value() == "1")
    button = page.locator(".beside > .others button").first
    button.focus()
    page.keyboard.press("Enter")                              # on from another token, and stopped
    page.wait_for_selector("#stop:not([hidden])")
    assert here(page) == "text"
    page.keyboard.press("Escape")
    settle(page)
    assert "2/2" in page.locator(".assistant .actions").inner_text()
    page.click("#theme")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.locator(".bubble > .xray button").nth(2).click()
    page.wait_for_selector(".looked select")
    assert contrast(page, words) >= 4.5 and wide() <= 0
    page.screenshot(path=tmp_path/"6_phone_dark.png")
    page.set_viewport_size(dict(width=1100, height=800))
    page.screenshot(path=tmp_path/"7_dark.png")
    page.reload()
    ready(page)
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_a_long_conversation_forgets_and_too_long_a_message_is_refused(page, site):
    opened(page, site)
    ctx = site.model.cfg.ctx
    choose(page, temperature=0, max_tokens=ctx // 2)
    long = "one two three four five six " * 20
    for k in range(5):
        say(page, long)
        until(lambda: len(bubbles(page)) == k + 1 and page.locator("#stop").is_visible())
        page.click("#stop")
        settle(page)
    say(page, long)
    until(lambda: len(bubbles(page)) == 6 and bubbles(page)[-1])
    page.click("#stop")
    settle(page)
    said = page.evaluate("() => JSON.parse(localStorage['tiny_llm.chats'])[0].messages.map(m => [m.role, m.content, m.prompt])")
    turns = [dict(role=role, content=text) for role, text, _ in said]
    from tiny_llm.assistant.chat import fit_prompt
    for n, (role, _, prompt) in enumerate(said):
        if role == "assistant": assert prompt == fit_prompt(site.tok, [], turns[:n], ctx, ctx // 2)[0], n
    assert len(said[-1][2]) < len(site.tok.prompt(turns[:-1])), "nothing was forgotten"
    page.click("#new")
    say(page, long * 9)
    page.wait_for_selector("#status.wrong")
    assert re.fullmatch(rf"The message is too long: with it the prompt has \d+ tokens, and the model's context is {ctx}. Shorten it.", page.inner_text("#status"))
    assert page.locator("#send").is_visible() and not bubbles(page)


def odd_texts(n):
    "Texts of marks and letters from many scripts; none of characters that a Unicode of 2021 does not know, which browsers and Oniguruma may class differently."
    rng, known = random.Random(0), [chr(c) for c in range(0xa0, 0x2fff) if unicodedata.category(chr(c)) != "Cn"]
    marks = ["'ll", "'S", "'ſ", "'Re", "n't", "  ", "\n", " \n\n", "\t", "\r\n", "1234", "3.5", " +-*/", "…", "éà", "ß", "नमस्ते", "中文字", "日本語", "שלום", "😀", "👩\u200d🚀",
             "e\u0301", "<|", "<|end|>", "<|user|>", "|>", "_", "\u00a0", "\u0085", "\ufeff", "\u3000", "\u2028", "\u00ad", "\x00", "one", " two", "Look", "bold", "window"]
    return ["".join(rng.choice(marks) if rng.random() < 0.7 else rng.choice((chr(rng.randrange(32, 127)), rng.choice(known))) for _ in range(rng.randint(0, 25)))
            for _ in range(n)]


@alone
def test_the_tokenizer_in_the_page_is_ours(page, site):
    "tokenizer.js against tokenizers: ids, pieces, and conversations in which marks were typed."
    page.goto(site.url)
    texts, tok = odd_texts(2000), site.tok
    ask = """async asked => { const { Tokenizer, PATTERN, decoder } = await import('./tokenizer.js');
        const tok = new Tokenizer(await (await fetch('model/tokenizer.json')).json());
        const text = ids => { const d = decoder(); return ids.map(i => d.decode(tok.bytes(i), { stream: true })).join('') + d.decode() };
        return JSON.stringify([asked.texts.map(t => tok.encode(t)), asked.texts.map(t => text(tok.encode(t))), asked.chats.map(c => tok.prompt(c)), asked.ids.map(i => tok.piece(i)),
            asked.texts.map(t => [...t.matchAll(PATTERN)].map(m => m[0]))]) }"""
    chats = [[dict(role=role, content=t) for role, t in zip(("system", "user", "assistant", "user")[k % 2:], texts[4 * k:])] for k in range(40)]
    ids, back, prompts, pieces, chunks = json.loads(page.evaluate(ask, dict(texts=texts, chats=chats, ids=list(range(len(tok))))))
    with_marks = [t for t in texts if "<|" not in t]
    assert [i for t, i in zip(texts, ids) if "<|" not in t] == [tok.encode(t) for t in with_marks] and len(with_marks) > 1000
    assert back == texts and chunks == [pretokenize(t) for t in texts]
    marks = set(tok.specials.values())
    assert not any(marks & set(i) for i in ids), "a typed mark has become one"
    assert prompts == [tok.prompt(c) for c in chats]
    assert [p for i, p in enumerate(pieces) if i < 5] == talk_marks(tok)
    assert all(p == tok.decode([i]) for i, p in enumerate(pieces) if i not in marks and "\ufffd" not in tok.decode([i]))


def talk_marks(tok): return [name for name, i in sorted(tok.specials.items(), key=lambda x: x[1]) if i < 5]


@alone
@pytest.mark.parametrize("how", ["no WebAssembly", "no model", "no runtime", "a broken runtime"])
def test_a_recorded_conversation_where_it_cannot_run(how, page, site, tmp_path):
    kept = [dict(id="k", title="An old talk", leaf=2, messages=[dict(id=1, role="user", content="Old", parent=None), dict(id=2, role="assistant", content="Words", parent=1)])]
    page.context.add_init_script(f"if (!localStorage['tiny_llm.chats']) localStorage['tiny_llm.chats'] = JSON.stringify({json.dumps(kept)})")
    if how == "no WebAssembly": page.context.add_init_script("delete globalThis.WebAssembly")
    elif how == "no model": page.context.route("**/*.onnx", lambda r: r.fulfill(status=404))
    elif how == "no runtime": page.context.route("**/ort.js", lambda r: r.fulfill(status=404))
    else: page.context.route("**/ort.wasm", lambda r: r.fulfill(status=200, body="no program"))
    page.goto(site.url)
    page.wait_for_selector("#status.wrong")
    said = page.inner_text("#status")
    assert said.startswith("The model does not run here: ") and said.endswith("What you see was recorded; nothing can be sent."), said
    if how == "no WebAssembly": assert "this browser has no WebAssembly" in said
    if how == "no model": assert "model/onnx/model_quantized.onnx is not there (404)" in said
    recorded = json.loads((site.path/"recorded.json").read_text(encoding="utf-8"))
    assert bubbles(page, "user") == talk.RECORDED and len(bubbles(page)) == len(talk.RECORDED) and all(bubbles(page))
    assert page.locator(".bubble script, .bubble img").count() == 0 and page.locator("#text").is_disabled() and page.locator("#send").is_disabled()
    buttons = page.locator(".actions button").evaluate_all("all => all.map(b => [b.textContent, b.disabled])")
    assert {(n, d) for n, d in buttons} == {("Copy", False), ("Edit", True), ("Regenerate", True), ("X-ray", False)}
    act(page, "X-ray", nth=0)
    tokens = page.locator(".bubble > .xray button")
    assert "".join(tokens.all_text_contents()).replace("⏎", "") == recorded["messages"][1]["content"]
    tokens.nth(1).click()
    assert page.locator(".others tr").count() == 8 and page.locator(".others button, .looked select").count() == 0
    assert contrast(page, "#status, .bubble > .xray button, .others td") >= 4.5
    page.screenshot(path=tmp_path/f"8_{how.replace(' ', '_')}.png")
    page.locator("#list li button").first.click()            # what was kept can be read, and is kept
    assert bubbles(page) == ["Words"]
    assert page.evaluate("JSON.parse(localStorage['tiny_llm.chats']).length") == 1


@alone
def test_the_folder_from_a_disk(browser, site):
    "`python -m http.server`, as a person starts it, with the page in a folder below its top."
    process = subprocess.Popen([sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(site.path.parent)],
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    page = browser.new_page()
    try:
        url = re.search(r"http://[\d.]+:\d+/", process.stdout.readline())[0] + "talk/"
        page.goto(url)
        ready(page)
        choose(page, temperature=0, max_tokens=30)
        say(page, "Hello")
        settle(page)
        assert bubbles(page)[-1].startswith(PLAIN)
        types = [urllib.request.urlopen(url + name).headers["content-type"] for name in ("ort.js", "worker.js", "tokenizer.js")]
        assert all("javascript" in t for t in types), "a module with another type is not run"
    finally:
        process.terminate()
        process.wait(10)
        page.close()


@pytest.mark.parametrize("site", ["onnxruntime-web"], indirect=True)
def test_the_real_runtime_computes_what_onnxruntime_computes(page, site):
    opened(page, site)
    choose(page, temperature=0, max_tokens=120)
    say(page, "Who are you?")
    settle(page)
    m = page.evaluate("() => JSON.parse(localStorage['tiny_llm.chats'])[0].messages[1]")
    reader = OnnxRuntime(site.path/"model", "int8")
    assert m["prompt"] == site.tok.prompt([dict(role="user", content="Who are you?")]) and len(m["tokens"]) == 120
    ids = [t["id"] for t in m["tokens"]]
    logits = reader.run(np.array([m["prompt"] + ids]))[0][0, len(m["prompt"]) - 1:-1]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    assert ids == logp.argmax(-1).tolist()
    assert max(abs(t["logprob"] - logp[n, t["id"]]) for n, t in enumerate(m["tokens"])) < 0.02


# The builder

def test_a_package_with_another_hash_is_refused(model, tmp_path):
    (tmp_path/"x.tgz").write_bytes(b"not it")
    with pytest.raises(UserError, match="its hash is sha512-"): talk.vendor(tmp_path/"x.tgz", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tgz"]
    assert re.fullmatch(r"onnxruntime-web@\d+\.\d+\.\d+", talk.PACKAGE) and re.fullmatch(r"sha512-[\w+/]{86}==", talk.INTEGRITY)
    assert talk.integrity(b"abc") == "sha512-3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw=="


def test_models_that_the_page_cannot_hold_are_refused(model, tmp_path, monkeypatch):
    net, tok = load(model, "cpu")
    tok.template = tok.template.replace("<|end|>", "<|end|>\n")
    save(net, tok, tmp_path/"other")
    with pytest.raises(UserError, match="has another"): talk.build(tmp_path/"other", tmp_path/"out", place=tmp_path)
    (tmp_path/"ort.js").write_text("")
    (tmp_path/"ort.wasm").write_text("")
    monkeypatch.setattr(talk, "LARGEST", 1000)
    with pytest.raises(UserError, match="bytes; the page holds 1,000 at most"): talk.build(model, tmp_path/"out", place=tmp_path)
    assert not (tmp_path/"out").exists()
    (tmp_path/"taken").mkdir()
    with pytest.raises(UserError, match="exists and is left as it is"): talk.build(model, tmp_path/"taken", place=tmp_path)


@alone
def test_the_folder_asks_nothing_of_other_hosts(site):
    "No script, style or font from elsewhere, and a policy that forbids it; paths are relative, so that any folder of any host will do."
    html = (site.path/"index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="/|src="https?:|<link[^>]+https?:', html) and talk.POLICY in html and html.index("talk.js") < html.index("chat.js")
    ours = {p.name for p in (NBS/"_tools"/"talk").iterdir()} | {"index.html", "chat.css", "chat.js", "talk.json", "recorded.json", "ort.js", "ort.wasm", "model"}
    assert {p.name for p in site.path.iterdir()} == ours
    for name in ("talk.js", "worker.js", "tokenizer.js", "chat.css"): assert "http:" not in (site.path/name).read_text(encoding="utf-8"), name
    said = json.loads((site.path/"talk.json").read_text())
    sizes = {p: (site.path/p).stat().st_size for p in ("ort.wasm", "model/onnx/model_quantized.onnx", "model/tokenizer.json", "model/config.json", "model/generation_config.json")}
    assert said["bytes"] == sum(sizes.values()) and sizes["model/onnx/model_quantized.onnx"] <= talk.LARGEST == 5_000_000
