"The scripts that store outputs and make README.md: what they write, they would write again."
import shutil, subprocess, sys

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import make_readme, run_notebook
from house import ROOT, read, run

kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
drawing = "#| label: fig-index-line\n#| fig-cap: A line.\n#| fig-alt: It rises.\nplt.plot([0, 1]);"
cells = ["import sys, ipywidgets\nfrom tqdm.auto import tqdm\nimport matplotlib.pyplot as plt", "for i in tqdm(range(2)): print(i)",
         "print('noise', file=sys.stderr); print('10%\\r99%'); object()", "ipywidgets.HTML('x')", drawing]


def write(path, codes):
    nb = new_notebook(cells=[new_markdown_cell("# A title\n\n> A blurb.\n\n[01](1_transformer/01_math.ipynb)"), *map(new_code_cell, codes)], metadata=kernel)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def place(tmp_path):
    "A project of one notebook folder."
    (tmp_path/"nbs").mkdir()
    shutil.copy(ROOT/"settings.ini", tmp_path)
    return tmp_path


def test_running_and_cleaning_again_change_nothing(place):
    path = write(place/"nbs"/"index.ipynb", [*cells, "#| slow\nprint('slow')", "#| eval: false\nprint('never')"])
    assert run_notebook.stale(read(path))
    run_notebook.run(path)
    assert "slow" in run_notebook.stale(read(path)), "marked cells have not run yet"
    run_notebook.run(path, slow=True)
    first = path.read_bytes()
    assert not run_notebook.stale(read(path))
    run_notebook.run(path)
    assert path.read_bytes() == first, "a second run, which leaves the slow cell and its output alone"
    run(["nbdev_clean", "--fname", path], place)
    assert path.read_bytes() == first
    shown = [c["outputs"] for c in read(path)["cells"][1:]]
    text = ["".join("".join(o.get("text", "")) for o in outputs) for outputs in shown]
    assert text == ["", "0\n1\n", "99%\n", "", "", "slow\n", ""] and shown[3] == [] and b"noise" not in b"".join(str(o).encode() for o in shown)

    made = make_readme.make(path)
    readme = made[place/"README.md"].decode()
    assert made == make_readme.make(path) and made[place/"nbs"/"images"/"index-line.png"][:4] == b"\x89PNG"
    assert readme.startswith("# A title\n") and "[01](nbs/1_transformer/01_math.ipynb)" in readme and "![It rises.](nbs/images/index-line.png)" in readme
    assert "#|" not in readme and "```python\nfor i" in readme


def test_a_caption_is_not_code_and_a_change_is():
    def nb(code): return {"cells": [{"cell_type": "code", "source": code}]}
    same = run_notebook.code_hash(nb("#| fig-cap: one\nx = 1  "))
    assert same == run_notebook.code_hash(nb("#| fig-cap: two\n\nx = 1")) != run_notebook.code_hash(nb("x = 2"))


def test_a_change_above_a_slow_cell_makes_its_output_stale():
    def slow(*codes): return run_notebook.code_hash({"cells": [{"cell_type": "code", "source": c} for c in codes]}, "slow")
    assert slow("x = 1", "#| slow\nx", "y = 1") == slow("x = 1", "#| slow\nx", "y = 2") != slow("x = 2", "#| slow\nx", "y = 1")


def test_a_notebook_that_fails_is_left_as_it_was(place):
    path = write(place/"nbs"/"bad.ipynb", ["1/0"])
    before = path.read_bytes()
    p = subprocess.run([sys.executable, ROOT/"nbs"/"_tools"/"run_notebook.py", path], capture_output=True, text=True)
    assert p.returncode == 1 and "ZeroDivisionError" in p.stderr and path.read_bytes() == before


def test_links_of_the_readme_start_at_the_top():
    given = "[a](1_transformer/01_math.ipynb) [b](../LICENSE#x) [c](https://x.org/y) [d](#e) `[f](g)` ![h](images/i.png) <img src=\"images/j.png\">\n```\n[k](l)\n```\n"
    assert make_readme.relink(given) == ("[a](nbs/1_transformer/01_math.ipynb) [b](LICENSE#x) [c](https://x.org/y) [d](#e) `[f](g)` ![h](nbs/images/i.png) "
                                         "<img src=\"nbs/images/j.png\">\n```\n[k](l)\n```\n")


def test_slow_cells_show_what_is_stored_unless_asked(monkeypatch):
    "What `ask_first` makes of a slow cell's text, with SLOW=1 and without."
    from types import SimpleNamespace
    from tiny_llm.basics import ask_first
    path = ROOT/"nbs"/"01_basics.ipynb"
    shell = SimpleNamespace(user_ns={"__vsc_ipynb_file__": str(path)}, input_transformers_cleanup=[], events=SimpleNamespace(register=lambda *a: None))
    ask_first(shell)
    transform, slow = shell.input_transformers_cleanup[0], ["#| slow 20 s\n", "time.sleep(20)\n"]
    for asked, got in ("1", slow), ("0", ["_stored_result()\n"]):
        monkeypatch.setenv("SLOW", asked)
        assert transform(slow) == got and transform(["1 + 1\n"]) == ["1 + 1\n"]
