"""The teaching BPE against the field: golden merges, GPT-2's and SmolLM2's vocabularies beside `tokenizers` and `tiktoken`, files under other encodings.

What needs real files finds them in the folder tokenizers/ beside the folder text/ that `TINY_LLM_DATA` names, and is skipped without them.
"""
import functools, importlib.util, json, os, random, subprocess, sys, warnings
from pathlib import Path

import pydoc_data.topics, pytest, tokenizers

from tiny_llm.basics import UserError
from tiny_llm.text.bpe import BPE, train_bpe
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import GPT2_PATTERN, PATTERN, SPECIALS, Tokenizer, give_pad, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TINY_LLM_DATA") or ROOT.parent/"shared"/"data"/"text").parent
HOME = DATA/"tokenizers"
real = pytest.mark.skipif(not HOME.is_dir(), reason="needs the folder tokenizers/ beside TINY_LLM_DATA")
tiktoken_too = pytest.mark.skipif(not importlib.util.find_spec("tiktoken"), reason="needs tiktoken: pip install tiktoken")
DIGITS = dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True),
              dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)])
EMOJI = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "☺️"]
RIGHT = ["שלום עולם", "نَصٌّ عَرَبِيّ", "\u202eabc\u202c", "\u200f(א)\u200e"]


def read(path): return path.read_text(encoding="utf-8")


def random_text(seed):
    "Characters of all planes, with combining marks, emoji sequences, right-to-left text and control characters among them."
    r = random.Random(seed)
    draws = [lambda: chr(r.randrange(128)), lambda: chr(r.randrange(0x3000)), lambda: chr(r.randrange(0xD800)),
             lambda: chr(r.randrange(0xE000, 0x110000)), lambda: chr(r.randrange(97, 123)) + chr(r.randrange(0x300, 0x370)),
             lambda: r.choice(EMOJI), lambda: r.choice(RIGHT), lambda: chr(r.choice([*range(32), *range(127, 160)])),
             lambda: r.choice([" ", "  ", "\n", "\r\n", "\u3000", "'s", "'LL", "12", "<|endoftext|>", "<|im_end|>"])]
    return "".join(r.choice(draws)() for _ in range(r.randrange(30)))


@functools.cache
def gpt2(): return BPE.load(HOME/"gpt2")


@functools.cache
def smollm2(): return BPE.load(HOME/"smollm2", pattern=DIGITS)


@functools.cache
def in_tiktoken():
    import tiktoken
    tok = gpt2()
    ranks = {name: i for i, name in tok.names.items() if i != tok.specials["<|endoftext|>"]}
    return tiktoken.Encoding("gpt2 offline", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=tok.specials)


# The trainer

@real
def test_golden_merges_and_vocabulary():
    "All 243 merges in order, and all 500 ids; ties toward the greater pair of byte strings."
    where = HOME/"bpe_golden"
    tok = train_bpe(read(where/"corpus.en"), 500, pattern=GPT2_PATTERN, specials=["<|endoftext|>"], ties="bytes")
    golden = [tuple(line.rsplit(" ", 1)) for line in read(where/"train-bpe-reference-merges.txt").splitlines()]
    assert len(golden) == 243 and tok.merges == golden
    assert tok.file["model"]["vocab"] == json.loads(read(where/"train-bpe-reference-vocab.json"))


@functools.cache
def corpora():
    prose = pydoc_data.topics.topics.values()
    code = [Path(m.__file__).read_text(encoding="utf-8") for m in (functools, subprocess, random, warnings, pytest, json)]
    return dict(stories=[str(s) for s in stories(2000)], manual=list(prose), code=code)


@pytest.mark.parametrize("name, size", [("stories", 1500), ("manual", 3000), ("code", 2000)])
def test_the_same_tokenizer_as_the_library(name, size):
    "Ties toward the smallest pair of ids: the same merges in the same order, the same file."
    docs = corpora()[name]
    ours, theirs = train_bpe(docs, size), train_tokenizer(docs, size)
    assert len(ours) == size and ours.merges == [tuple(m) for m in json.loads(theirs.json_text)["model"]["merges"]]
    assert BPE(give_pad(ours.file)).tokenizer().hash == theirs.hash


@pytest.mark.slow
@real
@pytest.mark.parametrize("name", ["tinyshakespeare", "fairytales", "tinystories"])
def test_the_same_merges_on_real_text(name):
    docs = read(DATA/"text"/f"{name}.txt").split("<|endoftext|>")
    assert BPE(give_pad(train_bpe(docs, 8192).file)).tokenizer().hash == train_tokenizer(docs, 8192).hash


# The encoder

def agree(texts, tok, *others):
    library = tok.tokenizer()
    for s in texts:
        ids = tok.encode(s)
        assert ids == library.encode(s), ascii(s)
        for other in others: assert ids == other.encode_ordinary(s), ascii(s)
        assert tok.decode(ids) == s, ascii(s)
        assert tok.encode_bytes(s.encode()) == ids and tok.decode_bytes(ids) == s.encode(), ascii(s)


@real
@tiktoken_too
def test_gpt2_ids_of_random_text():
    agree(map(random_text, range(2000)), gpt2(), in_tiktoken())
    assert gpt2().encode("Hello, world!") == [15496, 11, 995, 0] and len(gpt2()) == 50257


@pytest.mark.slow
@real
@tiktoken_too
def test_gpt2_ids_of_100_000_random_texts(): agree(map(random_text, range(100_000)), gpt2(), in_tiktoken())


@pytest.mark.slow
@real
@tiktoken_too
def test_gpt2_ids_of_10_mb_of_books():
    data = (DATA/"text"/"childrens_books.txt").read_bytes()[:10_000_000]
    agree([data.decode("utf-8", "ignore")], gpt2(), in_tiktoken())


@real
def test_smollm2_has_the_ids_of_the_library():
    "It lacks 21 bytes. The library drops what needs them; here that is an error, never a silent loss."
    tok, library, refused = smollm2(), smollm2().tokenizer(), 0
    for s in map(random_text, range(400)):
        try: ids = tok.encode(s)
        except UserError as e:
            assert "no token for byte 0x" in str(e) and library.decode(library.encode(s)) != s
            refused += 1
            continue
        assert ids == library.encode(s) and tok.decode(ids) == s, ascii(s)
    assert 0 < refused < 400 and len(tok.start) == 256 - 21 and len(tok) == 49152


@pytest.mark.parametrize("make", [pytest.param(gpt2, marks=real), lambda: train_bpe(corpora()["stories"][:300], 700)], ids=["gpt2", "ours"])
def test_any_bytes_come_back(make):
    tok = make()
    for seed in range(1000):
        r = random.Random(seed)
        data = r.choice([r.randbytes(r.randrange(50)), random_text(seed).encode()[r.randrange(4):], b"\xed\xa0\xbd", b"\xf8\xff\x00"])
        assert tok.decode_bytes(tok.encode_bytes(data)) == data


def test_lone_surrogates_are_refused():
    ours = train_bpe("abab", 258, specials=SPECIALS[:1])
    for tok in ours, ours.tokenizer():
        for s in "\ud83d", "ab\udc00", "x" * 1000 + "\ud800" + "y":
            with pytest.raises(UserError, match=rf"character {len(s.rstrip('y')) - 1} .* half of a surrogate pair"): tok.encode(s)
    with pytest.raises(UserError, match="surrogate"): train_bpe(["fine", "\udfff"])


def test_a_chunk_of_100_000_equal_letters():
    "Quadratic time would be minutes."
    tok = train_bpe(["a" * n for n in range(1, 40)] * 2, 280, specials=[])
    assert tok.encode("a" * 100_001) == tok.tokenizer().encode("a" * 100_001)


# Files

WORK = """
import sys, warnings
from pathlib import Path
from tiny_llm.text.bpe import BPE, train_bpe
from tiny_llm.text.tokenizer import Tokenizer
folder, what = Path(sys.argv[1]), sys.argv[2]
docs = ["na\\u00efve \\u0434\\u043e\\u043c <|\\u00ab fin \\u00bb|> \\U0001f600 " * 9]
if what == "save": train_bpe(docs, 300, pattern=" [^ ]+| ", specials=["<| my mark |>", " \\u00ab fin \\u00bb "]).save(folder)
bpe, tok = BPE.load(folder), Tokenizer.load(folder)
text = docs[0] + "a<| my mark |>b \\u00ab fin \\u00bb "
assert bpe.encode(text) == tok.encode(text) and bpe.encode(text, special=True) == tok.encode(text, special=True)
assert bpe.decode(bpe.encode(text, special=True)) == text
if what == "save":
    tok.save(folder/"again")
    (folder/"pair").mkdir()
    import json
    (folder/"pair"/"vocab.json").write_text(json.dumps(bpe.file["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder/"pair"/"merges.txt").write_text("#version: 0.2\\n" + "\\n".join(map(" ".join, bpe.merges)), encoding="utf-8")
pair = BPE.load(folder/"pair", pattern=" [^ ]+| ")
assert pair.encode(text, special=True) == bpe.encode(text, special=True)
print(tok.hash, Tokenizer.load(folder/"again").hash, sys.flags.utf8_mode, __import__("locale").getpreferredencoding(False))
"""


def test_files_do_not_depend_on_the_platforms_encoding(tmp_path):
    "Written under ASCII, read under UTF-8, and the other way round."
    plain = dict(PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="latin-1")
    seen = set()
    for n, (first, then) in enumerate([(plain, dict(PYTHONUTF8="1")), (dict(PYTHONUTF8="1"), plain)]):
        for what, change in ("save", first), ("load", then):
            done = subprocess.run([sys.executable, "-c", WORK, str(tmp_path/str(n)), what], env={**os.environ, **change}, cwd=ROOT,
                                  capture_output=True, text=True)
            assert not done.returncode, done.stderr
            hash, again, utf8, encoding = done.stdout.split()
            assert hash == again and (utf8 == "1") == (change is not plain)
            seen.add((hash, encoding.lower()))
    assert len({h for h, _ in seen}) == 1 and len({e for _, e in seen}) == 2, seen


@pytest.mark.parametrize("size, pattern, specials", [(256, r" ?\p{L}+| ", []), (257, " x | ", ["a b"]), (700, PATTERN, ["<| my mark |>", " "]),
                                                     (2000, "  |né |[^ ]+ ?", ["end ", "«fin»", "｜末尾▁｜"])])
def test_one_file_for_all(tmp_path, size, pattern, specials):
    from transformers import AutoTokenizer
    a = train_bpe(corpora()["manual"][:40], size, pattern=pattern, specials=specials)
    assert len(a) == size
    a.save(tmp_path)
    b, tok, hf = BPE.load(tmp_path), Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    lib = tokenizers.Tokenizer.from_file(str(tmp_path/"tokenizer.json"))
    assert (b.specials, b.merges, b.names, b.file["pre_tokenizer"]) == (a.specials, a.merges, a.names, a.file["pre_tokenizer"])
    assert (len(tok), lib.get_vocab_size(), len(hf)) == (size,) * 3
    for s in [*map(random_text, range(100)), *(f"x{t}y {t}{t}" for t in specials)]:
        assert a.encode(s) == b.encode(s) == tok.encode(s), ascii(s)
        marked = a.encode(s, special=True)
        assert marked == b.encode(s, special=True) == tok.encode(s, special=True) == lib.encode(s).ids == hf.encode(s, add_special_tokens=False)
        assert b.decode(marked) == s


@real
@pytest.mark.parametrize("make", [gpt2, pytest.param(smollm2, marks=pytest.mark.slow)])
def test_large_vocabularies_are_saved_whole(tmp_path, make):
    from transformers import AutoTokenizer
    a = make()
    a.save(tmp_path)
    b, hf = BPE.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (len(b), len(hf)) == (len(a),) * 2 and b.file["pre_tokenizer"] == a.file["pre_tokenizer"]
    for s in (s for s in map(random_text, range(300)) if all(ord(c) < 0x3000 and c.isprintable() for c in s)):
        assert a.encode(s) == b.encode(s) and hf.encode(s, add_special_tokens=False) == a.encode(s, special=True)


@pytest.mark.parametrize("train", [train_bpe, train_tokenizer])
@pytest.mark.parametrize("docs, merges", [("a rose is a rose is a rose", 7), ([], 0), ("", 0), (["abc"], 0)])
def test_a_corpus_too_small_says_so_and_stops(train, docs, merges):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tok = train(docs, 1024)
    assert len(tok) == 261 + merges and len(said) == 1, (len(tok), said)
    assert "too small for 1024 tokens" in str(said[0].message) and str(merges if train is train_bpe else len(tok)) in str(said[0].message)
    assert tok.decode(tok.encode("naïve 😀")) == "naïve 😀"


# Special tokens

@pytest.mark.parametrize("make", [lambda: train_bpe(corpora()["stories"][:200] + ["<|end|> <|user|>"] * 50, 600), pytest.param(gpt2, marks=real),
                                  pytest.param(smollm2, marks=real)], ids=["ours", "gpt2", "smollm2"])
def test_text_that_spells_a_special_token_is_text(make):
    "All splits of all special tokens, between words and beside each other; asked for by name, all together, or not, call by call."
    ours = make()
    for tok in ours, ours.tokenizer():
        control = set(tok.specials.values())
        for s in list(tok.specials)[:5]:
            one = {tok.specials[s]}
            for i in range(len(s) + 1):
                for text in (s, s[:i] + s + s[i:], f"so {s[:i]} {s}{s[i:]}", f"\n{s}{s}x"):
                    assert not control & set(tok.encode(text)) and tok.decode(tok.encode(text)) == text, (tok, text)
                    asked = tok.encode(text, special={s})
                    assert control & set(asked) == one and tok.decode(asked) == text
                    assert [i for i in asked if i in control] == [i for i in tok.encode(text, special=True) if i in one]
                    assert not control & set(tok.encode(text, special=set())) | control & set(tok.encode(text, special=False))
                assert i in (0, len(s)) or not control & set(tok.encode(s[:i], special=True) + tok.encode(s[i:], special=True))
        with pytest.raises(UserError, match="no special token"): tok.encode("x", special={"<|nothing|>"})


def test_no_merge_makes_a_special_token():
    "Documents full of a mark, in a pattern that would let it be learnt."
    docs = ["so <|end|> it <|end|> goes"] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [train(docs, 400, pattern=r"\S+|\s+") for train in (train_bpe, train_tokenizer)]
    for tok in made: assert tok.specials["<|end|>"] not in tok.encode("<|end|> so <|end|>") and tok.decode(tok.encode("<|end|>")) == "<|end|>"
    assert BPE(give_pad(made[0].file)).tokenizer().hash == made[1].hash


def test_added_tokens_that_are_not_special_are_asked_for_too():
    "The file's flags hold where a token is asked for; typed text never gives one, and comes back whole."
    tk = train_tokenizer(corpora()["stories"][:100], 500).tk
    tk.add_tokens([tokenizers.AddedToken("    ", normalized=False), tokenizers.AddedToken("<tool>", normalized=False, lstrip=True),
                   tokenizers.AddedToken("once", rstrip=True), tokenizers.AddedToken("Öl", single_word=True)])
    tk.add_special_tokens([tokenizers.AddedToken("<mask>", special=True, lstrip=True, normalized=False),
                           tokenizers.AddedToken("<w>", special=True, single_word=True, normalized=False)])
    tok = Tokenizer(tk)
    ours, added = BPE(json.loads(tok.json_text)), {t["id"] for t in tok.added.values()}
    for s in ["a    b", "x  <tool>y", "one  <mask> two", "a<w>b <w> c", "once  upon Öl Ölo", *map(random_text, range(50))]:
        for special in False, True, set(tok.added), {"<tool>", "once"}: assert ours.encode(s, special) == tok.encode(s, special), (s, special)
        assert not added & set(tok.encode(s)) and tok.decode(tok.encode(s)) == ours.decode(tok.encode(s)) == s
        assert tok.encode(s, True) == tok.encode(s, set(tok.added)) == tok._control.encode(s, add_special_tokens=False).ids


# Text without spaces

def test_long_chunks_are_cut_for_training_alone():
    "A chunk of at most 100 characters is learnt whole; a longer one as its pieces; encoding knows no such limit."
    r = random.Random(0)
    long, short = "".join(r.choices("acgt", k=50_000)), ["".join(r.choices("acgt", k=100)) for _ in range(50)]
    pieces = [long[i:i + 100] for i in range(0, len(long), 100)]
    for train in train_tokenizer, train_bpe:
        whole, cut = (train([*docs, *short], 500) for docs in ([long], pieces))
        assert (whole.encode(long), len(whole)) == (cut.encode(long), 500) and whole.decode(whole.encode(long)) == long
    assert train_bpe([long], 500).merges == [tuple(m) for m in json.loads(train_tokenizer([long], 500).json_text)["model"]["merges"]]


TRAIN = """
import random
from tiny_llm.text.tokenizer import train_tokenizer
def docs():
    print("reading", flush=True)
    yield "".join(chr(0x4E00 + random.randrange(3000)) for _ in range(1_000_000))
    print("read", flush=True)
train_tokenizer(docs(), 8000)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("wait", [0.0, 1.5])
def test_ctrl_c_ends_training_at_once(wait):
    "The library's own trainer would finish first, after ten seconds and more."
    import signal, time
    with subprocess.Popen([sys.executable, "-c", TRAIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as p:
        assert p.stdout.readline() == "reading\n" and p.stdout.readline() == "read\n"
        time.sleep(wait)
        start = time.monotonic()
        p.send_signal(signal.SIGINT)
        said = p.communicate(timeout=60)[1]
    assert said.rstrip().endswith("KeyboardInterrupt") and time.monotonic() - start < 10, said     # alone, the library takes ten seconds and more on a quiet machine


# What other programs find in the folder

def test_others_begin_as_we_do_and_find_the_assistants_words(tmp_path):
    from transformers import AutoTokenizer
    tok = train_tokenizer(corpora()["stories"][:200], 600)
    tok.save(tmp_path, ctx=4096)
    for theirs in AutoTokenizer.from_pretrained(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path/"tokenizer.json")):
        for s in ["", "Once upon a time", "  two\n", "né 😀", *map(random_text, range(30))]:
            ids = theirs(s).input_ids if callable(theirs) else theirs.encode(s).ids
            assert ids == [tok.bos, *tok.encode(s, special=True)], ascii(s)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token == "<|pad|>" and theirs.pad_token_id == tok.pad not in (tok.eos, tok.end)
    def say(*said): return [dict(role=r, content=c) for r, c in said]
    for talk in (say(("user", "Hi"), ("assistant", "Hello.")), say(("system", "s"), ("user", "<|end|>"), ("assistant", "😀 né "), ("user", "b"), ("assistant", "")),
                 say(("user", "alone")), say(("assistant", "I begin"), ("assistant", "and go on")), say(("user", "<|pad|>"), ("assistant", "<|assistant|>x"))):
        got = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, weights = tok.chat(talk)
        assert got["input_ids"] == ids and ids.count(tok.bos) == 1
        assert got["assistant_masks"] == [int(w) for w in weights]
    theirs.save_pretrained(tmp_path/"again")
    assert Tokenizer.load(tmp_path/"again").hash == tok.hash


OLD_TEMPLATE = ("{{- bos_token -}}{%- for message in messages -%}{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] | replace('<|', '< |') ~ '<|end|>' -}}"
                "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}")


def test_folders_of_before_open(tmp_path):
    "No token for padding, no post-processor, another template: the same ids, the same chat, the same hash after saving."
    old = train_bpe(corpora()["stories"][:200], 600)
    (tmp_path/"tokenizer.json").write_text(json.dumps(old.file), encoding="utf-8")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                                                  chat_template=OLD_TEMPLATE)), encoding="utf-8")
    tok, new = Tokenizer.load(tmp_path), train_tokenizer(corpora()["stories"][:200], 600)
    talk = [dict(role="user", content="Hi <|end|>"), dict(role="assistant", content="Hello.")]
    assert tok.pad == tok.eos and tok.template == OLD_TEMPLATE and tok.chat(talk) == new.chat(talk)
    assert [tok.encode(s) for s in corpora()["stories"][:50]] == [new.encode(s) for s in corpora()["stories"][:50]]
    tok.save(tmp_path/"saved")
    assert Tokenizer.load(tmp_path/"saved").hash == tok.hash and BPE.load(tmp_path/"saved").encode("Once") == tok.encode("Once")


def test_a_files_truncation_and_padding_are_left_out():
    "A tokenizer.json may ask for both; ids would be lost, or added."
    tok = train_tokenizer(stories(20), vocab_size=300)
    asked = tokenizers.Tokenizer.from_str(tok.json_text)
    asked.enable_truncation(5)
    asked.enable_padding(length=600)
    other = Tokenizer(tokenizers.Tokenizer.from_str(asked.to_str()))
    for text in ("Hi", stories(1)[0]): assert other.encode(text) == tok.encode(text) == BPE(json.loads(other.json_text)).encode(text)


def test_of_two_marks_the_longer_is_read():
    bpe = train_bpe(stories(20), 300, specials=["<a", "<a>", "<a><b>"])
    assert [bpe.encode(t, special=True)[:1] for t in ("<a", "<a>", "<a><b>")] == [[0], [1], [2]]
    assert bpe.encode("<a><a><b>", special=True) == [1, 2]


def test_the_chunks_that_are_kept_are_bounded():
    from tiny_llm.text.bpe import KEEP, _Known
    known = _Known(list)
    for i in range(KEEP + 3): assert known[str(i)] == list(str(i).encode())
    assert len(known) <= KEEP
