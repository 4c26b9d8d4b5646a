"The loader, from many sides: real processes that share batches, indexes on disk, workers, corpora larger than the memory."
import hashlib, json, random, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import pytest
import torch

from house import environment
from tiny_llm.basics import UserError
from tiny_llm.text import corpus, large_corpora
from tiny_llm.text.batches import Batches, Tokens, open_tokens, pack, tokenize
from tiny_llm.text.large_corpora import LargeBatches
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.transformer.model import Transformer, preset

FIELDS = ("x", "y", "w", "doc", "pos")


def fingerprint(b): return hashlib.sha256(b"".join(getattr(b, k).numpy().tobytes() for k in FIELDS)).hexdigest()[:16]


def same(a, b): return all(torch.equal(getattr(a, k), getattr(b, k)) for k in FIELDS)


def made_of(seed, D, top, weights=False):
    "A fixed corpus of D documents of 2 to top - 1 random ids."
    r = np.random.default_rng(seed)
    n = r.integers(2, top, D)
    starts = np.concatenate([[0], np.cumsum(n)])
    ids = r.integers(0, 1000, starts[-1]).astype(np.uint16)
    return Tokens(ids, starts, n.copy(), (r.random(starts[-1]) < .5).astype(np.float32) if weights else None, "0" * 64)


@pytest.fixture(scope="module")
def tok(): return train_tokenizer(stories(300), vocab_size=600)


@pytest.fixture(scope="module")
def tales(): return [str(s) for s in stories(300, seed=1)]


@pytest.mark.parametrize("seed, D, top, ctx, B, rows, want", [
    (0, 500, 300, 256, 4, 310, "652b513e678054dd 5aa9f40bc8cf8985 0e46fcb06b13e2ad 14b34e34b70d217a"),
    (1, 60, 3000, 128, 7, 699, "b7953a4dd827f8f5 e52d84c55337822e a21f8a20c84f60fb 655935a3c4331d85"),
    (2, 4000, 60, 64, 32, 1834, "015dc44b46c6f0cc 269475088ed309bf 80e4501092c6b711 a3a2b3ec1b752049"),
    (3, 1, 5000, 64, 8, 64, "de0f3cd3e9349f77 00a62ed18ae4fa47 6f2c6e912b224f49 4f2db6f1d14ab98a")])
def test_saved_runs_meet_the_batches_they_know(seed, D, top, ctx, B, rows, want):
    "Fingerprints made with the loader of version 0.1.0: an order that changes would spoil every run that is resumed."
    for kind in Batches, LargeBatches:
        b = kind(made_of(seed, D, top, seed == 1), ctx, B, seed=seed)
        assert (b.n_rows, [fingerprint(b[k]) for k in (0, 3, 1000, 10**6)]) == (rows, want.split())


@pytest.mark.parametrize("seed, D, top, ctx, B, block, many, want", [
    (4, 500, 300, 256, 4, 64, 0, "6ada815c657ebba0 df4a0ad0d342b9ec ca6360558fbe61c4 c968e3a517f0f318"),
    (5, 2000, 60, 64, 32, 1 << 20, 100, "c8b65bca819c6774 c1f667a56dbeb844 2c2a6e658c0ae60f b53fd2803001c1a2"),
    (6, 300, 90, 64, 8, 7, 1 << 20, "64912581e040df60 4a333e0e5bf7e181 22ee428f483b1caf 523a00f77d60384d")])
def test_saved_runs_on_large_corpora_meet_the_batches_they_know(seed, D, top, ctx, B, block, many, want):
    "The same for packing in blocks and for the computed order, with the limits set low."
    b = LargeBatches(made_of(seed, D, top), ctx, B, seed=seed, block=block, many=many)
    assert [fingerprint(b[k]) for k in (0, 3, 1000, 10**6)] == want.split()


@pytest.mark.parametrize("seed", range(40))
def test_each_token_is_a_target_once_per_epoch(seed):
    r = random.Random(seed)
    limits = dict(block=r.choice([1, 2, 7, 1 << 20]), many=r.choice([0, 1 << 20]))
    lengths = [r.choice([1, 2, r.randrange(1, 60), r.randrange(1, 400)]) for _ in range(r.randrange(1, 20))] + [2]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(np.arange(starts[-1], dtype=np.uint32), starts, np.zeros(len(lengths), np.int64), None, "")
    ctx, B, epoch = r.randrange(4, 80), r.randrange(1, 6), r.randrange(4)
    layout = r.choice(["packed", "chopped"])
    b = LargeBatches(tokens, ctx, B, seed, layout=layout, separate=r.random() < 0.5, **limits)
    parts = [LargeBatches(tokens, ctx, B, seed, rank, B, layout=layout, **limits) for rank in range(B)]
    first, last = epoch * b.n_rows, (epoch + 1) * b.n_rows        # places of this epoch; batches run over its edges
    counted = []
    for k in range(first // B, -(-last // B)):
        assert torch.equal(torch.cat([p[k].y for p in parts]), b[k].y)
        for i, (y, w) in enumerate(zip(b[k].y, b[k].w), k * B):
            if first <= i < last: counted += y[w > 0].tolist()
    want = np.ones(starts[-1], int)
    want[starts[:-1]] = 0
    assert np.array_equal(np.bincount(counted, minlength=len(want)), want)


SHARE = """
import sys, numpy as np, torch
from tiny_llm.text.batches import Batches, open_tokens
path, out, rank, world, order = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), [int(k) for k in sys.argv[5].split(",")]
b = Batches(open_tokens(path), 96, 7, seed=3, rank=rank, world=world)
np.savez(f"{out}.{rank}.npz", **{f"{k}.{n}": getattr(b[k], n).numpy() for k in order for n in ("x", "y", "w", "doc", "pos")})
"""


def test_processes_share_each_batch(tmp_path, tok, tales):
    "Three processes, 7 rows; each goes its own way through the batches, as after a resume, and together they are the batch."
    whole = Batches(tokenize(tales, tok, tmp_path/"tales"), 96, 7, seed=3)
    orders, world = ["0,1,2,40,1000000", "1000000,40,2,1,0", "2,1000000,0,40,1"], 3
    running = [subprocess.Popen([sys.executable, "-c", SHARE, tmp_path/"tales", tmp_path/"out", str(rank), str(world), order], env=environment())
               for rank, order in enumerate(orders)]
    assert [p.wait(120) for p in running] == [0, 0, 0]
    shares = [np.load(tmp_path/f"out.{rank}.npz") for rank in range(world)]
    assert [len(s["0.x"]) for s in shares] == [2, 2, 3]
    stepped = {k: b for k, b in zip(range(41), (whole[k] for k in range(41))) if k in (0, 1, 2, 40)} | {10**6: whole[10**6]}
    for k, b in stepped.items():
        for n in FIELDS: assert np.array_equal(np.concatenate([s[f"{k}.{n}"] for s in shares]), getattr(b, n).numpy()), (k, n)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_a_document_in_a_row_has_the_same_loss_as_alone(dtype, tol, tok, tales):
    "Nats per token of each document: packed with closed borders as alone, with open ones not."
    torch.manual_seed(0)
    net = Transformer(preset("tiny", vocab_size=len(tok), ctx=512)).eval()
    for p in net.parameters(): p.data *= 2 if p.dim() > 1 else 1       # louder than at the start of training: the context matters
    some = tokenize(tales[:12], tok)

    @torch.no_grad()
    def nats(x, y, doc=None, pos=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16): logits = net(x, doc, pos)
        return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")

    def in_rows(separate):
        found, b = np.zeros(len(some)), Batches(some, 512, 1, separate=separate)
        for r, row in enumerate(pack(some.lengths, 512)):
            c, at = b.take([r]), 0
            loss = nats(c.x, c.y, c.doc, c.pos)[0]
            for d, start, stop in row:
                found[d] = loss[at:at + stop - start].mean()
                at += stop - start
        return found

    ids = [torch.from_numpy(some[d].astype(np.int64))[None] for d in range(len(some))]
    alone = np.array([nats(i[:, :-1], i[:, 1:]).mean().item() for i in ids])
    packed, opened = abs(in_rows(True) - alone).max(), abs(in_rows(False) - alone).max()
    assert packed < tol and packed < opened / 5


# The index on disk

@pytest.fixture
def many(tmp_path, tok, tales):
    "A corpus with more documents than a block."
    return tokenize(tales, tok, tmp_path/"tales")


def blocks(tokens, ctx, layout="packed"): return LargeBatches(tokens, ctx, 4, layout=layout, block=64)


def test_an_index_on_disk_is_the_one_in_memory(many, tmp_path, tales, tok):
    b, memory = blocks(many, 200), blocks(tokenize(tales, tok), 200)
    assert (tmp_path/"tales.rows200"/"rows.json").exists() and isinstance(b.layout.src.base, np.memmap)
    assert all(same(b[k], memory[k]) for k in (0, 5, 100))
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path/"tales.rows200").iterdir()}
    assert same(blocks(open_tokens(tmp_path/"tales", tok), 200)[9], b[9])
    assert made == {p.name: p.stat().st_mtime_ns for p in (tmp_path/"tales.rows200").iterdir()}, "the second opens what the first made"
    assert blocks(many, 100).n_rows and not [p for p in tmp_path.iterdir() if p.name.startswith(".") and p.suffix != ".lock"]


def test_a_stale_or_damaged_index_is_made_anew(many, tmp_path, tales, tok):
    folder = tmp_path/"tales.rows200"
    want = blocks(many, 200)[3]
    for name, content in ("src.npy", b"\x93NUMPY"), ("rows.json", b"{"), ("first.npy", None):
        (folder/name).unlink() if content is None else (folder/name).write_bytes(content)
        assert same(blocks(many, 200)[3], want)
    other = tokenize(tales[::-1], tok, tmp_path/"tales")
    assert same(blocks(other, 200)[3], blocks(tokenize(tales[::-1], tok), 200)[3])


def test_many_make_the_index_at_once(many, monkeypatch):
    "Processes start together; here threads, each with a number of its own for the part."
    numbers = iter(range(100))
    monkeypatch.setattr(large_corpora.os, "getpid", lambda: next(numbers))
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: fingerprint(blocks(many, 150)[2]), range(4)))
    assert len(set(found)) == 1


def test_a_folder_that_cannot_be_written(many, tmp_path):
    (tmp_path/"tales.rows200").write_text("mine")
    with pytest.raises(UserError, match="could not be written"): blocks(many, 200)
    assert (tmp_path/"tales.rows200").read_text() == "mine"
    assert blocks(many, 200, layout="chopped").n_rows


# Workers

def test_workers_make_the_same_file(tmp_path, tok, tales):
    docs = [*tales, tok.chat([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}])] * 8
    one = tokenize(docs, tok, tmp_path/"one")
    two = corpus.tokenize(iter(docs), tok, tmp_path/"two", workers=2)
    assert (tmp_path/"one.bin").read_bytes() == (tmp_path/"two.bin").read_bytes()
    assert one.content == two.content and len(two) == len(docs)


def test_workers_in_a_script_without_a_guard(tmp_path, tok):
    tok.save(tmp_path/"tok")
    (tmp_path/"script.py").write_text("import sys\nfrom tiny_llm.text.corpus import tokenize\nfrom tiny_llm.text.tokenizer import Tokenizer\n"
                                      "try: tokenize(['a story'] * 3000, Tokenizer.load(sys.argv[1]), workers=1)\n"
                                      "except ValueError as e: print('SAID', e)\n")
    p = subprocess.run([sys.executable, tmp_path/"script.py", tmp_path/"tok"], env=environment(), capture_output=True, text=True, timeout=120)
    assert p.stdout.count("SAID the workers could not start") == 1 and "__main__" in p.stdout


def test_a_long_line_is_the_same_in_parts(tok, tales, monkeypatch):
    line = " ".join(islice(cycle(tales), 400)).replace("\n", " ")
    whole = tokenize([line], tok)
    monkeypatch.setattr(corpus, "LONG", 1000)
    assert np.array_equal(tokenize([line], tok).ids, whole.ids)


GIGABYTE = """
import random, sys
from tiny_llm.text.cleaning import clean
from tiny_llm.text.corpus import tokenize
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import Tokenizer
tales, r = [str(s) for s in stories(5000)], random.Random(0)
def generated(left=float(sys.argv[3])):
    while left > 0: doc = " ".join(r.choices(tales, k=5)); left -= len(doc); yield doc
tokens = tokenize(clean(generated()), Tokenizer.load(sys.argv[1]), sys.argv[2])
status = dict(l.split(":", 1) for l in open("/proc/self/status"))
print(tokens, "peak", int(status["VmHWM"].split()[0]) // 1000, "MB")
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_gigabyte_is_cleaned_and_tokenized_in_little_memory(tmp_path, tok):
    tok.save(tmp_path/"tok")
    p = subprocess.run([sys.executable, "-c", GIGABYTE, tmp_path/"tok", tmp_path/"big", "1e9"], env=environment(), capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    print(p.stdout)
    assert int(p.stdout.split()[-2]) < 1500 and "documents" in p.stderr, "under 1.5 GB, and progress was shown"


def test_ids_beyond_two_bytes(tok, tmp_path):
    "A vocabulary of more than 65,536 tokens is kept in four bytes, in memory and in the file."
    import tokenizers
    from tiny_llm.text.tokenizer import Tokenizer
    raw = tokenizers.Tokenizer.from_str(tok.json_text)
    raw.add_tokens([f"word{i}word" for i in range(70_000)])
    large = Tokenizer(raw, tok.template, tok.named)
    last = len(large) - 1
    for path in (None, tmp_path/"large"):
        t = tokenize([([last, 7, last - 1], [1.0, 1.0, 1.0])], large, path)
        assert {last, last - 1} <= set(np.asarray(t.ids).tolist())


def test_what_a_corpus_counts(tok):
    "The bytes that are learnt, and the predictions that are no padding; what spells a control token is not learnt from, and padding is not the end."
    ids, weights = tok.chat([dict(role="user", content="Once upon a time"), dict(role="assistant", content="Yes.")])
    assert tokenize([(ids, weights)], tok).n_bytes == len("Yes.")
    t = tokenize(["Once upon a time", "there was", "a duck"], tok)
    b = Batches(t, 8, 5)
    assert sum(batch.n_targets for batch in b.once()) == t.n_tokens < b.n_rows * 8
    own = train_tokenizer(["<|user|> <|pad|> a duck <|user|> "] * 9, vocab_size=300)
    assert {s for s in own.vocab if "<|" in s or "|>" in s} == {*own.specials, "<|pad|>"} and own.pad != own.eos


def test_a_corpus_that_changes_or_is_none_is_left_alone(tok, tmp_path):
    texts = cycle(["one duck", "two ducks"])
    with pytest.raises(UserError, match="the documents changed while they were read"): tokenize(lambda: [next(texts)], tok, cache=tmp_path)
    (tmp_path/"mine.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="mine.bin is not a tokenized corpus and is left as it is"): tokenize(["one duck"], tok, tmp_path/"mine")
    assert (tmp_path/"mine.bin").read_bytes() == b"mine"
