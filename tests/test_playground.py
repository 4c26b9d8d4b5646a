"""The playground in a real browser, and other people's tokenizers taken apart; what needs neither stands in the notebook.

Screenshots are written to pytest's tmp_path; `pytest --basetemp=shots tests/test_playground.py` keeps them in shots/.
"""
import json, random, subprocess, sys, time

import pytest

from test_real_tokenizers import HOME, make, pairs, read
from tiny_llm.text.playground import Merges, playground
from tiny_llm.text.tokenizer import BYTE_OF, Tokenizer

try:
    import test_chat_browser as browser
    from test_chat_browser import lab  # the fixture: a JupyterLab of our own
except pytest.skip.Exception: browser = None

real = pytest.mark.skipif(not HOME.is_dir(), reason="needs the folder tokenizers/ beside TINY_LLM_DATA")
TEXTS = ["Once upon a time", "Hello, world! 12345  \n\n\tdef f(x):\n        return x", "naïve 😀 नमस्ते Здравствуйте 人人生而自由", "aaaaaaaaaaaaaaaa", ""]


def texts(n=200):
    "Random strings of all planes."
    for seed in range(n):
        r = random.Random(seed)
        yield "".join(chr(r.choice([r.randrange(128), r.randrange(0xD800), r.randrange(0xE000, 0x110000)])) for _ in range(20))


def same(folder):
    "All merges give the library's pieces, no merge gives bytes, and the playground opens the folder."
    tok = Tokenizer.load(folder)
    merges = Merges(tok)
    absent = {b for c, b in BYTE_OF.items() if c not in merges.vocab}  # SmolLM2 lacks some bytes, and drops them
    for s in [*TEXTS, *texts()]:
        assert merges.pieces(s) == [tok.tk.id_to_token(i) for i in tok.encode(s)]
        assert len(merges.pieces(s, 0)) == sum(b not in absent for b in s.encode())
        assert merges.lengths(s)[-1] == len(tok.encode(s))
    box = playground(folder, "Once upon a time")
    assert repr(box) == "Once| upon| a| time"
    return merges, absent


@real
def test_gpt2(tmp_path):
    folder = make(tmp_path/"gpt2", json.loads(read(HOME/"gpt2"/"encoder.json")), pairs(HOME/"gpt2"/"vocab.bpe"), ["<|endoftext|>"],
                  dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"))
    merges, absent = same(folder)
    assert len(merges) == 50_000 and not absent
    assert merges.facts("the", 50_000)["tokens"] == 1 and merges.pairs[0] == ("Ġ", "t")


@real
def test_smollm2(tmp_path):
    vocab = json.loads(read(HOME/"smollm2"/"vocab.json"))
    vocab = vocab if isinstance(vocab, dict) else {t: i for i, t in enumerate(vocab)}
    folder = make(tmp_path/"smol", vocab, pairs(HOME/"smollm2"/"merges.txt"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                  dict(eos_token="<|im_end|>"))
    merges, absent = same(folder)
    assert len(merges) == len(pairs(HOME/"smollm2"/"merges.txt")) and len(absent) == 21


def test_odd_vocabularies():
    "A file in which a later merge makes room for an earlier one, and one that takes known chunks whole."
    import tokenizers
    from tokenizers import models, pre_tokenizers
    vocab = {t: i for i, t in enumerate(["a", "b", "c", "d", "abc", "bc", "abcd", "ab", "cd"])}
    odd = [("a", "bc"), ("abc", "d"), ("b", "c"), ("a", "b"), ("c", "d")]
    for whole in (False, True):
        tk = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=odd, ignore_merges=whole))
        tk.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        merges = Merges(Tokenizer(tk))
        for s in ("abcd", "abcdabcd", "ab cd bc", "dcba", "aabbccdd"):
            assert merges.pieces(s) == tk.encode(s).tokens
            assert [len(merges.pieces(s, k)) for k in range(6)] == merges.lengths(s).tolist()
            for k in range(6):
                some = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=odd[:k]))
                some.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                if not whole: assert merges.pieces(s, k) == some.encode(s).tokens


def test_without_ipywidgets():
    "The picture is there, and the counts; only the slider is missing."
    code = ("import sys; sys.modules['ipywidgets'] = None\n"
            "from tiny_llm.text.playground import playground\n"
            "box = playground(['once upon a time'] * 3, text='once <b>', vocab_size=280)\n"
            "data, _ = box._repr_mimebundle_()\n"
            "assert set(data) == {'text/html', 'text/plain'} and '&lt;' in data['text/html'] and '<b>o' not in data['text/html']\n"
            "box.k = 0; assert len(box) == 8; box.jump(); assert box.k > 0 and len(box) < 8\n")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


SETUP = '''
from tiny_llm.text.playground import playground
box = playground(["once upon a time in a land far away"] * 9, text="once upon a time", vocab_size=284)
'''


@pytest.mark.timeout(300)
def test_in_chromium(tmp_path, monkeypatch, request):
    "JupyterLab: keys move the slider, typing changes the tiles, a button jumps; nothing typed becomes markup."
    if not browser: pytest.skip("playwright is not installed: pip install playwright")
    monkeypatch.setattr(browser, "SETUP", SETUP)
    monkeypatch.setattr(browser, "CELL", "box")
    address = request.getfixturevalue("lab")
    with browser.playwright.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=browser.chromium(), args=browser.FLAGS)
        page = chrome.new_page(viewport=dict(width=1000, height=700))
        page.set_default_timeout(browser.WAIT)
        page.goto(address)
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_selector(".tiny-llm-playground .tiny-llm-curve")
        tiles = page.locator(".tiny-llm-playground .tiny-llm-tokens span[title]")
        count = "document.querySelectorAll('.tiny-llm-playground .tiny-llm-tokens span[title]').length"
        assert tiles.all_text_contents() == ["once", "·upon", "·a", "·time"]
        page.screenshot(path=tmp_path/"1_all_merges.png")

        page.locator(".tiny-llm-playground .noUi-handle").first.focus()
        page.keyboard.press("Home")
        page.wait_for_function(f"() => {count} === 16")
        page.screenshot(path=tmp_path/"2_no_merge.png")
        page.locator(".tiny-llm-playground button", has_text="▶").click()
        page.wait_for_function(f"() => {count} < 16")

        page.locator(".tiny-llm-playground textarea").fill("a land <img src=x onerror=alert(1)>\nनमस्ते")
        page.wait_for_function("() => document.querySelector('.tiny-llm-playground .tiny-llm-tokens').textContent.includes('<')")
        assert page.locator(".tiny-llm-playground .tiny-llm-tokens img").count() == 0
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
        page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
        time.sleep(0.3)
        page.screenshot(path=tmp_path/"3_dark.png")
        chrome.close()


def test_merges_of_a_tokenizer_that_takes_known_chunks_whole():
    "With `ignore_merges`, a chunk that merges could make goes the same way before its own merge, and is whole from then on."
    import tokenizers
    from tiny_llm.text.stories import stories
    from tiny_llm.text.tokenizer import train_tokenizer
    tok = train_tokenizer(stories(100), vocab_size=500)
    spec = json.loads(tok.json_text)
    spec["model"]["ignore_merges"] = True
    plain, whole = Merges(tok), Merges(Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec))))
    for s in stories(5, seed=1):
        for k in (0, 10, 50, 100, len(plain)): assert whole.pieces(s, k) == plain.pieces(s, k)
