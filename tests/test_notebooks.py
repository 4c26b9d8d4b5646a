"Every notebook is a test of its own: nbdev_test runs its cells from top to bottom in a fresh process."
import os, time, warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from house import code_cells, files, notebooks, read, run
from run_notebook import directives

LIMIT = 60   # seconds a notebook should take on one thread; it is stopped after four times that


def nbdev_test(path, tree, *options, timeout=4*LIMIT):
    start = time.perf_counter()
    out = run(["nbdev_test", "--path", tree/"nbs"/path.name, "--n_workers", "0", *options], tree, timeout, PYTHONPATH=str(tree))
    assert "Success." in out, out
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def results(request, tree):
    "The notebooks that are to be tested run two at a time, on one thread each, while the tests wait for them in order."
    paths = [i.callspec.params["path"] for i in request.session.items if i.name.startswith("test_notebook[")]
    before = set(files(tree))
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        yield {path: pool.submit(nbdev_test, path, tree) for path in paths}
        pool.shutdown(cancel_futures=True)
    left = set(files(tree)) - before
    assert not left, f"notebooks left files behind: {sorted(left)}"


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_notebook(path, results):
    seconds = results[path].result()
    if seconds > LIMIT: warnings.warn(f"{path.name} took {seconds:.0f} s; {LIMIT} s is the limit on an idle machine")


marked = [p for p in notebooks() if any("slow" in directives(c["source"]) for c in code_cells(read(p)))]

@pytest.mark.slow
@pytest.mark.parametrize("path", marked, ids=lambda p: p.stem)
def test_slow_cells(path, tree): nbdev_test(path, tree, "--flags", "slow", timeout=3600)
