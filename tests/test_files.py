"""What was written comes back, or one line says why not: every kind of file, with every encoding, line end, packing and shape of rows.

The figures of the property tests are set in conftest.py: 200 cases each by default, 10,000 with `--slow`.
"""
import bz2, csv, gzip, io, json, lzma, tempfile
from contextlib import redirect_stderr
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from test_cli import same_process
from tiny_llm.basics import UserError
from tiny_llm.assistant.finetune import as_messages, hold_out, read_conversations
from tiny_llm.text.sources import documents, guess_coding, held_out, read

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}
CODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "latin-1": b""}
MARKS = {",": ".csv", ";": ".csv", "\t": ".csv", "|": ".csv", "tsv": ".tsv"}

# all of Unicode that a text file can hold: no zero, no half of a pair, no old line end (it is written as one of the three)
letters = st.one_of(st.sampled_from(list(' \n\t",;|\'aäß語🦆<>{}[]:')), st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]))
texts = st.text(letters, max_size=30)
spoken = texts.filter(str.strip)


def put(folder, name, data, coding="utf-8", end="\n", pack=""):
    "Write text (or bytes) as a file of that encoding, line end and packing."
    if isinstance(data, str): data = CODINGS[coding] + data.replace("\n", end).encode(coding)
    (Path(folder)/(name + pack)).write_bytes(PACK[pack](data))
    return Path(folder)/(name + pack)


def table(rows, mark):
    "Rows as a table whose columns `mark` separates."
    out = io.StringIO(newline="")
    csv.writer(out, delimiter="\t" if mark == "tsv" else mark, lineterminator="\n").writerows(rows)
    return out.getvalue()


def parquet(rows):
    "Rows as the bytes of a Parquet file."
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def all_of(f, *a, **kw):
    "What a reader gives, or the one line with which it refuses."
    with redirect_stderr(io.StringIO()):
        try: return f(*a, **kw)
        except UserError as e:
            assert str(e) and "\n" not in str(e), str(e)
            return str(e)


def is_utf8(data):
    try: return bool(data.decode()) or True
    except UnicodeDecodeError: return False


@given(st.lists(texts, min_size=1, max_size=5), st.sampled_from([".txt", ".py", ".jsonl", ".ndjson", ".json", "lines.json", ".parquet", *MARKS]),
       st.sampled_from([*CODINGS]), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([*PACK]), st.booleans())
def test_texts_come_back(docs, kind, coding, end, pack, many):
    "Documents, some of them empty, as a file of any kind."
    if coding == "latin-1": docs = [d.encode("latin-1", "ignore").decode("latin-1") for d in docs]
    rows = [{"id": str(i), "text": d} for i, d in enumerate(docs)] if many else [{"text": d} for d in docs]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    kept = [d for d in docs if d.strip()]
    with tempfile.TemporaryDirectory() as folder:
        if kind in (".txt", ".py"): name, data = "a" + kind, "\n<|endoftext|>\n".join(docs)
        elif kind == ".parquet": name, data = "a.parquet", parquet(rows)
        elif kind == ".json": name, data = "a.json", json.dumps(rows, ensure_ascii=False, indent=1)
        elif kind in MARKS: name, data = "a" + MARKS[kind], table([list(rows[0]), *(list(r.values()) for r in rows)], kind)
        else: name, data = "a.json" if kind == "lines.json" else "a" + kind, lines
        if kind in (".txt", ".py") and len(docs) > 1: data += "\n"         # the last line end of a file with marks is the file's
        got = all_of(documents, put(folder, name, data, coding, end, pack), "all")
    if not kept: assert isinstance(got, str) and any(says in got for says in ("no text", "holds one dict", "is not UTF-8")), got
    elif kind == ".parquet": assert got == kept
    elif coding == "latin-1" and not is_utf8(data.encode(coding)): assert "is not UTF-8" in got, got
    elif coding == "latin-1" and not data.isascii(): pass              # by chance it is UTF-8 too: nobody can tell
    elif kind == "lines.json" and len(docs) == 1: assert "holds one dict" in got
    else: assert got == kept, (got, kept)


SAID = {"user": "human", "assistant": "gpt", "system": "system"}

def written(kind, messages):
    "A conversation as a row in one of the ways of the field, and the one way that it must be read as."
    ask, reply = messages[0]["content"], messages[1]["content"]
    return {"messages": {"messages": messages}, "sharegpt": {"conversations": [{"from": SAID[m["role"]], "value": m["content"]} for m in messages]},
            "alpaca": {"instruction": ask, "input": "", "output": reply}, "pair": {"prompt": ask, "completion": reply},
            "lists": {"prompt": messages[:1], "completion": messages[1:]}, "qa": {"question": ask, "answer": reply},
            "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]}}[kind]


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from(["messages", "sharegpt", "alpaca", "pair", "lists", "qa", "parts"]),
       st.sampled_from([".jsonl", ".json", ".parquet", *MARKS]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"]),
       st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([*PACK]))
def test_conversations_come_back(pairs, way, kind, coding, end, pack):
    "Conversations, some of them with nothing said, as rows of any shape in a file of any kind."
    chats = [[dict(role="user", content=a), dict(role="assistant", content=b)] for a, b in pairs]
    kept = [c for c in chats if all(m["content"].strip() for m in c)]
    rows = [written(way, c) for c in chats]
    if kind in MARKS:
        cells = [[v if isinstance(v, str) else json.dumps(v) for v in r.values()] for r in rows]
        name, data = "a" + MARKS[kind], table([list(rows[0]), *cells], kind)
    elif kind == ".parquet": name, data = "a.parquet", parquet(rows)
    else: name, data = "a" + kind, "".join(json.dumps(r) + "\n" for r in rows) if kind == ".jsonl" else json.dumps(rows)
    with tempfile.TemporaryDirectory() as folder: got = all_of(read_conversations, put(folder, name, data, coding, end, pack))
    if kept: assert got == kept, (got, kept)
    else: assert "row 1 of" in got and "nothing to learn" not in got and "empty message" in got, got


@given(st.binary(max_size=60), st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt.gz", ".csv.xz", ".jsonl.zst"]))
def test_any_bytes_are_read_or_refused_in_a_line(data, kind):
    with tempfile.TemporaryDirectory() as folder:
        for f, more in (documents, ["all"]), (read_conversations, []):
            (Path(folder)/("a" + kind)).write_bytes(data)
            assert all_of(f, Path(folder)/("a" + kind), *more) is not None


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=90), st.integers(0, 5))
def test_what_is_held_out_is_not_learnt_from(ids, seed):
    pairs = [(i, [1.0] * len(i)) for i in ids]
    with redirect_stderr(io.StringIO()): kept, drawn = hold_out(pairs, seed)
    different = {tuple(i) for i in ids}
    assert {tuple(i) for i, _ in kept} | {tuple(i) for i, _ in drawn} == different and not {tuple(i) for i, _ in kept} & {tuple(i) for i, _ in drawn}
    assert len(drawn) == (max(1, len(different) // 20) if len(different) > 1 else 0)


@given(st.lists(st.text("ab .\n", min_size=1, max_size=400).filter(str.strip), min_size=1, max_size=8, unique=True))
def test_splits_share_nothing_and_cut_no_word(docs):
    parts = [all_of(documents, docs, s) for s in ("train", "val", "test")]
    parts = [[] if isinstance(p, str) else p for p in parts]
    assert "".join("".join(sum(parts, [])).split()) == "".join("".join(docs).split()) and parts[0]
    words = {w for d in docs for w in d.split()}
    assert {w for p in parts for d in p for w in d.split()} <= words
    if sum(map(len, docs)) < 1000: assert sum(parts, []) == docs


# One by one ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mark", [";", "\t", "|", "^", ":"])
def test_a_table_is_not_one_column_of_whole_lines(tmp_path, mark):
    put(tmp_path, "a.csv", f"id{mark}text\n1{mark}One, two.\n2{mark}Three.\n")
    assert documents(tmp_path/"a.csv", "all") == ["One, two.", "Three."]


@pytest.mark.parametrize("head", ["note: all", "a long name", "text"])
def test_one_column_with_colons_and_spaces_stays_one(tmp_path, head):
    texts = ["We left at 9:30.", "At 10:15:20 it rained", "Home"]
    put(tmp_path, "a.csv", "\n".join([head, *texts, ""]))
    assert documents(tmp_path/"a.csv", "all") == texts


@pytest.mark.parametrize("name, data, says", [
    ("a.csv", "text,id,text\na,1,b\n", "2 columns of the name 'text'"), ("a.csv", "id;text\n1;a;b\n", "2 columns, but 3 fields in the row that begins in line 2"),
    ("a.csv", "id;text,raw\n1;a, b\n", "cannot be told: its header holds commas and semicolons"), ("a.jsonl", '{"text": "a", "text": "b"}', "has the name 'text' twice"),
    ("a.csv", "id  text\n1   One, two.\n2   Three.\n", "set apart by spaces: 'id  text'"), ("a.csv", "id text\n1 One\n2 Two\n3 Three\n", "set apart by spaces: 'id text'"),
    ("a.csv", 'text\n"one" two\n', "the end of the field expected after"), ("a.tsv", "text\ttext\na\tb\n", "2 columns of the name 'text'")])
def test_a_table_that_would_lose_something_is_refused(tmp_path, name, data, says):
    put(tmp_path, name, data)
    assert says in all_of(documents, tmp_path/name, "all")


@pytest.mark.parametrize("kind", [".txt", ".py", ".md", ".txt.gz"])
def test_a_file_s_text_is_the_file_s_text(tmp_path, kind):
    text = "\n    indented = 1\n  less = 2\n\n"
    put(tmp_path, "a" + kind.removesuffix(".gz"), text, pack=".gz" if kind.endswith(".gz") else "")
    put(tmp_path, "b.jsonl", json.dumps({"text": text}))
    assert documents(tmp_path/f"a{kind}", "all") == documents(tmp_path/"b.jsonl", "all") == [text]


def test_nothing_is_held_out_of_a_short_document(tmp_path, capsys):
    put(tmp_path, "a.txt", "Document 0 says hello.")
    assert documents(tmp_path/"a.txt") == ["Document 0 says hello."] and held_out(tmp_path/"a.txt") is None
    assert "too little text" in capsys.readouterr().err and "no text for the split val; give more text, or take all of it (--split all)" in all_of(documents, tmp_path/"a.txt", "val")
    long = "The ducks swam away. " * 200
    assert [documents([long], s)[0][:9] for s in ("train", "val", "test")] == ["The ducks"] * 3


@pytest.mark.parametrize("coding, name, text", [
    ("cp1252", "WINDOWS-1252", "“Yes,” she said – and left."), ("latin-1", "ISO-8859-1", "Grüße aus Köln"), ("gbk", "GB18030", "你好,世界。今天天气很好,我们去公园玩。"),
    ("cp932", "SHIFT_JIS", "こんにちは、世界。今日はいい天気です。"), ("euc-jp", "EUC-JP", "こんにちは、世界。今日はいい天気です。"), ("euc-kr", "EUC-KR", "안녕하세요. 오늘은 날씨가 좋습니다."),
    ("big5", "BIG5", "今天天氣很好,我們去公園玩。"), ("cp1251", "WINDOWS-1251", "Привет, мир. Сегодня хорошая погода."), ("koi8-r", "KOI8-R", "Привет, мир. Сегодня хорошая погода."),
    ("cp1250", "WINDOWS-1250", "Łódź, żółw, źdźbło"), ("iso8859-2", "ISO-8859-2", "Zażółć gęślą jaźń"), ("iso8859-7", "ISO-8859-7", "Καλημέρα κόσμε"), ("mac-roman", "MACINTOSH", "Grüße, älter, öfter"), ("cp874", "CP874", "สวัสดีชาวโลก")])
def test_the_encoding_that_is_named_fits_the_bytes(tmp_path, coding, name, text):
    put(tmp_path, "my notes.txt", text.encode(coding))
    said = all_of(documents, tmp_path/"my notes.txt")
    assert guess_coding(text.encode(coding)) == name and f"iconv -f {name} -t utf-8 '{tmp_path}/my notes.txt' > new" in said and said.endswith("> new")


def test_configurations_are_listed_and_taken(tmp_path, monkeypatch):
    (tmp_path/"many").mkdir()
    (tmp_path/"many/README.md").write_text("---\nconfigs:\n- {config_name: en, data_files: en.jsonl}\n- {config_name: de, data_files: de.jsonl}\n---\n")
    for name in "en", "de": put(tmp_path, f"many/{name}.jsonl", json.dumps({"text": name}))
    assert "its configurations are en, de; name one, as in" in all_of(documents, tmp_path/"many", "all")
    assert documents(f"{tmp_path/'many'}:de", "all") == ["de"]
    monkeypatch.setenv("TINY_LLM_DATA", str(tmp_path))
    assert all_of(documents, "owner/many:en", "all") == ["en"] and "Did you mean 'de'?" in all_of(documents, "owner/many:dee", "all")


def test_a_saved_dataset_has_conversations(tmp_path):
    from datasets import Dataset, DatasetDict
    def rows(n): return Dataset.from_list([{"messages": [dict(role="user", content=f"Hi {i}"), dict(role="assistant", content="Hello.")]} for i in range(n)])
    DatasetDict(train=rows(5), validation=rows(2)).save_to_disk(tmp_path/"both")
    rows(3).save_to_disk(tmp_path/"one")
    assert [len(read_conversations(tmp_path/"both", s)) for s in ("train", "val")] == [5, 2]
    assert len(read_conversations(tmp_path/"one")) == 3 and read_conversations(tmp_path/"one", "val") is None


def test_fine_tuning_draws_what_it_holds_out_again_at_a_resume(tmp_path):
    import torch
    from tiny_llm.assistant.finetune import finetune
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.transformer.model import Transformer, preset
    rows = [dict(prompt=f"Say {i}" + " and more" * (i // 3), completion=f"{i}.") for i in range(60)]      # sorted by length
    put(tmp_path, "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    tok = train_tokenizer([json.dumps(r) for r in rows], vocab_size=300)
    torch.manual_seed(0)
    def model(): return Transformer(preset("tiny", vocab_size=len(tok), ctx=64))
    how = dict(ctx=64, batch=4, compile=False, dtype="float32", device="cpu", quiet=True, out=tmp_path/"run")
    run = finetune(model(), tok, tmp_path/"a.jsonl", steps=4, seed=5, stop_at=2, **how)
    assert 10 < run.made["documents"] < 58 and run.made["held_out"] >= 1
    run = finetune(model(), tok, str(tmp_path/"a.jsonl"), resume=True, **how)
    assert run.summary["step"] == 4


def test_conversations_held_out_that_are_all_too_long_do_not_stop_the_run(tmp_path, capsys):
    from tiny_llm.assistant.finetune import finetune
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.transformer.model import Transformer, preset
    tok = train_tokenizer(["Hi there. Hello."], 300)
    def chat(n, long=1): return [dict(role="user", content=f"Hi {n}"), dict(role="assistant", content="Hello. " * long)]
    model = Transformer(preset("tiny", vocab_size=len(tok), ctx=32))
    run = finetune(model, tok, [chat(n) for n in range(40)], val=[chat(1, 50)], steps=1, batch=1, out=tmp_path/"run", device="cpu")
    said = capsys.readouterr().err
    assert "1 of 1 held-out conversations are longer than 32 tokens" in said and run.made["held_out"] == 2 and run.summary["val"]


def test_card_of_a_text_is_refused_before_the_work(tmp_path, monkeypatch):
    from tiny_llm.text import cleaning
    put(tmp_path, "a.txt", "text " * 500)
    monkeypatch.setattr(cleaning, "data_card", lambda *a, **kw: pytest.fail("worked first"))
    for out, says in ("a.txt", "exists"), ("a.txt/card.json", "is no folder"), (".", "exists"):
        code, _, err = same_process(["data", "--data", "a.txt", "--out", out], tmp_path)
        assert code == 2 and says in err and err.count("\n") == 1, err


@pytest.mark.parametrize("row, says", [
    (dict(messages="not json"), "its messages hold 'not json'; a list (in a table: as JSON)"), (dict(messages="[{'role': 'user'}]"), "its messages hold"),
    (dict(conversation=5), "its conversation hold 5"), (dict(dialogue={"role": "user", "content": "Hi"}), "its dialogue hold {'role'"), (dict(messages="x", prompt="Hi"), "its messages hold 'x'")])
def test_messages_that_are_no_list_are_shown(tmp_path, row, says):
    put(tmp_path, "c.jsonl", json.dumps(row))
    assert "row 1 of" in (said := all_of(read_conversations, tmp_path/"c.jsonl")) and says in said
    assert "missing" not in said


def test_messages_that_are_no_list_beside_an_instruction(tmp_path):
    put(tmp_path, "c.jsonl", json.dumps(dict(messages="x", prompt="Hi", response="Ho")))
    assert [m["content"] for m in read_conversations(tmp_path/"c.jsonl")[0]] == ["Hi", "Ho"]
