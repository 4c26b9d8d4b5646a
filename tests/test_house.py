"The rules of the house: what is generated is up to date, no import runs upward, stored outputs are fresh, names resolve, notebooks are whole."
import ast, json, re, sys

import pytest

from house import (NBS, ROOT, code_cells, copy_tree, difference, exporting, files, floor, module, module_floors, notebooks, numbered, page, python, read, run,
                   source)
from run_notebook import directives, settings, stale

PACKAGE = ROOT/"tiny_llm"


def dotted(path):
    "tiny_llm/text/bpe.py -> text.bpe"
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


every = pytest.mark.parametrize("path", notebooks(), ids=page)
each = pytest.mark.parametrize("path", exporting(), ids=page)
walked = pytest.mark.parametrize("path", numbered(), ids=page)
modules = sorted(p for p in PACKAGE.rglob("*.py") if p.stem[0] != "_")
each_module = pytest.mark.parametrize("path", modules, ids=dotted)
homes = ast.literal_eval(python("import tiny_llm; print(tiny_llm._home)").strip().splitlines()[-1])


# What is generated

def test_export_and_clean_leave_no_diff(tmp_path):
    tree = copy_tree(tmp_path/"tiny_llm")
    before = files(tree)
    run(["nbdev_export"], tree)
    assert not difference(before, files(tree)), "nbdev_export changes the tree:\n" + difference(before, files(tree))
    run(["nbdev_clean"], tree)
    assert not difference(before, files(tree)), "nbdev_clean changes the tree:\n" + difference(before, files(tree))


def test_readme_is_made_from_index():
    import make_readme
    old = [p.relative_to(ROOT) for p, new in make_readme.make().items() if not p.exists() or p.read_bytes() != new]
    assert not old, f"run `python nbs/_tools/make_readme.py`: {old} out of date"


def test_readme_shows_only_what_exists():
    readme = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT/"README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", readme) + re.findall(r'(?:src|href)="([^"]+)"', readme)
    dead = [t for t in targets if not re.match(r"\w+:|#", t) and not (ROOT/t.split("#")[0]).exists()]
    assert not dead


def test_every_module_comes_from_a_notebook():
    exported = {m[1] for p in exporting() for c in code_cells(read(p)) if (m := re.search(r"^#\|\s*default_exp\s+([\w.]+)", source(c), re.M))}
    assert exported == {dotted(p) for p in modules}
    assert exported == set(module_floors()), "notebook P_part/NN_name exports module part.name"


def test_version_is_that_of_settings():
    assert python("import tiny_llm; print(tiny_llm.__version__)").split()[-1] == settings()["version"]


# No import runs upward

def imported(code, inside=""):
    "Modules of tiny_llm that some Python code uses: imports of all kinds, and `tl.name` after `import tiny_llm as tl`. `inside`: of the importing module."
    lines = [re.sub(r"^(\s*)(?:[\w, ]+=\s*)?[%!?].*", r"\1pass", l) for l in code.splitlines()]
    tree, aliases, found = ast.parse("\n".join(lines)), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name == "tiny_llm": aliases.add(a.asname or a.name)
                if a.name.startswith("tiny_llm."): found.add(a.name.removeprefix("tiny_llm."))
        if isinstance(node, ast.ImportFrom):
            base = [] if not node.level else ["tiny_llm", *inside.split(".")][:-node.level]
            package = ".".join([*base, *filter(None, [node.module])])
            if package == "tiny_llm": found |= {homes.get(a.name, a.name) for a in node.names}
            elif package.startswith("tiny_llm."):
                package = package.removeprefix("tiny_llm.")
                found |= {package} if package in module_floors() else {f"{package}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found.add(homes.get(node.attr, node.attr))
    return found & module_floors().keys()


def strangers(a, b):
    "Parts 1 and 2, the transformer and the text, stand side by side and do not know each other."
    return {a[0], b[0]} == {1, 2}


def test_imported_sees_every_kind():
    assert imported("from tiny_llm.basics import check\nimport tiny_llm as tl\n%time x\ntl.softmax(1)") == {"basics", "transformer.math"}
    assert imported("from ..basics import check\nfrom . import math\nfrom .rope import x", "transformer.x") == {"basics", "transformer.math", "transformer.rope"}
    assert imported("from ..text.bpe import y\nfrom ..training import run\nimport tiny_llm.text.judge", "training.x") == {"text.bpe", "training.run", "text.judge"}
    assert imported("x = 1\nimport torch.math") == set()


@each
def test_no_import_of_the_notebook_runs_upward(path):
    cells = [source(c) for c in code_cells(read(path)) if not source(c).lstrip().startswith("%%")]
    up = [m for m in imported("\n".join(cells)) if module_floors()[m] > floor(path)]
    assert not up, f"{page(path)} uses {up}, of a higher floor"


@each_module
def test_no_import_of_the_module_runs_upward(path):
    here = module_floors()[dotted(path)]
    uses = imported(path.read_text(encoding="utf-8"), dotted(path))
    up = [m for m in uses if module_floors()[m] >= here]
    assert not up, f"{dotted(path)} imports {up}, of the same or a higher floor"
    assert not [m for m in uses if strangers(module_floors()[m], here)], "transformer and text do not know each other"


# Names

def test_import_is_light():
    heavy = "torch numpy matplotlib datasets tokenizers transformers ipywidgets IPython nbdev".split()
    out = python(f"import tiny_llm, sys; print([m for m in {heavy} if m in sys.modules])")
    assert out.split("\n")[-2] == "[]", out


def test_public_names_resolve():
    out = python("import tiny_llm as tl\n"
                 "for n in tl.__all__:\n"
                 "    try: getattr(tl, n)\n"
                 "    except Exception as e: print('MISSING', n, repr(e))\n"
                 "assert set(tl.__all__) <= set(dir(tl))")
    assert "MISSING" not in out, out


def test_what_modules_export_exists():
    out = python("from importlib import import_module\n"
                 f"for m in {[dotted(p) for p in modules]}:\n"
                 "    module = import_module(f'tiny_llm.{m}')\n"
                 "    for n in module.__all__:\n"
                 "        if not hasattr(module, n): print('MISSING', m, n)")
    assert "MISSING" not in out, out


def test_unknown_name_is_an_attribute_error():
    python("import tiny_llm as tl\ntry: tl.nonsense\nexcept AttributeError: pass\nelse: raise SystemExit(1)")


# Notebooks

@every
def test_stored_outputs_are_fresh(path):
    nb = read(path)
    assert not stale(nb), f"{stale(nb)}: python nbs/_tools/run_notebook.py nbs/{page(path)}"
    errors = [o for c in code_cells(nb) for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors
    assert "widgets" not in nb["metadata"] and "vnd.jupyter.widget" not in json.dumps([c["outputs"] for c in code_cells(nb)])


@every
def test_outputs_show_no_path_of_one_machine(path):
    text = "\n".join(source(c) + json.dumps(c.get("outputs", [])) for c in read(path)["cells"])
    assert not re.search(r"/(?:root|home/\w+|Users/\w+|tmp/\w+)/[\w./-]*", text)


@every
def test_notebook_is_small(path): assert path.stat().st_size < 1_000_000


@each
def test_notebook_has_its_sections(path):
    nb = read(path)
    cells, code = [source(c) for c in nb["cells"]], [source(c) for c in code_cells(nb)]
    text = "\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n\n> \S", cells[0]), "opens with a title and a one-sentence blurb"
    assert code[0].strip() == f"#| default_exp {module(path)}"
    assert any(re.search(r"\btest_\w+\(|\bassert", s) for s in code), "has tests"
    assert re.search(r"^## Exercises$", text, re.M)
    start = next(i for i, s in enumerate(cells) if re.search(r"^## Exercises$", s, re.M))
    solutions = [c for c in nb["cells"][start:] if c["cell_type"] == "code" and re.search(r"^@exercise\(", source(c), re.M)
                 and "code-fold" in directives(c["source"])]
    asked = re.findall(r"^### Exercise \d+: .+ \((?:easy|medium|hard)(?:, open-ended)?, \d+ minutes\)", text, re.M)
    assert 3 <= len(asked) <= 6 and len(solutions) == len(asked), f"{len(asked)} exercises, {len(solutions)} folded solutions"
    assert all(c["metadata"].get("jupyter", {}).get("source_hidden") for c in solutions), "solutions are folded in JupyterLab"
    assert "hen you see" in text and re.search(r"^## Further reading", text, re.M)
    assert any("image/png" in o.get("data", {}) for c in code_cells(nb) for o in c["outputs"]), "has a picture"


@walked
def test_it_leads_to_the_next_notebook(path):
    "The last link of each notebook is the one that follows, so that whoever goes from link to link leaves none out."
    order = [*numbered(), NBS/"index.ipynb"]
    links = [(path.parent/l).resolve() for l in re.findall(r"\]\(([\w./]+\.ipynb)\)", source(read(path)["cells"][-1]))]
    assert links[-1:] == [order[order.index(path) + 1]]


@walked
def test_cells_are_short(path):
    "Lines that are blank or hold a directive do not count."
    lines = [sum(bool(l.strip()) and not l.startswith("#|") for l in source(c).splitlines()) for c in code_cells(read(path))]
    most = {"03_config": 44}.get(path.stem, 40)       # the class of all settings: a line for each, for its comment is the help
    assert max(lines) <= most, f"cells of more than {most} lines: {[n for n in lines if n > most]}"


@every
def test_figures_have_caption_and_text(path):
    for i, c in enumerate(read(path)["cells"]):
        if any("image/png" in o.get("data", {}) for o in c.get("outputs", [])):
            d = directives(c["source"])
            assert d.get("label", "").startswith("fig-") and d.get("fig-cap") and d.get("fig-alt"), f"cell {i} of {page(path)}: label, fig-cap, fig-alt"


@each_module
def test_functions_fit_on_a_screen(path):
    text = path.read_text(encoding="utf-8")
    functions = [d for d in ast.walk(ast.parse(text)) if isinstance(d, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [(d.name, d.lineno) for d in functions if d.end_lineno - d.lineno >= 50]
    longest = {"code": 900, "sources": 900}      # walls and what is behind them; tables of encodings, delimiters and columns
    assert len(text.splitlines()) <= longest.get(path.stem, 700)
