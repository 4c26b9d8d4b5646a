"""One hand: what makes every notebook and module read alike. Each rule is a sentence of CONTRIBUTING.md.

The rules about code look at the syntax or at the tokens, so that they say nothing about taste beyond what is written there."""
import ast, io, keyword, re, tokenize
from collections import defaultdict

import pytest

from house import NBS, ROOT, code_cells, exporting, module, notebooks, number, numbered, page, read, source
from run_notebook import directives

modules = sorted(p for p in (ROOT / "tiny_llm").rglob("*.py") if p.stem[0] != "_")
DEEP = """flash sizes huggingface gguf judge dialogues bpe playground cleaning large_corpora audit doctor tune scale improvements plan watch
    real_text benchmarks pipeline adapters lora preference decoding xray cell reinforce code code_suite code_tasks engine serve
    protocol packed quantize graph export""".split()   # nothing that follows needs them
every = pytest.mark.parametrize("path", notebooks(), ids=page)
each = pytest.mark.parametrize("path", exporting(), ids=page)
each_module = pytest.mark.parametrize("path", modules, ids=lambda p: p.relative_to(ROOT).as_posix())


def lines(cell):
    "The lines of a code cell that count: no blank ones, no directives."
    return [l for l in source(cell).splitlines() if l.strip() and not re.match(r"\s*#\s*\|", l)]


def prose(nb): return "\n\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")


def words(path):
    "Words of a notebook's text; a formula counts as one, code fences as none."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|(?<=\])\([^)]*\)", " ", prose(read(path)), flags=re.S)     # no code, no addresses
    return len(re.findall(r"[A-Za-z][\w'’-]*", re.sub(r"\$[^$\n]+\$", " x ", text)))


def exported(cell): return bool({"export", "exports"} & directives(cell["source"]).keys())


# Lines and cells

@every
def test_no_line_of_code_is_too_long(path):
    long = [l for c in code_cells(read(path)) for l in lines(c) if len(l) > 120]
    assert not long, f"{len(long)} lines over 120 columns, first: {long[0]}"


@each_module
def test_no_line_of_a_module_is_too_long(path):
    text = path.read_text(encoding="utf-8").split("# %% auto", 1)[1].split("# %%", 1)[1]       # above is what nbdev writes
    assert not [l for l in text.splitlines() if len(l) > 120]


def test_most_cells_are_short():
    counts = [len(lines(c)) for p in notebooks() for c in code_cells(read(p)) if lines(c)]
    short = sum(n <= 6 for n in counts) / len(counts)
    assert short >= 0.6, f"{short:.0%} of {len(counts)} code cells have at most six lines"


@each
def test_no_exported_cell_follows_another_without_a_word(path):
    cells = [c for c in read(path)["cells"] if source(c).strip()]
    alone = [source(b)[:60] for a, b in zip(cells, cells[1:]) if a["cell_type"] == b["cell_type"] == "code" and exported(a) and exported(b)]
    assert not alone, alone


def one_line_bodies(code):
    "Statements that share a line: after a semicolon, or the body of a loop or a `with` behind its colon."
    tree, found, starts = ast.parse(code), [], defaultdict(int)
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            body = getattr(node, block, None)
            if not isinstance(body, list): continue
            for a, b in zip(body, body[1:]):
                if a.end_lineno == b.lineno: found.append(b.lineno)
        if isinstance(node, (ast.For, ast.While, ast.With)) and node.body[0].lineno == node.lineno: found.append(node.lineno)
    return found


@each_module
def test_one_statement_to_a_line(path):
    code = path.read_text(encoding="utf-8")
    found = [code.splitlines()[n - 1].strip() for n in one_line_bodies(code)]
    assert not found, found[:3]


@each_module
def test_no_lambda_has_a_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [n.lineno for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.AnnAssign)) and isinstance(n.value, ast.Lambda)]
    pairs = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Tuple) and any(isinstance(v, ast.Lambda) for v in n.value.elts)]
    assert not named + pairs


OPERATORS = set("+ - * / // % @ ** << >> & | ^".split())

def crowded(code):
    "Lines with a binary operator that has no space on one side."
    tokens, found, inside = list(tokenize.generate_tokens(io.StringIO(code).readline)), [], 0
    for i, t in enumerate(tokens):
        name = tokenize.tok_name[t.type]
        inside += (name == "FSTRING_START") - (name == "FSTRING_END")        # Python 3.12 looks into f-strings
        if inside or t.type != tokenize.OP or t.string not in OPERATORS: continue
        before = next((p for p in reversed(tokens[:i]) if p.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)), None)
        operand = before and (before.type in (tokenize.NUMBER, tokenize.STRING) or before.string in (")", "]", "}", "...", "None", "True", "False")
                              or name == "FSTRING_END" or before.type == tokenize.NAME and not keyword.iskeyword(before.string))
        after = tokens[i + 1]
        if operand and (before.end == t.start or after.start == t.end and after.type not in (tokenize.NL, tokenize.NEWLINE)): found.append(t.line.strip())
    return found


def test_crowded_sees_what_it_should():
    assert crowded("x = a*b\n") and crowded("x = a *b\n") and crowded("y = p/'x'\n") and crowded("x[n+1]\n")
    assert not crowded("f(*x, **y)\nz = -1\nx = a * -b\nreturn -x\ndef g(a, *, b=-1): pass\nx = (a +\n     b)\n")


@every
def test_operators_have_their_spaces(path):
    bad = [l for c in code_cells(read(path)) if not re.search(r"^\s*[%!]", source(c), re.M) for l in crowded(source(c))]
    assert not bad, bad[:3]


# Form

@each
def test_opening(path):
    "Question, what one has at the end, what to read before, minutes and seconds; the tables of the index are made from it."
    opening = source([c for c in read(path)["cells"] if c["cell_type"] == "markdown"][1])
    assert opening.startswith("**The question:** ") and re.search(r"^\*\*At the end you have\*\* ", opening, re.M)
    assert re.search(r"^\*\*Before this:\*\* .+ \*\*Time:\*\* \d+ minutes to read, \d+ s to run\.", opening, re.M), "Before this, and the time"
    assert ("A deep dive: what follows does not need it." in opening) == (path.stem.split("_", 1)[1] in DEEP)


@each
def test_when_you_see(path):
    "One form: a section with a table of what is seen and its cause."
    assert re.search(r"^## When you see …\n\n(?:.+\n\n)?\| you see \| the cause \|\n\|---\|---\|\n", prose(read(path)), re.M)


@every
def test_headings_bear_no_numbers(path):
    assert not re.findall(r"^#{2,4} \d+[.)].*", prose(read(path)), re.M) or path.stem == "00_first_model"


@every
def test_a_bar_ends_a_cell(path):
    "JupyterLab splits a table's row at every bar, also within backticks: all rows of a table have as many cells as its head."
    for table in re.findall(r"(?:^\|.*\|$\n?)+", prose(read(path)), re.M):
        bars = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(bars)) == 1, table[:200]


@every
def test_cells_that_draw_are_folded(path):
    for c in code_cells(read(path)):
        d = directives(c["source"])
        if not d.get("label", "").startswith("fig-") or page(path) in ("index.ipynb", "00_first_model.ipynb"): continue
        computes = len(lines(c)) <= 3 or re.search(r"^(?:def|assert|test_)", source(c), re.M)      # what a learner should read stays open
        assert computes or c["metadata"].get("jupyter", {}).get("source_hidden") and "code-fold" in d, d["label"]


@every
def test_slow_cells_say_how_long(path):
    if page(path) == "index.ipynb": return
    for c in code_cells(read(path)):
        d = directives(c["source"])
        if "slow" in d: assert re.match(r"(?:about )?\d+(?:\.\d+)? ?(?:s|min|h)", d["slow"]), source(c)[:80]


@each
def test_figures_bear_the_number_of_their_notebook(path):
    labels = [d["label"] for c in code_cells(read(path)) if (d := directives(c["source"])).get("label", "").startswith("fig-")]
    at = number(path) if "." in number(path) else f"0.{number(path)}"
    assert all(l.startswith(f"fig-{at.replace('.', '-')}-") for l in labels), labels


# Words

def test_the_spine_is_a_course_and_not_a_library():
    "All that is no deep dive, up to the notebook before the chat."
    before_chat = [p for p in numbered() if number(p) < "4.06" and p.stem.split("_", 1)[1] not in DEEP]
    n = {page(p): words(p) for p in before_chat}
    assert sum(n.values()) <= 35_000, f"{sum(n.values())} words: {n}"


@every
def test_no_insiders_words(path):
    text = prose(read(path)) + "\n".join(source(c) for c in code_cells(read(path)))
    inside = r"the (?:whole )?road\b(?! to)|this project's ancestor|an ancestor of this project|the first walk|hangs the function|the order turns round|what comes later hangs"
    assert not re.findall(inside, text, re.I)


# Names and letters

def test_one_meaning_per_name():
    "No two modules define the same public name, but for the commands, which bear the names of the functions that they call."
    homes = defaultdict(list)
    for path in modules:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_" and not any("patch" in ast.dump(d) for d in node.decorator_list):
                homes[node.name].append(path.stem)
    twice = {name: places for name, places in homes.items() if len(places) > 1 and "cli" not in places}
    assert not twice


def notation():
    "The letters of the course, from the table in 1.01 math."
    table = re.search(r"## Symbols of the whole course\n+(?:[^|\n].*\n+)*((?:\|.*\n?)+)", prose(read(next(p for p in numbered() if p.stem == "01_math"))))[1]
    return table, {l.replace("_", "") for l in re.findall(r"\$(?:\\mathbf )?([A-Z](?:_?[a-z])?)\$", "\n".join(row.split("|")[1] for row in table.splitlines()))}


def test_every_letter_of_a_shape_is_in_the_table():
    "`(B, T, C)` in the comment of a parameter: one letter, one meaning, across the whole course."
    _, letters = notation()
    used = defaultdict(set)
    for path in modules:
        for line in path.read_text(encoding="utf-8").splitlines():
            for shape in re.findall(r"#.*?\(([A-Z][A-Za-z0-9]*(?:, ?[A-Za-z0-9.*+ -]+)*,?)\)", line):
                for letter in re.findall(r"\b[A-Z][a-z]?\b", shape):
                    if not re.search(r"[a-z]{3,}", shape): used[letter].add(path.stem)
    assert not {l: m for l, m in used.items() if l not in letters}, "letters that the table in 1.01 does not name"
