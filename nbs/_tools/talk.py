"""The site's page *Talk to it*: a chat model that answers in the reader's browser, as a folder of files for any static host.

    python nbs/_tools/talk.py --model runs/quickstart --out _proc/_docs/talk
    python -m http.server --directory _proc/_docs/talk       # and open http://localhost:8000

1. The model is exported as int8 ONNX with the attention of every head as an output (5.02 export); onnxruntime must compute what we compute.
2. A conversation is recorded with that file, for browsers that cannot run it.
3. onnxruntime-web comes from npm, at one version whose hash is checked (`npm pack`; or a package that is there: --package FILE).
4. The page is that of `tiny_llm serve`, with a worker in the place of the server.
"""
import argparse, base64, hashlib, json, re, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

import numpy as np

from tiny_llm.assistant.protocol import chat_logprob
from tiny_llm.basics import UserError
from tiny_llm.deployment.export import ONNX_FILES, OnnxRuntime, check_new, cut_name, passport, passport_line, write_onnx
from tiny_llm.training.folder import load

HERE = Path(__file__).resolve().parent/"talk"
PACKAGE = "onnxruntime-web@1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
VENDORED = {"package/dist/ort.wasm.bundle.min.mjs": "ort.js", "package/dist/ort-wasm-simd-threaded.wasm": "ort.wasm"}
LARGEST = 5_000_000     # bytes of the model's graph
SITE = "https://tiny-llm.github.io/tiny_llm/"
EXAMPLES = ["Hello!", "Who are you?", "Tell me a story about Lily."]
RECORDED = ["Hello!", "Tell me a story about Lily.", "Where did Lily live?"]
POLICY = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'")


def integrity(data):
    "A file's hash as npm writes it."
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def packed(into):
    "The path of the runtime's package, fetched from npm."
    if not shutil.which("npm"): raise UserError(f"npm is not installed; install Node, or give the package by --package (npm pack {PACKAGE})")
    p = subprocess.run(["npm", "pack", PACKAGE, "--silent", "--ignore-scripts", "--pack-destination", str(into)], capture_output=True, text=True, timeout=600)
    found = sorted(Path(into).glob("*.tgz"))
    if p.returncode or not found: raise UserError(f"npm does not give {PACKAGE}: {p.stderr.strip()[-300:] or 'no file'}")
    return found[0]


def vendor(package, folder):
    "Two files of the runtime's package, whose hash is checked before anything of it is read."
    data = Path(package).read_bytes()
    if (found := integrity(data)) != INTEGRITY: raise UserError(f"{package} is not {PACKAGE}: its hash is {found}, not {INTEGRITY}")
    with tarfile.open(package) as tar:
        for inside, name in VENDORED.items(): (folder/name).write_bytes(tar.extractfile(inside).read())


def check_prompt(tok):
    "UserError unless talk/tokenizer.js can write this tokenizer's conversations: pieces of 2.04, and its template."
    marks, said = tok.vocab, [dict(role=role, content=text) for role, text in (("system", "A b."), ("user", "Hi <|end|>"), ("assistant", " no\n"))]
    wanted = [tok.bos]
    for m in said: wanted += [marks.get(f"<|{m['role']}|>"), *tok.encode(m["content"].replace("<|", "< |")), marks.get("<|end|>")]
    if cut_name(tok) != "qwen35" or tok.bos != marks.get("<|endoftext|>") or tok.prompt(said) != [*wanted, marks.get("<|assistant|>")]:
        raise UserError("the page writes conversations as a tokenizer of tiny_llm does, and this model has another; give a chat model of quickstart")


def record(reader, tok, asked=RECORDED, temperature=0.5, most=200, seed=0, ctx=512):
    "A conversation with an exported file, in the form in which the page keeps one."
    rng, messages, kept = np.random.default_rng(seed), [], []
    for text in asked:
        messages.append(dict(role="user", content=text))
        prompt, ids, tokens = tok.prompt(messages), [], []
        logits, past = reader.run(np.array([prompt]))
        while len(ids) < most and len(prompt) + len(ids) < ctx:
            x = logits[0, -1].astype(np.float64)
            logp = x - x.max() - np.log(np.exp(x - x.max()).sum())
            p = np.exp((logp - logp.max()) / temperature)
            i = int(rng.choice(len(p), p=p / p.sum()))
            if i in tok.ends: break
            top = np.argsort(-logp)[:8]
            ids.append(i)
            tokens.append(chat_logprob(tok, i, logp[i], [(int(j), logp[j]) for j in top]))
            logits, past = reader.run(np.array([[i]]), past)
        messages.append(dict(role="assistant", content=tok.decode(ids)))
        kept.append([messages[-2], {**messages[-1], "tokens": tokens, "note": f"{len(ids)} tokens, recorded"}])
    out = []
    for m in (m for pair in kept for m in pair): out.append({"id": len(out) + 1, "parent": len(out) or None, **m})
    for m in out:
        for t in (u for row in m.get("tokens", []) for u in (row, *row["top_logprobs"])):
            del t["bytes"]
            t["logprob"] = round(float(t["logprob"]), 3)
    return dict(id="recorded", title="Recorded", messages=out, leaf=len(out))


def html(page):
    "index.html of `serve` for a static host: no request elsewhere, the worker's script before the page's, a way back."
    def put(text, old, new):
        assert text.count(old) == 1, old
        return text.replace(old, new)
    page = put(page, '<meta charset="utf-8">', f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    page = put(page, "<title>tiny_llm</title>", '<title>Talk to it – tiny_llm</title>\n<meta name="description" content="A small language model that answers in your browser, token by token.">')
    page = put(page, "<h1>tiny_llm</h1>", f'<h1><a href="{SITE}">tiny_llm</a><span class="roomy">: talk to it</span></h1>')
    page = put(page, '<script src="chat.js" defer>', '<script src="talk.js" defer></script>\n<script src="chat.js" defer>')
    return put(page, "This page needs JavaScript; the API at /v1 does not.", "This page needs JavaScript: the model runs in your browser.")


def about(model, net):
    "What the page says of its model."
    n = sum(p.numel() for p in net.parameters())
    return (f"A model of {n / 1e6:.1f} million parameters runs in this page, in one thread of your browser; what you type stays here. "
            "It learnt from made-up stories and talks about nothing else.")


def build(model, out, package=None, place=None, contexts=64, most=200):
    "Write the page; the runtime from npm, from a package, or from a folder with ort.js and ort.wasm (`place`, for tests). Returns what to tell."
    import tiny_llm.deployment
    page, out = Path(tiny_llm.deployment.__file__).parent/"page", check_new(out)
    net, tok = load(model, "cpu")
    check_prompt(tok)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)/"talk"
        made.mkdir()
        if place:
            for name in VENDORED.values(): shutil.copy(Path(place)/name, made/name)
        else: vendor(package or packed(temporary), made)
        folder = write_onnx(net, tok, made/"model", "int8", attention=True)
        graph = folder/"onnx"/ONNX_FILES["int8"]
        if (size := graph.stat().st_size) > LARGEST: raise UserError(f"the model's graph has {size:,} bytes; the page holds {LARGEST:,} at most")
        reader = OnnxRuntime(folder, "int8")
        opened = passport(reader, net, tok, "int8", n=contexts)
        if not opened["passed"]: raise UserError(f"{passport_line(opened)}: {'; '.join(opened['differs'])}")
        (made/"recorded.json").write_text(json.dumps(record(reader, tok, most=most, ctx=net.cfg.ctx), ensure_ascii=False), encoding="utf-8")
        for f in HERE.iterdir(): shutil.copy(f, made/f.name)
        for name in ("chat.css", "chat.js"): shutil.copy(page/name, made/name)
        (made/"index.html").write_text(html((page/"index.html").read_text(encoding="utf-8")), encoding="utf-8")
        loaded = [graph, made/"ort.wasm", *(folder/f for f in ("tokenizer.json", "config.json", "generation_config.json"))]
        said = dict(name="quickstart", about=about(model, net), examples=EXAMPLES, bytes=sum(f.stat().st_size for f in loaded), runtime=PACKAGE, integrity=INTEGRITY)
        (made/"talk.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)
    total = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return f"{out}: model {size:,} bytes, page {total:,} bytes in {sum(f.is_file() for f in out.rglob('*'))} files; {passport_line(opened)}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="run folder or model folder of a chat model")
    p.add_argument("--out", required=True, help="the new folder")
    p.add_argument("--package", help=f"file of {PACKAGE}; without it, npm fetches it")
    a = p.parse_args()
    try: print(build(a.model, a.out, a.package))
    except UserError as e: sys.exit(str(e))


if __name__ == "__main__": main()
