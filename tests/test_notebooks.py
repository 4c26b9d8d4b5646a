"Every notebook is a test of its own: Run All, as a learner does it in JupyterLab, with slow cells that show their stored result."
import re, sys

import pytest

from house import NBS, ROOT, code_cells, files, notebooks, page, read, run
from run_notebook import directives

LIMIT = 60     # seconds of processor time that a notebook may take on one thread
USUAL = 6.1    # seconds of processor time that WORK takes on the machine on which LIMIT was chosen
WORK = """import torch
from tiny_llm.text.stories import stories
torch.manual_seed(0)
model = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
for _ in range(500):
    model(torch.randn(8, 64, 64)).square().mean().backward()
stories(4000, seed=0)"""
MEASURED = """import subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
try:
    from resource import RUSAGE_CHILDREN, getrusage
    used = getrusage(RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime
except ImportError: spent = time.perf_counter() - start    # Windows has only the clock
print(f"processor seconds: {spent:.1f}")
sys.exit(code)"""


def measured(line, tree, timeout=5 * LIMIT, **extra):
    "(what a command printed, seconds of processor time), those of its child processes included."
    out = run([sys.executable, "-c", MEASURED, *line], tree, timeout, PYTHONPATH=str(tree), TINY_LLM_SIGNS="1", **extra)
    return out, float(re.findall(r"processor seconds: ([\d.]+)", out)[-1])


def nbdev_test(path, tree, *options, timeout=5 * LIMIT):
    "nbdev_test, as in any nbdev project."
    line = ["nbdev_test", "--path", tree / path.relative_to(ROOT), "--n_workers", "0", *options]
    out, seconds = measured(line, tree, timeout, SLOW="1")
    assert "Success." in out, out


@pytest.fixture(scope="module")
def room(tree):
    "The tree in which notebooks run; none may leave a file behind."
    before = set(files(tree))
    yield tree
    left = set(files(tree)) - before
    assert not left, f"notebooks left files behind: {sorted(left)}"


@pytest.mark.parametrize("path", notebooks(), ids=page)
def test_run_all(path, room):
    line = [sys.executable, room / "nbs" / "_tools" / "run_notebook.py", "--learner", room / path.relative_to(ROOT)]
    out, seconds = measured(line, room)
    if seconds > LIMIT:      # is it the notebook that is slow, or the machine at this hour?
        slower = measured([sys.executable, "-c", WORK], room)[1] / USUAL
        assert seconds <= slower * LIMIT, f"{page(path)} took {seconds:.0f} s of processor time, on a machine {slower:.1f} times slower than usual; the limit is {LIMIT} s"


def test_nbdev_test_works_too(room): nbdev_test(NBS / "01_basics.ipynb", room)


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(), ids=page)
def test_nbdev_test(path, room): nbdev_test(path, room)


marked = [p for p in notebooks() if any("slow" in directives(c["source"]) for c in code_cells(read(p)))]

@pytest.mark.slow
@pytest.mark.parametrize("path", marked, ids=page)
def test_slow_cells(path, tree): nbdev_test(path, tree, "--flags", "slow", timeout=3600)
