"""Execute notebooks and store their outputs, so that running twice leaves no diff.

    python nbs/_tools/run_notebook.py nbs/1_transformer/06_model.ipynb          # everything but cells marked slow, gpu or notest
    python nbs/_tools/run_notebook.py nbs/1_transformer/06_model.ipynb --slow   # slow and notest cells too; --gpu for gpu cells
    python nbs/_tools/run_notebook.py --check                     # which notebooks hold stale outputs?
    python nbs/_tools/run_notebook.py --learner nbs/1_transformer/06_model.ipynb   # Run All as in JupyterLab; nothing is stored

A cell that is not run (`#| eval: false`, a flag, or `%%script false`) keeps the outputs it has.
The hash of the code that made the outputs is written into the notebook's metadata, which is how a test sees stale ones.
"""
import argparse, ast, json, os, re, sys, time
from configparser import ConfigParser
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
FLAGS = {"slow": "slow notest", "gpu": "gpu"}  # option: the flags of the cells it lets run


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def text(source): return source if isinstance(source, str) else "".join(source)


def directives(source):
    "The leading `#|` lines of a cell: {'slow': '', 'eval': 'false', …}"
    found = {}
    for line in text(source).splitlines():
        if not line.strip() or line.lstrip().startswith("%%"): continue
        m = re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", line)
        if not m: break
        found[m[1]] = m[2]
    return found


def statements(nb, flag=None):
    "The statements of all code cells, as (syntax tree, whether option `flag` lets its cell run); a line of magic is one by its text."
    wanted, found = set(FLAGS[flag].split()) if flag else set(), []
    for c in nb["cells"]:
        if c["cell_type"] != "code": continue
        code, marked = text(c["source"]), bool(wanted & directives(c["source"]).keys())
        if code.lstrip().startswith("%%"): code = repr(code)
        code = re.sub(r"^(\s*)([%!?].*)$", lambda m: m[1] + repr(m[2]), code, flags=re.MULTILINE)
        found += [(node, marked) for node in ast.parse(code).body]
    return found


def shape(x):
    "A syntax tree as nested lists that do not depend on layout, comments or the version of Python."
    if isinstance(x, list): return [shape(v) for v in x]
    if not isinstance(x, ast.AST): return repr(x)
    fields = [(k, v) for k, v in ast.iter_fields(x) if v not in (None, []) and k not in ("ctx", "kind", "type_comment", "type_params")]
    return [type(x).__name__, [[k, shape(v)] for k, v in fields]]


def names(node):
    "(names that a statement binds or changes, names that it uses from outside)."
    binds, uses = set(), set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name): (uses if isinstance(n.ctx, ast.Load) else binds).add(n.id)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef)): binds.add(n.name)
        elif isinstance(n, (ast.Import, ast.ImportFrom)): binds |= {(a.asname or a.name).split(".")[0] for a in n.names}
        elif isinstance(n, ast.arg): binds.add(n.arg)
        elif isinstance(n, (ast.Attribute, ast.Subscript)) and not isinstance(n.ctx, ast.Load):
            while isinstance(n, (ast.Attribute, ast.Subscript)): n = n.value
            if isinstance(n, ast.Name): binds.add(n.id)
    if not isinstance(node, ast.FunctionDef): return binds, uses
    patched = {n.id for a in node.args.args[:1] if a.annotation and node.decorator_list for n in ast.walk(a.annotation) if isinstance(n, ast.Name)}
    return {node.name, *patched}, (uses - binds) | patched      # what a function binds inside stays inside


def code_hash(nb, flag=None):
    """sha256 of the code, whatever its layout: of all of it, or of the cells that option `flag` lets run and the statements above that they depend on.

    To split a cell, to break a line or to write a comment changes no result, so it changes no hash."""
    found = statements(nb, flag)
    if flag:
        kept, wanted = [], set()
        for node, marked in reversed(found):
            binds, uses = names(node)
            if marked or binds & wanted:
                kept.insert(0, (node, marked))
                wanted |= uses
        found = kept
    return sha256(json.dumps([shape(node) for node, _ in found]).encode()).hexdigest()


def stale(nb):
    "Why the stored outputs do not belong to the code, or ''."
    stamp = nb["metadata"].get("tiny_llm", {})
    if stamp.get("code_sha256") != code_hash(nb): return "the code changed since the outputs were stored"
    for flag in FLAGS:
        if any(set(FLAGS[flag].split()) & directives(c["source"]).keys() for c in nb["cells"] if c["cell_type"] == "code"):
            if stamp.get(f"{flag}_sha256") != code_hash(nb, flag):
                return f"cells marked {FLAGS[flag]} changed, or one above them: run with --{flag}"
    return ""


def skipped(source, flags):
    "Is this cell left alone?"
    d = directives(source)
    return d.get("eval", "").lower() == "false" or "nbdev_export(" in source or bool(flags & d.keys())


def last_lines(s):
    "What a terminal would still show of each line that was rewritten by carriage returns."
    return "\n".join(next((p for p in reversed(l.split("\r")) if p), "") for l in s.split("\n"))


def clean_outputs(cell):
    "Drop widgets, progress bars and stderr; join streams. What a reader loses on stderr is printed here."
    kept = []
    for out in cell.outputs:
        if out.output_type == "stream":
            if out.name == "stderr":
                noise = "\n".join(l for l in last_lines(out.text).split("\n") if l.strip() and not re.search(r"\d+%\|", l))
                if noise: print(f"  stderr, not stored: {noise}", file=sys.stderr)
                continue
            out.text = last_lines(out.text)
            if kept and kept[-1].output_type == "stream": kept[-1].text += out.text
            else: kept.append(out)
        else:
            if WIDGET in out.get("data", {}):
                out.data.pop(WIDGET)
                if out.data.keys() <= {"text/plain"}: continue
            if "metadata" in out: out.metadata = {k: v for k, v in out.metadata.items() if k.startswith("image/")}
            kept.append(out)
    cell.outputs = kept


def execute(path, flags=frozenset(), timeout=900, **extra):
    "The notebook at `path` after running all cells but those marked by `flags`; raises CellExecutionError. `extra`: of the kernel's environment."
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
            if cell.cell_type == "code" and skipped(cell.source, flags): return cell
            start = time.perf_counter()
            try: return await super().async_execute_cell(cell, cell_index, *args, **kwargs)
            finally: spent.append((time.perf_counter()-start, cell_index))

    nb, spent = nbformat.read(path, 4), []
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
               PYTHONHASHSEED="0", OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", "PASSIVE"), PYDEVD_DISABLE_FILE_VALIDATION="1")
    env.pop("MPLBACKEND", None)  # or figures would not be shown in the notebook
    env["SLOW"] = "1"            # slow cells that are to run do run, instead of showing what is stored
    Client(nb, timeout=timeout, kernel_name="python3", record_timing=False, store_widget_state=False, coalesce_streams=False,
           extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(path.parent)}}).execute(env=env | extra)
    for cell in nb.cells:
        if cell.cell_type == "code": clean_outputs(cell)
    nb.metadata.pop("widgets", None)
    return nb, spent


def store(nb, path):
    "Write `nb` as nbdev_clean would leave it; a notebook that did not change is not touched."
    import nbformat
    from execnb.nbio import dict2nb, nb2str
    from nbdev.clean import clean_nb
    c = settings()
    nb = dict2nb(json.loads(nbformat.writes(nb, 4)))
    clean_nb(nb, allowed_metadata_keys=c["allowed_metadata_keys"].split(), allowed_cell_metadata_keys=c["allowed_cell_metadata_keys"].split())
    new = nb2str(nb)
    if new != path.read_text(encoding="utf-8"):
        beside = path.with_suffix(".tmp")
        beside.write_text(new, encoding="utf-8", newline="\n")
        os.replace(beside, path)


def run(path, slow=False, gpu=False, timeout=900):
    "Execute one notebook and store its outputs with the hash of their code."
    start, options = time.perf_counter(), {"slow": slow, "gpu": gpu}
    flags = {f for option, names in FLAGS.items() if not options[option] for f in names.split()}
    nb, spent = execute(path, flags, timeout)
    stamp = nb.metadata.get("tiny_llm", {})
    for option in FLAGS:
        marked = any(set(FLAGS[option].split()) & directives(c.source).keys() for c in nb.cells if c.cell_type == "code")
        if not marked: stamp.pop(f"{option}_sha256", None)
        elif options[option]: stamp[f"{option}_sha256"] = code_hash(nb, option)
    nb.metadata["tiny_llm"] = {**stamp, "code_sha256": code_hash(nb)}
    store(nb, path)
    for where in sorted(set(re.findall(r"/(?:root|work|home/\w+|tmp)/[\w./-]*", json.dumps([c.get("outputs") for c in nb.cells])))):
        print(f"  an output shows a path of this machine: {where}", file=sys.stderr)
    seconds, cell = max(spent, default=(0, 0))
    print(f"{path.name}: {time.perf_counter()-start:.1f} s, slowest cell {cell} {seconds:.1f} s, {path.stat().st_size/1e3:.0f} KB")
    if (why := stale(nb)): print(f"  {why}", file=sys.stderr)


def learner(path, timeout=900):
    "Run All, as somebody does it in JupyterLab; complain unless every slow cell shows what is stored for it."
    start, before = time.perf_counter(), json.loads(path.read_text(encoding="utf-8"))
    nb, spent = execute(path, {"gpu"}, timeout, SLOW="0", JPY_SESSION_NAME=str(path))
    for old, new in zip(before["cells"], nb.cells):
        if "slow" not in directives(new.get("source", "")) or new.cell_type != "code": continue
        kept = [o.get("text") or o.get("data") for o in new.outputs if "SLOW=1" not in json.dumps(o)]
        stored = [text(o["text"]) if "text" in o else {k: text(v) for k, v in o["data"].items()} for o in old["outputs"]]
        assert kept == stored, f"a slow cell does not show its stored result: {text(new.source)[:200]}"
    seconds, cell = max(spent, default=(0, 0))
    print(f"{path.name}: {time.perf_counter() - start:.1f} s, slowest cell {cell} {seconds:.1f} s")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    p.add_argument("--slow", action="store_true", help="run the cells marked slow or notest too")
    p.add_argument("--gpu", action="store_true", help="run the cells marked gpu too")
    p.add_argument("--check", action="store_true", help="only list notebooks whose outputs are stale; exit code 1 if there are any")
    p.add_argument("--learner", action="store_true", help="Run All as in JupyterLab: slow cells show their stored result; nothing is stored")
    p.add_argument("--timeout", type=int, default=900, help="seconds for one cell")
    a = p.parse_args()
    paths = [f.resolve() for f in a.notebooks] or sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(n[0] in "._" for n in p.relative_to(ROOT).parts))
    failed = 0
    for path in paths:
        if a.check:
            why = stale(json.loads(path.read_text(encoding="utf-8")))
            if why: print(f"{path.name}: {why}")
            failed += bool(why)
            continue
        try: learner(path, a.timeout) if a.learner else run(path, a.slow, a.gpu, a.timeout)
        except Exception as e:
            print(f"{path.name}: {'failed' if a.learner else 'not stored'}\n{e}", file=sys.stderr)
            failed += 1
    sys.exit(bool(failed))


if __name__ == "__main__": main()
