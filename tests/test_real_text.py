"""Kinds of code, bits of bytes, counts and copies, on the standard library's files and on texts made to be difficult."""
import io, keyword, math, random, tokenize

import numpy as np
import pytest, torch

from tiny_llm.basics import UserError
from tiny_llm.text.sources import documents
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.real_text import (KINDS, ByteCounts, bits_by_kind, byte_bits, compressed_bits, copied, draw_texts, form, kinds_of_code, longest_match,
                                    loss_by_kind_of_code, parses)
from tiny_llm.training.train import evaluate_loss
from tiny_llm.transformer.model import Transformer, preset

ODD = "日本 = 'Ünder 🦆'\n\n\ndef ß(ä):\n\t'''Grüß\n\tdich'''\n\treturn {日本: f'{ä!r:>{4}} é'}  # 🦆\n"


@pytest.fixture(scope="module")
def model_and_tok():
    torch.set_num_threads(1)
    tok = train_tokenizer(documents("python", limit=5), vocab_size=300)
    torch.manual_seed(0)
    model = Transformer(preset("tiny", vocab_size=len(tok), ctx=24))
    model.norm.weight.data *= 3            # far from even, so that no two bytes cost the same
    return model.eval(), tok


def runs(source, kind):
    "The stretches of one kind, as text."
    data, kinds = source.encode(), kinds_of_code(source)
    edges = np.flatnonzero(np.diff(kinds == KINDS.index(kind), prepend=False, append=False))
    return [data[a:b].decode() for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize("n", range(6))
def test_kinds_of_the_standard_library(n):
    source = documents("python", "val", limit=6)[n]
    assert parses(source) and len(kinds_of_code(source)) == len(source.encode())
    assert set(runs(source, "keyword")) <= set(keyword.kwlist)
    assert all(s.isidentifier() for kind in ("new name", "same name") for s in runs(source, kind))
    assert all(s.startswith("#") and "\n" not in s for s in runs(source, "comment"))
    assert all(not s.strip() for s in runs(source, "indent") + runs(source, "line end"))
    assert not "".join(runs(source, "space")).replace("\\", "").strip()
    new = runs(source, "new name")
    assert len(new) == len(set(new)) and set(runs(source, "same name")) <= set(new)
    seen = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    assert sum(map(len, seen)) == sum(map(len, runs(source, "comment")))


def test_docstrings_and_letters_of_several_bytes():
    assert runs(ODD, "docstring") == ["'''Grüß\n\tdich'''"] and runs(ODD, "string") == ["'Ünder 🦆'", "f'{ä!r:>{4}} é'"]
    assert runs(ODD, "new name") == ["日本", "ß", "ä"] and runs(ODD, "same name") == ["日本"]
    assert runs(ODD, "indent") == ["\t", "\t"] and runs(ODD, "comment") == ["# 🦆"]
    assert runs("async def f(): 'ü'\n", "docstring") == ["'ü'"] and runs("x = 1\n'no docstring'\n", "docstring") == []


def test_no_python():
    for bad in ("x = = 1", "print 'x'", "x = (", "def f():\nreturn", "x\0"):
        assert not parses(bad)
        with pytest.raises(UserError, match="cannot read the source"): kinds_of_code(bad)


def test_bits_of_bytes_are_the_loss(model_and_tok):
    model, tok = model_and_tok
    for text in (ODD, "🦆", "x", " \n\n", "a" * 500):
        bits, loss = byte_bits(model, tok, text), evaluate_loss(model, tok, [text])
        assert len(bits) == len(text.encode()) + 1 and (bits >= 0).all()
        assert math.isclose(bits.sum() / len(text.encode()), loss["bits_per_byte"], rel_tol=1e-5)
        assert np.allclose(bits, byte_bits(model, tok, text, rows=1))
    assert model.train() and len(byte_bits(model, tok, "x")) == 2 and model.training
    model.eval()


def test_a_token_gives_its_bytes_equal_parts(model_and_tok):
    model, tok = model_and_tok
    text = "return self"
    ids, bits = tok.encode(text), byte_bits(model, tok, text)
    with torch.no_grad(): log_q = model(torch.tensor([[tok.bos, *ids]]))[0].log_softmax(-1)
    want = [-log_q[t, i].item() / math.log(2) / len(tok.decode([i])) for t, i in enumerate(ids) for _ in tok.decode([i])]
    assert np.allclose(bits[:-1], want, atol=1e-4) and any(len(tok.decode([i])) > 1 for i in ids)
    assert math.isclose(bits[-1], -log_q[len(ids), tok.eos].item() / math.log(2), rel_tol=1e-4)


def test_kinds_add_up(model_and_tok):
    model, tok = model_and_tok
    sources = [ODD, "x = 1\n"]
    rows = loss_by_kind_of_code(model, tok, sources)
    assert math.isclose(sum(r["bits"] for r in rows), sum(byte_bits(model, tok, s).sum() for s in sources))
    assert math.isclose(sum(r["share"] for r in rows), 1) and sum(r["bytes"] for r in rows) == sum(len(s.encode()) for s in sources)
    assert [r["bits"] for r in rows] == sorted((r["bits"] for r in rows), reverse=True)
    ones = bits_by_kind([np.ones(len(s.encode())) for s in sources], sources)
    assert all(r["bits_per_byte"] == 1 for r in ones if r["bytes"])


def test_diverged_weights_are_said(model_and_tok):
    model, tok = model_and_tok
    broken = Transformer(model.cfg)
    broken.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="has diverged"): byte_bits(broken, tok, "x")


@pytest.mark.parametrize("order", range(8))
def test_counts_are_probabilities(order):
    text = random.Random(order).choices(b"ab\x00\xff ", k=500)
    counts = ByteCounts(bytes(text), order)
    for past in (b"", b"a", b"\x00\xff", b"zzzzzzzz", bytes(text[:40])):
        assert math.isclose(sum(2 ** -counts.bits(past + bytes([b]))[-1] for b in range(256)), 1)
    assert len(counts.bits(b"")) == 0 and counts.draw("é", 9, 1) == counts.draw("é", 9, 1)


def test_counts_by_hand():
    "After 'ab' came 'r' twice; after 'b' the same; and 'r' is 2 of 11 bytes, of 5 kinds."
    counts, p = ByteCounts("abracadabra", 2), (2 + 5 / 256) / 16
    for seen in (2, 2): p = (seen + p) / (seen + 1)
    assert math.isclose(2 ** -counts.bits("ab")[0] * 16, 5 + 5 / 256) and math.isclose(2 ** -counts.bits("abr")[-1], p)
    p_of = {c: 2 ** -counts.bits("xa" + c)[-1] for c in "bcd"}         # after 'a' came b twice, c and d once
    drawn = [counts.draw("xa", 1, seed)[2] for seed in range(1500)]
    assert all(abs(drawn.count(c) / 1500 - p_of[c]) < 0.045 for c in p_of) and p_of["b"] > 1.7 * p_of["c"]


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_substrings(seed):
    r = random.Random(seed)
    corpus, *texts = ("".join(r.choices("ab\0é", k=k)) for k in (400, 60, 3, 0, 90))
    for n in (1, 2, 5, 9):
        want = [[t.encode()[i:i + n] in corpus.encode() for i in range(len(t.encode()) - n + 1)] for t in texts]
        assert [c.tolist() for c in copied(texts, corpus, n)] == want
    longest = max((t[i:j] for t in texts for i in range(len(t)) for j in range(i, len(t) + 1) if t[i:j] in corpus), key=lambda s: len(s.encode()))
    assert len(longest.encode()) <= len(longest_match([t.encode() for t in texts], corpus).encode(errors="ignore")) + 2
    assert longest_match([texts[0]], texts[0]) == texts[0]


def test_compressors_after_a_text():
    noise = random.Random(0).randbytes(5000)
    assert compressed_bits(noise) > 7.9 and compressed_bits(noise, after=noise) < 0.2
    assert compressed_bits(noise, "gzip", after=noise + bytes(40_000)) > 7.9        # gzip looks back 32 KB
    assert compressed_bits("ä" * 1000, "bz2") < 1


def test_draws_begin_alike_and_end(model_and_tok):
    model, tok = model_and_tok
    texts = draw_texts(model, tok, "def", rows=3, n=20)
    assert len(texts) == 3 and all(t.startswith("def") for t in texts) and len(set(texts)) == 3
    assert texts == draw_texts(model, tok, "def", rows=3, n=20) != draw_texts(model, tok, "def", rows=3, n=20, seed=1)
    assert len(set(draw_texts(model, tok, "def", rows=3, n=20, temperature=0.01))) == 1
    with pytest.raises(UserError, match="context|cache"): draw_texts(model, tok, rows=1, n=40)


def test_form_counts_what_has_ended():
    got = form(["def f():\n    return 1\n\nx", "def g(\n  a):\n    return a\nx", "def h(:\n    pass\nx", "def i():\n    ret", "def k(\n    a,\n):\n    return a\nx", "def j(): return\n# c\nx"])
    assert (got["texts"], got["ended"], got["parsed"], got["lines"]) == (6, 5, 4, 3)
    assert math.isclose(got["se"], math.sqrt(0.8 * 0.2 / 5))
