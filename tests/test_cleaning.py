"""Cleaning at scale: 1 GB of generated text through `clean` and `tokenize` in a process whose memory is read, and inputs that no notebook holds.

    pytest tests/test_cleaning.py                    # seconds
    pytest tests/test_cleaning.py --slow             # 1 GB: minutes
    TINY_LLM_GB=0.1 pytest tests/test_cleaning.py --slow -s -k gigabyte   # less, and see the progress
"""
import json, os, random, subprocess, sys

import pytest

from tiny_llm.text.cleaning import BLOCK_CHARS, FILTERS, Report, clean, leak
from tiny_llm.text.stories import stories

GIGABYTE = r"""
import json, os, random, resource, sys, tempfile, time
from tiny_llm.text.cleaning import Report, clean
from tiny_llm.text.batches import tokenize
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer

size, folder = float(sys.argv[1]) * 1e9, sys.argv[2]
tales = [str(s) for s in stories(2000)]
sentences = [s + "." for t in tales for s in t.split(". ")]
BAD = {"error page": lambda d: "404: Not Found\n" + "Reference #" + str(len(d)), "markup": lambda d: "<p>" + d.replace(". ", ".</p><p>"),
       "damage": lambda d: d.replace(".", "â€œ"), "few letters": lambda d: "1.5 | " * 150, "repetitive": lambda d: d[:60] * 20,
       "blob": lambda d: d[:300] + "QUJD" * 200, "too short": lambda d: d[:10]}
planted = dict.fromkeys([*BAD, "exact duplicate", "near duplicate"], 0)

def documents():
    "Sentences of stories in new orders, about 1 KB each; one document in ten is a plant."
    rng, made, n, kinds = random.Random(0), 0, 0, list(planted)
    last = []
    while made < size:
        n += 1
        doc = " ".join(rng.choices(sentences, k=20))
        if n % 10 == 0 and len(last) == 1000:
            kind = kinds[n // 10 % len(kinds)]
            if kind == "exact duplicate": doc = rng.choice(last)
            elif kind == "near duplicate": doc = rng.choice(last) + f" The end of number {n}."
            else: doc = BAD[kind](doc)
            planted[kind] += 1
        elif len(last) < 1000: last.append(doc)
        elif n % 97 == 0: last[n % 1000] = doc
        made += len(doc)
        yield doc

tok = train_tokenizer(tales, vocab_size=4096)
peak = lambda who: resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
before, report, start = peak(resource.RUSAGE_SELF), Report(), time.perf_counter()
tokens = tokenize(clean(documents(), report=report), tok, os.path.join(folder, "corpus"))
print(json.dumps(dict(bytes=report.total[1], documents=report.total[0], seconds=time.perf_counter() - start, before=before, peak=peak(resource.RUSAGE_SELF),
                      children=peak(resource.RUSAGE_CHILDREN), tokens=int(tokens.n_tokens), kept=report.kept, planted=planted,
                      found={k: v[0] for k, v in report.dropped.items()}, same=tokens.n_bytes == report.kept[1])))
"""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_gigabyte_in_constant_memory(tmp_path):
    "Clean and tokenize hold under 1.5 GB, workers included, find every plant, lose nothing else, and show how far they are."
    gb = float(os.environ.get("TINY_LLM_GB", 1))
    out = subprocess.run([sys.executable, "-c", GIGABYTE, str(gb), str(tmp_path)], capture_output=True, text=True, timeout=7000)
    assert out.returncode == 0, out.stderr[-3000:]
    got = json.loads(out.stdout.splitlines()[-1])
    print(json.dumps(got, indent=1))
    print(repr(out.stderr[-300:]))
    assert got["bytes"] >= gb * 1e9 and got["same"] and got["peak"] + got["children"] < 1.5
    assert "clean:" in out.stderr and "documents kept" in out.stderr, "no progress was shown"
    for kind, n in got["planted"].items():
        assert 0.97 * n <= got["found"].get(kind, 0) <= n + 0.001 * got["documents"], (kind, n, got["found"])
    assert sum(got["found"].values()) - sum(got["planted"].values()) <= 0.0001 * got["documents"], "good documents were dropped"


def test_what_is_planted_is_found_and_nothing_else():
    rng, tales = random.Random(1), [str(s) for s in stories(3000, seed=5)]
    bad = {"404: Not Found": "error page", "<div><br/></div>" * 9: "markup", "spam eggs " * 99: "repetitive", "0 1 2 3 4 5 6 7 8 9 " * 9: "few letters",
           "Zm9v" * 99: "blob", "Itâ€™s" * 9: "damage", "Hm.": "too short"}
    docs = [*tales, *bad, *(tales[i] for i in range(0, 600, 2)), *(t + " " + t[:30] for t in tales[1:601:2])]
    rng.shuffle(docs)
    report = Report()
    kept = list(clean(docs, report=report, progress=False))
    assert {k: n for k, (n, _) in report.dropped.items() if "duplicate" not in k} == dict.fromkeys(bad.values(), 1)
    assert report.dropped["exact duplicate"][0] >= 290 and sum(report.dropped[f"{k} duplicate"][0] for k in ("exact", "near")) >= 590
    assert report.kept[0] >= 3000 - 10 and report.total == [len(docs), sum(len(d.encode()) for d in docs)]
    assert [d for d in docs if d in set(kept)][:50] == kept[:50], "the order stays"


@pytest.mark.parametrize("name", FILTERS)
def test_filters_take_any_text(name):
    f = FILTERS[name]
    odd = ["", " ", "\n" * 50, "\ud800", "\x00" * 300, "a" * 300_000, "<" * 5000, "&" * 5000, "[[" * 5000, "{{" * 5000, "'" * 5000, "(" * 5000, "\u0301" * 3000,
           "🙂" * 3000, "א" * 3000, "\u202e abc " * 30, "not found " * 150, "Ã" * 4000, "<b " * 4000]
    for text in odd: assert f(text) is None or isinstance(f(text), str)


def test_a_long_line_is_one_document():
    "5 MB without a line end: no filter is slower than linear, and the pieces of the hashes meet."
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(5000)]
    line = " ".join(rng.choices(words, k=900_000))
    report = Report()
    assert list(clean([line, line, line[:-30] + " some other end of it all"], report=report, progress=False)) == [line]
    assert {k: n for k, (n, _) in report.dropped.items()} == {"exact duplicate": 1, "near duplicate": 1}
    found = leak([line], [line[3 * BLOCK_CHARS - 2000:3 * BLOCK_CHARS + 2000], "not there at all, whatever anyone may look for"])
    assert found["characters"] == pytest.approx(4000 / 4046) and found["longest"][0]["characters"] == 4000


def test_order_does_not_change_what_exact_duplicates_leave():
    docs = [str(s) for s in stories(200, seed=3)] * 2
    a = set(clean(docs, near=None, progress=False))
    random.Random(0).shuffle(docs)
    assert set(clean(docs, near=None, progress=False)) == a and len(a) == 200


def test_progress_goes_to_standard_error_only(tmp_path):
    code = "from tiny_llm.text.cleaning import clean; print(len(list(clean(['a story that is long enough', 'no'] * 3))))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "1\n" and out.stderr.startswith("clean: 1 kept, 3 too short, 2 exact duplicate"), out


def test_a_report_shows_three_examples():
    report = Report()
    list(clean(["x"] * 2 + [f"{i}" for i in range(8)], near=None, report=report, progress=False))
    assert {name: len(shown) for name, shown in report.examples.items()} == {"too short": 3}


def test_a_leak_behind_the_first_block_of_a_long_text():
    "Where in a text of several blocks the shared stretch lies."
    r = random.Random(0)
    def noise(n): return "".join(r.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(n))
    planted = noise(300)
    for at in (10, BLOCK_CHARS - 100, BLOCK_CHARS + 5000, 2 * BLOCK_CHARS + 70_000):
        long = noise(3 * BLOCK_CHARS)
        long = long[:at] + planted + long[at:]
        found = leak([noise(1000) + planted + noise(1000)], [long])["longest"][0]
        assert 300 <= found["characters"] < 310 and found["text"][:80] in long[at - 5:at + 95]
