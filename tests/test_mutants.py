"""Would the tests notice? Each mutant of tests/mutants/ is a bug that a programmer could make. `pytest --mutants [-k part.module]` plants one
after the other in a copy of the tree, in notebook and module, and runs the notebook, then its nearest tests, until one of them notices.
By hand, not in CI: half a minute for each. By default only this is tested: that every mutant can still be planted."""
import ast, json, re, runpy, sys
from functools import cache
from pathlib import Path

import pytest

from house import ROOT, code_cells, copy_tree, exporting, module, read, run, source

MUTANTS = {}     # "part.module-what it is" -> (part.module, old text, new text)
for file in sorted((Path(__file__).parent/"mutants").glob("*.py")):
    for where, old, new, what in runpy.run_path(str(file))["MUTANTS"]:
        assert f"{where}-{what}" not in MUTANTS, f"{where}-{what} stands twice"
        MUTANTS[f"{where}-{what}"] = where, old, new

# the tests that are asked where the notebook noticed nothing: a module's own, else its part's; the likeliest first, for the first failure ends it
NEAREST = {
    "basics": ["test_runner.py"],
    "transformer": ["test_weights.py"], "transformer.adapters": ["test_lora.py"], "transformer.packed": ["test_quantize.py"],
    "text": ["test_data.py"], "text.tokenizer": ["test_data.py", "test_typed_text.py", "test_masks.py", "test_bpe.py", "test_real_tokenizers.py"],
    "text.bpe": ["test_bpe.py", "test_real_tokenizers.py"], "text.playground": ["test_playground.py"], "text.sources": ["test_sources.py", "test_files.py"],
    "text.cleaning": ["test_cleaning.py"], "text.large_corpora": ["test_data.py", "test_stream.py"],
    "training": ["test_training.py"], "training.doctor": ["test_doctor.py"], "training.code": ["test_code.py"], "training.code_suite": ["test_code_suite.py"], "training.code_tasks": ["test_code_tasks.py"], "training.plan": ["test_plan.py"], "training.tune": ["test_tune.py"], "training.benchmarks": ["test_benchmarks.py"], "training.watch": ["test_watch.py"], "training.scale": ["test_scale.py"], "training.real_text": ["test_real_text.py"], "training.folder": ["test_folders.py", "test_damage.py", "test_lora.py"], "training.run": ["test_training.py", "test_resume.py", "test_owners.py"],
    "training.train": ["test_training.py", "test_resume.py", "test_owners.py", "test_stream.py", "test_preference.py"],
    "assistant": ["test_decoding.py", "test_options.py", "test_folders.py", "test_cli.py"], "assistant.decoding": ["test_decoding.py"], "assistant.finetune": ["test_options.py", "test_masks.py", "test_files.py", "test_cli.py"],
    "assistant.pipeline": ["test_pipeline.py"], "assistant.lora": ["test_lora.py", "test_cell.py"], "assistant.preference": ["test_preference.py"],
"assistant.engine": ["test_engine.py"], "assistant.protocol": ["test_protocol.py", "test_serve.py"],
"assistant.reinforce": ["test_reinforce.py"],
    "assistant.chat": ["test_options.py", "test_talk.py", "test_cli.py"], "assistant.cell": ["test_cell.py", "test_chat_browser.py"],
    "deployment": ["test_options.py", "test_files.py", "test_cli.py"], "deployment.quickstart": ["test_options.py"],
    "deployment.serve": ["test_serve.py", "test_page.py"], "deployment.quantize": ["test_quantize.py"],
    "deployment.export": ["test_export.py"], "transformer.graph": ["test_export.py"]}
LIMIT = 900      # seconds that a notebook or its tests may take; a mutant that runs on is noticed


@cache
def notebook_of(where): return next(p for p in exporting() if module(p) == where)


def module_of(where): return Path("tiny_llm", *where.split(".")).with_suffix(".py")


def exported(nb): return [c for c in code_cells(nb) if re.match(r"#\|\s*exports?\b", source(c))]


def planted(nb, old, new):
    "The notebook with the mutant."
    cells = [c for c in exported(nb) if old in source(c)]
    assert len(cells) == 1 and source(cells[0]).count(old) == 1, f"{old!r} stands {sum(source(c).count(old) for c in cells)} times in exported cells"
    cells[0]["source"] = source(cells[0]).replace(old, new).splitlines(keepends=True)
    return nb


@pytest.mark.parametrize("name", MUTANTS)
def test_can_be_planted(name):
    where, old, new = MUTANTS[name]
    text = (ROOT/module_of(where)).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module_of(where)}"
    planted(read(notebook_of(where)), old, new)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text.replace(old, new))), "it changes nothing"


@pytest.fixture(scope="session")
def own_tree(tmp_path_factory):
    "A copy of the project's files for this worker alone."
    return copy_tree(tmp_path_factory.mktemp("mutants")/"tiny_llm")


def complaint(command, tree):
    "The last line of what a command says if it fails or takes too long; None if it succeeds."
    try: run(command, tree, LIMIT, PYTHONPATH=str(tree))
    except AssertionError as e:
        lines = [l for l in re.sub(r"\x1b\[[\d;]*m", "", str(e)).splitlines() if l.strip()]
        errors = [l for l in lines if re.match(r"(E +)?\w*(Error|Exception|Warning)\b|.* took over ", l)]
        return (errors or lines)[-1].strip()[:150]


def noticed(where, tree):
    "(who noticed, what was said): notebook, tests or nobody."
    nb = tree/notebook_of(where).relative_to(ROOT)
    if said := complaint([sys.executable, tree/"nbs"/"_tools"/"run_notebook.py", "--learner", nb], tree): return "notebook", said
    files = NEAREST.get(where) or NEAREST[where.split(".")[0]]
    tests = [tree/"tests"/f for f in files]
    if said := complaint([sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests], tree): return "tests", said
    return "nobody", ""


@pytest.mark.mutant
@pytest.mark.parametrize("name", MUTANTS)
def test_noticed(name, own_tree, record_property):
    where, old, new = MUTANTS[name]
    files = own_tree/module_of(where), own_tree/notebook_of(where).relative_to(ROOT)
    before = [f.read_bytes() for f in files]
    try:
        files[0].write_text(files[0].read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        files[1].write_text(json.dumps(planted(read(files[1]), old, new), ensure_ascii=False, indent=1), encoding="utf-8")
        who, said = noticed(where, own_tree)
    finally:
        for f, b in zip(files, before): f.write_bytes(b)
    record_property("mutant", [where, name.removeprefix(f"{where}-"), who, said])
    assert who != "nobody", f"{name}\n{old}\n-> {new}"
