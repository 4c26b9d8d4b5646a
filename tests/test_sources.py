"Where text comes from: what a person gets wrong, streams that break, files that change, and how much memory a long text takes."
import bz2, gzip, io, json, lzma, os, stat, subprocess, sys, zipfile
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from house import environment, files
from test_cli import same_process, unix
from tiny_llm.text import sources
from tiny_llm.basics import UserError
from tiny_llm.text.sources import BLOCK_BYTES, SPLIT_NAMES, documents, read, read_files

DOCS = [f"Document {i} tells of {i * i} ducks that went swimming one day." for i in range(400)]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}


def rows(docs, **more): return "".join(json.dumps({"text": d, **more}) + "\n" for d in docs).encode()


def parquet(docs, column="text", **kw):
    out = io.BytesIO()
    pq.write_table(pa.table({column: docs, "n": list(range(len(docs)))}), out, **kw)
    return out.getvalue()


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z: z.writestr("a.txt", "text")
    return out.getvalue()


def refused(source, says, **kw):
    "The one line with which a source is refused."
    with pytest.raises(UserError) as e: documents(source, **kw)
    assert says in str(e.value) and "\n" not in str(e.value), str(e.value)
    return str(e.value)


# Bad input -----------------------------------------------------------------------------------------------------------

text = "\n<|endoftext|>\n".join(DOCS).encode()
flipped = bytearray(parquet(DOCS, compression="none", write_page_checksum=True)); flipped[300] ^= 1
BAD = {
    "empty.txt": (b"", "no text for the split train"), "blank.txt": (b" \n\n", "no text for the split train"), "empty.jsonl": (b"", "no text"),
    "empty.csv": (b"", "no text"), "header.csv": (b"text\n", "no text"), "empty.json": (b"", "no valid JSON"), "none.json": (b"[]", "no text"),
    "marks.txt": (b"<|endoftext|>\n<|endoftext|>\n", "no text"), "gaps.jsonl": (rows(["", " ", "\n"]), "no text"),
    "photo.png": (b"\x89PNG\r\n\x1a\n\0\0", "binary file (byte 8 is zero"), "archive.txt": (zipped(), "a zip archive; unpack it"),
    "torn_zip.txt": (zipped()[:40], "a zip archive"), "table.txt": (parquet(DOCS), "Parquet; name it .parquet"), "packed.txt": (gzip.compress(text), "gzip; name it .gz"),
    "latin.txt": ("ein\nGrüß\n".encode("latin-1"), "not UTF-8 (byte 6 is 0xfc, in line 2); convert it, for example with: iconv"),
    "wide.txt": ("A red ball.".encode("utf-16-le"), "UTF-16 without a byte order mark"), "odd.txt": ("A ball".encode("utf-16")[:-1], "not UTF-16, as its byte order mark says"),
    "late.txt": (b"a" * (BLOCK_BYTES - 1) + "ü".encode("latin-1"), f"byte {BLOCK_BYTES - 1} is 0xfc, in line 1"), "half.txt": ("ü".encode()[:1], "byte 0 is 0xc3"),
    "late_zero.csv": (b"text\n" + (b"a" * 99 + b"\n") * 20_000 + b"\0", "byte 2000005 is zero, in line 20002"),
    "columns.parquet": (parquet(DOCS, "a"), "no text column; its columns are a, n"), "number.parquet": (parquet(list(range(9))), "row 1 of"),
    "cut.parquet": (parquet(DOCS)[:-9], "no Parquet file"), "flipped.parquet": (bytes(flipped), "no Parquet file"), "text.parquet": (text, "no Parquet file"),
    "empty.parquet": (b"", "no Parquet file"), "cut.parquet.gz": (gzip.compress(parquet(DOCS))[:-9], "cut off or damaged"),
    "broken.jsonl": (rows(DOCS) + b'{"text": ', "in line 401"), "twice.json": (rows(DOCS) + b"{", "in line 401"), "lines.jsonl": (b'[\n"a"\n]', "name it .json."), "nested.jsonl": (b'{"text": {"en": "x"}}', "holds dict"),
    "list.jsonl": (b'{"text": ["a", "b"]}', "holds list"), "number.jsonl": (b"7", "holds int"), "null.jsonl": (b"null", "holds NoneType"), "object.json": (b'{"text": "a"}', "holds one dict"),
    "other.jsonl": (b'{"a": "x", "b": "y"}', "no text column; its columns are a, b"), "deep.json": (b"[" * 99_999, "no valid JSON"),
    "zero.csv": (b"text\no\0e\n", "byte 6 is zero, in line 2"), "open.csv": (b'text\none\n"two\nthree\n', "unexpected end of data, in the row that begins in line 3"),
    "loose.csv": (b'text\none\n"two" and\n', "in the row that begins in line 3"), "columns.csv": (b"a,b\n1,2\n", "no text column; its columns are a, b"),
    **{f"cut.txt{end}": (pack(text)[:-9], "it is cut off or damaged") for end, pack in PACK.items()},
    **{f"half.jsonl{end}": (pack(rows(DOCS))[:400], "it is cut off or damaged") for end, pack in PACK.items()},
    **{f"plain.txt{end}": (b"no such thing", "it is cut off or damaged") for end in PACK},
}

@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(tmp_path, name):
    data, says = BAD[name]
    (tmp_path/name).write_bytes(data)
    assert name in refused(tmp_path/name, says)


@pytest.mark.parametrize("name", ["empty.txt", "photo.png", "latin.txt", "columns.parquet", "flipped.parquet", "open.csv", "zero.csv", "broken.jsonl", "nested.jsonl",
                                  "cut.txt.gz", "cut.txt.zst", "archive.txt", "wide.txt"])
def test_the_command_line_says_it_in_one_line_and_leaves_all_as_it_was(tmp_path, name):
    data, says = BAD[name]
    (tmp_path/name).write_bytes(data)
    before = files(tmp_path)
    code, out, err = same_process(["train", "--data", name, "--steps", 2, "--preset", "tiny", "--device", "cpu"], tmp_path)
    assert code == 2 and out == "" and err.startswith("tiny_llm: ") and err.count("\n") == 1 and says in err, err
    assert files(tmp_path) == before


@pytest.mark.parametrize("source, says", [("none.txt", "does not exist"), ("nothing", "holds no file of a known kind"), ("stories=0,python=1", "must be a number above 0"),
                                          ("stories=3,python", "no name=weight"), ("stories=1,duck.txt=1", "does not exist. Did you mean 'ducks.txt'?"), ("x" * 5000, "too long")])
def test_a_bad_name_on_the_command_line(tmp_path, source, says):
    (tmp_path/"nothing").mkdir(); (tmp_path/"nothing/a.jpg").write_bytes(b"\0"); (tmp_path/"ducks.txt").write_bytes(text)
    before = files(tmp_path)
    code, out, err = same_process(["train", "--data", source, "--steps", 2, "--preset", "tiny", "--device", "cpu"], tmp_path)
    assert code == 2 and out == "" and err.startswith("tiny_llm: ") and err.count("\n") == 1 and says in err, err
    assert files(tmp_path) == before


def test_encodings_may_be_mixed_where_marks_tell_them_apart(tmp_path):
    for coding in "utf-8", "utf-8-sig", "utf-16", "utf-32": (tmp_path/f"{coding}.txt").write_text("Grüß dich!", encoding=coding)
    assert list(read_files(sorted(tmp_path.iterdir()))) == ["Grüß dich!"] * 4
    (tmp_path/"old.txt").write_text("one\nGrüß dich!", encoding="latin-1")
    refused(tmp_path, "old.txt is not UTF-8 (byte 6 is 0xfc, in line 2)")


@unix
def test_links(tmp_path):
    (tmp_path/"shelf/deep").mkdir(parents=True)
    (tmp_path/"shelf/deep/a.txt").write_bytes(text)
    (tmp_path/"shelf/deep/loop").symlink_to(tmp_path/"shelf")
    (tmp_path/"shelf/again").symlink_to(tmp_path/"shelf/deep")
    assert documents(tmp_path/"shelf") == documents(DOCS)                      # each real folder once
    (tmp_path/"round").symlink_to("round")
    refused(tmp_path/"round", "Too many levels of symbolic links")
    (tmp_path/"dead").symlink_to("nowhere")
    refused(tmp_path/"dead", "is a link to something that does not exist")
    (tmp_path/"shelf/b.txt").symlink_to("nowhere.txt")
    refused(tmp_path/"shelf", "b.txt cannot be read (No such file")


@unix
def test_a_pipe_is_no_file(tmp_path):
    (tmp_path/"a.txt").write_bytes(text)
    os.mkfifo(tmp_path/"p.txt")
    assert documents(tmp_path) == documents(DOCS)                              # it would wait forever
    refused(tmp_path/"p.txt", "neither a file nor a folder")


@unix
def test_no_permission(tmp_path):
    "As another user where the tests run as root, for whom everything is permitted."
    for name in "shut/in/a.txt", "file/a.txt": (tmp_path/name).parent.mkdir(parents=True); (tmp_path/name).write_bytes(text)
    (tmp_path/"file/a.txt").chmod(0); (tmp_path/"shut/in").chmod(0)
    code = ("import os, sys; from tiny_llm.basics import UserError; from tiny_llm.text.sources import documents\n"
            "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
            "for s in sys.argv[1:]:\n"
            "    try: documents(s)\n"
            "    except UserError as e: print(e)")
    for p in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and p.stat().st_uid == 0 and "pytest" in str(p): p.chmod(p.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    asked = [tmp_path/"file/a.txt", tmp_path/"file", tmp_path/"shut", tmp_path/"shut/in", tmp_path/"shut/in/a.txt"]
    p = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, env=environment(), cwd="/")
    (tmp_path/"shut/in").chmod(0o700)
    assert p.stderr == "" and p.stdout.count("cannot be read (Permission denied)") == p.stdout.count("\n") == len(asked), p.stdout + p.stderr


# A file that changes while it is read ---------------------------------------------------------------------------------

def append(path):
    with open(path, "ab") as f: f.write(b"\nmore\n")

@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet", ".txt.gz"])
@pytest.mark.parametrize("do, says", [(append, "was changed while it was read (it had"), (lambda p: os.truncate(p, 1000), "and now has 1,000)"),
                                      (lambda p: os.utime(p, (1, 1)), "at the same size")], ids=["grows", "is cut", "is rewritten"])
def test_a_file_that_changes_while_it_is_read(tmp_path, kind, do, says):
    import random
    r = random.Random(0)
    docs = [r.randbytes(500).hex() for _ in range(6000)]
    data = {".txt": "\n<|endoftext|>\n".join(docs).encode(), ".jsonl": rows(docs), ".csv": "\n".join(["text", *docs]).encode(), ".parquet": parquet(docs)}
    path = tmp_path/f"busy{kind}"
    path.write_bytes(gzip.compress(data[".txt"], 1) if kind == ".txt.gz" else data[kind])
    stream, said = read_files([path]), None
    got = list(islice(stream, 3))
    do(path)
    with pytest.raises(UserError) as e: got.extend(stream)
    assert says in str(e.value) and "busy" in str(e.value)


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path):
    docs = [d * 100 for d in DOCS]
    (tmp_path/"a.jsonl").write_bytes(rows(docs)); (tmp_path/"b.jsonl").write_bytes(rows(DOCS))
    stream = read_files([tmp_path/"a.jsonl"])
    got = [next(stream)]
    os.replace(tmp_path/"b.jsonl", tmp_path/"a.jsonl")
    assert [*got, *stream] == docs and documents(tmp_path/"a.jsonl") == documents(DOCS)


# Streams ---------------------------------------------------------------------------------------------------------------

class Stream:
    "Rows that break at number 57, so many times."
    def __init__(self, breaks): self.breaks = breaks
    def __iter__(self):
        for i, d in enumerate(DOCS):
            if i == 57 and self.breaks: self.breaks -= 1; raise ConnectionError("Server disconnected")
            yield {"text": d}


@pytest.fixture
def pauses(monkeypatch):
    "How long was waited: nobody waits."
    waited = []
    monkeypatch.setattr(sources.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("breaks, waits", [(0, []), (1, [1]), (3, [1, 2, 4]), (4, [1, 2, 4, 8])])
def test_a_stream_that_breaks_is_taken_up_again(pauses, capsys, breaks, waits):
    assert documents(Stream(breaks)) == documents(DOCS) and pauses == waits
    assert capsys.readouterr().err.count("broke (ConnectionError: Server disconnected) at row 57") == breaks


def test_each_break_has_all_its_tries(pauses):
    class Twice(Stream):
        def __init__(self): self.left = {57: 3, 90: 3}
        def __iter__(self):
            for n, row in enumerate(DOCS):
                if self.left.get(n):
                    self.left[n] -= 1
                    raise ConnectionError("Server disconnected")
                yield row
    assert documents(Twice()) == documents(DOCS) and pauses == [1, 2, 4] * 2


def test_what_is_held_out_follows_the_seed():
    held = sources.held_out("stories", 3, seed=1)
    assert held == documents("stories", "val", 3, 1) != documents("stories", "val", 3, 0)


def test_a_stream_that_stays_broken_says_where_and_goes_on_there(pauses, monkeypatch):
    monkeypatch.setattr(sources, "FEW", 20)          # so that documents come before row 57
    stream, got = Stream(99), []
    with pytest.raises(UserError) as e:
        for d in read(stream): got.append(d)
    assert f"at row 57, after 4 more tries. {len(got)} documents of train came before it; go on with start={len(got)}" in str(e.value)
    assert pauses == [1, 2, 4, 8] and 40 < len(got) < 57
    stream.breaks = 0
    assert got + list(read(stream, start=len(got))) == documents(DOCS)


def test_an_iterator_that_cannot_begin_again_is_not_tried_again(pauses):
    refused(iter(Stream(1)), "at row 57, and it cannot be begun again")
    assert pauses == []


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("at", [0, 1, 99, 100, 101, 257, 399])
def test_a_stream_of_datasets_is_taken_up_again(pauses, shards, at):
    from datasets import IterableDataset
    left = [3]
    def rows_of(parts):
        for part in parts:
            for i in range(part, part + 400 // shards):
                if i == at and left[0]: left[0] -= 1; raise TimeoutError("slow")
                yield {"text": DOCS[i], "n": i}
    stream = IterableDataset.from_generator(rows_of, gen_kwargs={"parts": list(range(0, 400, 400 // shards))})
    assert documents(stream) == documents(DOCS) and left == [0] and pauses == [1, 2, 4]


def test_a_shuffled_stream_of_datasets_loses_nothing(pauses):
    "The state of a shuffled stream lacks what its buffer holds, so it is read again from the first row."
    from datasets import IterableDataset
    left = [1]
    def rows_of():
        for i, d in enumerate(DOCS):
            if i == 350 and left[0]: left[0] -= 1; raise ConnectionError("reset")
            yield {"text": d}
    assert sorted(documents(IterableDataset.from_generator(rows_of).shuffle(seed=1, buffer_size=50))) == sorted(documents(DOCS))


def test_a_dataset_by_name_breaks_and_is_resumed(tmp_path, pauses, monkeypatch):
    "The way of hub names: `load_dataset(…, streaming=True)` gives a stream that breaks."
    import datasets
    monkeypatch.setattr(sources, "_reachable", lambda: True)
    stream = Stream(1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: {"train": stream, "validation": [{"text": "v"}], "test": [{"text": "t"}]})
    assert documents("owner/tales") == DOCS and pauses == [1]
    stream.breaks, got = 99, []
    with pytest.raises(UserError, match="owner/tales: the stream broke .* 57 documents of train came before it; go on with start=57"):
        for d in read("owner/tales"): got.append(d)
    stream.breaks = 0
    assert got == DOCS[:57] and list(read("owner/tales", start=57)) == DOCS[57:]


@pytest.mark.parametrize("start", [0, 1, 57, 199, 200, 201, 361])
def test_start_gives_the_rest(tmp_path, start):
    (tmp_path/"a.txt").write_bytes(text)
    for source in DOCS, tmp_path/"a.txt", {tmp_path/"a.txt": 1, "stories": 1}:
        if start <= len(documents(source, limit=361)): assert list(read(source, limit=361, start=start)) == documents(source, limit=361)[start:]


# Mixtures --------------------------------------------------------------------------------------------------------------

def test_shares_of_a_mixture_are_shares_of_bytes(tmp_path):
    long, short = [f"L{i} " + "語" * (i % 97) for i in range(4000)], [f"S{i}" for i in range(4000)]
    (tmp_path/"long.jsonl").write_bytes(rows(long)); (tmp_path/"short.jsonl").write_bytes(rows(short))
    w = {tmp_path/"long.jsonl": 1, tmp_path/"short.jsonl": 3}
    docs = documents(w, limit=3000)
    size = {k: sum(len(d.encode()) for d in docs if d[0] == k) for k in "LS"}
    longest = max(len(d.encode()) / (0.25 if d[0] == "L" else 0.75) for d in docs)
    assert abs(size["L"] - 0.25 * sum(size.values())) <= 0.25 * longest
    assert [d for d in docs if d[0] == "L"] == documents(tmp_path/"long.jsonl")[:sum(d[0] == "L" for d in docs)]    # in order, none left out
    assert docs == documents(w, limit=3000) and sorted(docs[:2]) == sorted(documents(w, limit=2, seed=1))
    assert docs == documents(f"{tmp_path/'long.jsonl'}=1,{tmp_path/'short.jsonl'}=3", limit=3000)
    assert any(documents(w, limit=1, seed=s) != docs[:1] for s in range(9))


def test_splits_of_a_mixture_share_nothing(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(rows(DOCS[:300])); (tmp_path/"b.jsonl").write_bytes(rows(DOCS[100:]))
    got = {s: set(documents({tmp_path/"a.jsonl": 1, tmp_path/"b.jsonl": 2}, s)) for s in SPLIT_NAMES}
    assert not got["train"] & got["val"] and not got["train"] & got["test"] and not got["val"] & got["test"] and all(got.values())


def test_a_mixture_ends_with_its_first_source(tmp_path, capsys):
    (tmp_path/"a.jsonl").write_bytes(rows(DOCS))
    docs = documents({tmp_path/"a.jsonl": 1, "stories": 1})
    assert [d for d in docs if d.startswith("Document")] == documents(DOCS)
    assert "a.jsonl ended after" in capsys.readouterr().err


# Memory ----------------------------------------------------------------------------------------------------------------

def most_memory(path, code="sum(len(d) for d in read(sys.argv[1]))"):
    "The most memory of a process, kB."
    program = f"import sys; from tiny_llm.text.sources import read; print({code}); print(*(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    return [int(x) for x in subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True, env=environment()).stdout.split()]

linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".txt.zst"])
def test_one_line_of_100_megabytes(tmp_path, kind):
    def made(n):
        words = "word " * n
        return {".txt": words.encode, ".jsonl": json.dumps({"text": words}).encode, ".json": json.dumps([words]).encode, ".csv": f"text\n{words}\n".encode,
                ".parquet": lambda: parquet([words]), ".txt.gz": lambda: gzip.compress(words.encode(), 1), ".txt.zst": lambda: PACK[".zst"](words.encode())}[kind]()
    (tmp_path/f"short{kind}").write_bytes(made(10)); (tmp_path/f"long{kind}").write_bytes(made(20_000_000))
    (_, least), (n, most) = most_memory(tmp_path/f"short{kind}"), most_memory(tmp_path/f"long{kind}")
    print(f"{kind}: {n:,} characters of train, {(most - least) / 1000:.0f} MB")
    assert n > 89e6 and most - least < 1_000_000


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    doc = "ten words or so of some text, and on it goes; " * 22
    def write(path, n):
        if kind == ".parquet":                       # one group of rows: the hardest case
            with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), use_dictionary=False, compression="zstd") as w:
                w.write_table(pa.table({"text": [f"{i} {doc}" for i in range(n)]}), row_group_size=n)
            return
        with (gzip.open(path, "wb", 1) if kind.endswith(".gz") else open(path, "wb")) as f:
            if kind == ".csv": f.write(b"text\n")
            for i in range(n): f.write({".txt": f"{i} {doc}\n<|endoftext|>\n", ".csv": f'"{i} {doc}"\n'}.get(kind, json.dumps({"text": f"{i} {doc}"}) + "\n").encode())
    got = []
    for n in 20_000, 200_000:                        # 20 and 200 MB
        write(tmp_path/f"{n}{kind}", n)
        got.append(most_memory(tmp_path/f"{n}{kind}")[1] / 1000)
    print(f"{kind}: 20 MB {got[0]:.0f}, 200 MB {got[1]:.0f} MB")
    assert got[1] < got[0] + 40


@pytest.mark.parametrize("copies", (2, 3, 7))
def test_copies_of_a_document_stay_in_one_split(copies, tmp_path):
    "Of few documents, which are split by position: a list, and a file of rows."
    few = [f"Tale {i} tells of {i * i} geese." for i in range(20)]
    (tmp_path/"rows.jsonl").write_bytes(rows(few * copies))
    for source in (few * copies, tmp_path/"rows.jsonl"):
        parts = [set(documents(source, split)) for split in SPLIT_NAMES]
        assert len(parts[0]) >= 17 and all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
