"""The chat cell in a real browser: JupyterLab in Chromium, driven by playwright.

What no other test can see: the text is sent by Enter and by a click, appears in steps while the page stays alive, is stopped in
mid-reply, and is cleared. Screenshots are written to pytest's tmp_path; `pytest --basetemp=shots tests/test_chat_browser.py` keeps them in shots/.
"""
import json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync --disable-dev-shm-usage").split()
WAIT = 90_000  # milliseconds: far more than is needed on a machine that has nothing else to do

# A real model and a real cache, but what it says is dictated, one token every 40 ms, so that the test knows what it should see.
SETUP = '''
import time, torch
from tiny_llm.assistant.cell import chat
from tiny_llm.transformer.model import ModelConfig, Transformer
from tiny_llm.text.tokenizer import train_tokenizer

SAID = "Once upon a time <b>a fox</b> & <img src=x onerror=alert(2)> an owl met by the river, and they talked until the moon came up over the hill."
tok = train_tokenizer([SAID] * 3, vocab_size=300)
torch.manual_seed(0)

class Dictated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Transformer(ModelConfig(vocab_size=len(tok), ctx=512, d_model=32, n_layers=1, n_heads=2))
        self.cfg, self.cache, self.device, self.script = self.model.cfg, self.model.cache, self.model.device, []
    def forward(self, ids, cache):
        if cache.length == 0: self.script = tok.encode(SAID) + [tok.end]
        time.sleep(0.04)
        logits = self.model(ids, cache=cache)
        logits[:, -1, self.script.pop(0)] += 1000
        return logits
'''
CELL = "cell = chat(Dictated(), tok, temperature=0.7)\ncell"
TEXT = ".tiny-llm-chat .tiny-llm-assistant .tiny-llm-text"
SAID = re.search(r'SAID = "(.*)"', SETUP)[1]


def chromium():
    "The system's Chromium, or the one that `playwright install chromium` made; None if there is neither."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found: return found
    with playwright.sync_playwright() as p: own = p.chromium.executable_path
    return own if Path(own).exists() else None


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def notebook(*sources):
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate(sources)]
    kernel = dict(display_name="Python 3 (ipykernel)", language="python", name="python3")
    return json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of our own: its own port, token and folders."
    if not chromium(): pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
    home, port, token = tmp_path/"jupyter", free_port(), secrets.token_hex(8)
    names = "JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR IPYTHONDIR".split()
    env = {**os.environ, **{name: str(home/name.lower()) for name in names}, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = home/"jupyterlab_settings_dir/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    (tmp_path/"work").mkdir()
    (tmp_path/"work/chat.ipynb").write_text(notebook(SETUP.strip(), CELL, "6 * 7"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path/'work'}", "--LabApp.expose_app_in_browser=True"]
    with open(tmp_path/"lab.log", "w") as log: server = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (tmp_path/"lab.log").read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/workspaces/w{secrets.token_hex(4)}/tree/chat.ipynb?token={token}"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture
def page(lab):
    "The notebook, open and run."
    path = chromium()
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1200, height=900))
        page.set_default_timeout(WAIT)
        page.dialogs = []
        page.on("dialog", lambda d: (page.dialogs.append(d.message), d.dismiss()))
        page.goto(lab)
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_selector(".tiny-llm-chat input[type=text]")
        yield page
        browser.close()


def watch(page, until, pause=0.03, seconds=60):
    "The texts that the last reply showed, one after the other, until `until(text)`."
    seen, end = [""], time.monotonic() + seconds
    while time.monotonic() < end:
        texts = page.locator(TEXT).all_text_contents()
        if texts and texts[-1] != seen[-1]: seen.append(texts[-1])
        if until(seen[-1]): return seen[1:]
        time.sleep(pause)
    raise AssertionError(f"after {seconds} s the reply is {seen[-1]!r}")


def button(page, name): return page.locator(".tiny-llm-chat button", has_text=name)


@pytest.mark.timeout(300)
def test_chat_cell_in_chromium(page, tmp_path):
    box = page.locator(".tiny-llm-chat input[type=text]").first
    shot = lambda name: page.screenshot(path=tmp_path/f"{name}.png")

    # Sent by Enter, typed as fast as a machine can; streamed in several steps, each the beginning of the next.
    typed = "Hello <img src=x onerror=alert(1)> & <|end|>"
    box.click()
    page.keyboard.type(typed)
    page.keyboard.press("Enter")
    watch(page, lambda text: len(text) > 30)
    shot("1_streaming")
    assert button(page, "Send").is_disabled() and button(page, "Stop").is_enabled()
    seen = watch(page, lambda text: text == SAID)
    assert len(seen) >= 4, f"the text came in {len(seen)} steps"
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:]))
    page.wait_for_selector(".tiny-llm-chat >> text=tokens/s")
    shot("2_complete")

    # What was typed and what was generated are text: no picture, no bold, no script; the box is empty again.
    assert page.locator(".tiny-llm-chat .tiny-llm-user .tiny-llm-text").all_text_contents() == [typed]
    assert page.locator(".tiny-llm-text img, .tiny-llm-text b").count() == 0 and page.dialogs == []
    assert box.input_value() == ""

    # Sent by a click; while it streams the kernel runs another cell; stopped in mid-reply, and it stays as it was.
    box.fill("And then?")
    button(page, "Send").click()
    watch(page, lambda text: 10 < len(text) < 80)
    page.evaluate("""() => { const nb = window.jupyterapp.shell.currentWidget.content; nb.activeCellIndex = 2;
                             nb.widgets[2].model.sharedModel.setSource('print("alive", 6 * 7)');
                             window.jupyterapp.commands.execute('notebook:run-cell') }""")
    page.wait_for_selector(".jp-OutputArea-output >> text=alive 42")
    assert button(page, "Stop").is_enabled(), "the other cell was answered only after the reply"
    button(page, "Stop").click()
    page.wait_for_selector(".tiny-llm-chat >> text=stopped")
    part = page.locator(TEXT).last.text_content()
    assert 0 < len(part) < len(SAID) and SAID.startswith(part)
    time.sleep(0.5)
    assert page.locator(TEXT).last.text_content() == part and button(page, "Send").is_enabled()
    shot("3_stopped")

    # Cleared.
    button(page, "Clear").click()
    page.wait_for_function("() => !document.querySelector('.tiny-llm-chat .tiny-llm-text')")
    shot("4_cleared")
    assert button(page, "Stop").is_disabled()
