"What the tests share: where things are, the order of the notebooks, a copy of the tree, commands with a time limit."
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
sys.path[:0] = [p for p in (str(ROOT), str(NBS/"_tools")) if p not in sys.path]   # the package, and the two scripts


def floor(path):
    "nbs/3_training/02_folder.ipynb -> (3, 2, ''); part 0 is the top; None for a notebook without a number."
    m, part = re.match(r"(\d\d)([a-z]?)_\w+$", Path(path).stem), re.match(r"(\d)_\w+$", Path(path).parent.name)
    return (int(part[1]) if part else 0, int(m[1]), m[2]) if m else None


def notebooks():
    "All notebooks but drafts (`_name.ipynb`, and what lies in `_folder/`), index first, then by floor."
    found = [p for p in NBS.rglob("*.ipynb") if not any(n[0] in "._" for n in p.relative_to(NBS).parts)]
    return sorted(found, key=lambda p: floor(p) or (-1, p.stem))


def number(path):
    "How a notebook is cited: 1.06 for 1_transformer/06_model.ipynb, 01 for 01_basics.ipynb; None where there is none."
    at = floor(path)
    return at and f"{at[0]}.{at[1]:02}{at[2]}".removeprefix("0.")


def page(path): return path.relative_to(NBS).as_posix()


def numbered(): return [p for p in notebooks() if floor(p)]


def exporting(): return [p for p in numbered() if p.stem != "00_first_model"]    # it uses the finished package and exports nothing


def module(path):
    "nbs/3_training/02_folder.ipynb -> training.folder: the module that a notebook exports, by its place."
    part, name = path.parent.name.partition("_")[2], path.stem.split("_", 1)[1]
    return f"{part}.{name}" if path.parent != NBS else name


def module_floors(): return {module(p): floor(p) for p in exporting()}


def read(path): return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell): return "".join(cell["source"])


def code_cells(nb): return [c for c in nb["cells"] if c["cell_type"] == "code"]


def environment(**extra):
    "For a child process: this Python's commands first, one thread, nothing that an earlier nbdev call left behind."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTEST_CURRENT_TEST")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return {**env, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", **extra}


def run(command, cwd=ROOT, timeout=120, **extra):
    "Run a command; fail with what it printed if it fails; kill it with all its children when the time is up."
    own = {} if os.name == "nt" else {"start_new_session": True}
    p = subprocess.Popen([str(c) for c in command], cwd=cwd, env=environment(**extra), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", **own)
    try: out, _ = p.communicate(timeout=timeout)
    except BaseException as e:
        if os.name == "nt": p.kill()
        else: os.killpg(p.pid, signal.SIGKILL)
        out, _ = p.communicate()
        if not isinstance(e, subprocess.TimeoutExpired): raise
        raise AssertionError(f"{' '.join(map(str, command))} took over {timeout} s\n{out[-4000:]}") from None
    assert p.returncode == 0, f"{' '.join(map(str, command))} ended with {p.returncode}\n{out[-8000:]}"
    return out


def python(code, cwd=ROOT, timeout=120, **extra): return run([sys.executable, "-c", code], cwd, timeout, **extra)


def files(top):
    "{relative path: bytes} of all files under `top`, without caches."
    skip = {"__pycache__", ".ipynb_checkpoints", ".git", ".pytest_cache"}
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in sorted(Path(top).rglob("*")) if p.is_file() and not skip & set(p.parts)}


def copy_tree(to):
    "Copy the files that git knows or would add (all files, where this is not a git checkout)."
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "-z", "--exclude-standard"], capture_output=True)
    if listed.returncode == 0: names = [n for n in listed.stdout.decode().split("\0") if n]
    else: names = [n for n in files(ROOT) if n.split("/")[0] not in ("build", "dist", "_proc", "_docs", "runs", ".venv")]
    for name in names:
        here, there = ROOT/name, to/name
        if not (here.exists() or here.is_symlink()): continue
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(here, there, follow_symlinks=False)
    return to


def difference(before, after):
    "What changed between two results of `files`, as text with a diff of each; '' if nothing."
    from difflib import unified_diff
    said = []
    for name in sorted(before.keys() | after.keys()):
        a, b = before.get(name), after.get(name)
        if a == b: continue
        lines = unified_diff(*((x or b"").decode(errors="replace").splitlines() for x in (a, b)), f"{name} before", f"{name} after", lineterm="", n=1)
        said.append("\n".join(list(lines)[:30]))
    return "\n".join(said)
