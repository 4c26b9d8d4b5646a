"""README.md from nbs/index.ipynb, with nbdev's processors and nbconvert, without Quarto.

    python nbs/_tools/make_readme.py           # write README.md and the figures of index.ipynb, nbs/images/index-N.png
    python nbs/_tools/make_readme.py --check   # write nothing; exit code 1 if something would change

Links that are relative to nbs/ become relative to the top of the repository; setup.py makes them absolute for PyPI.
"""
import argparse, os, re, sys
from base64 import b64decode
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent.parent
# On the site, links to files of the repository need a whole address.
BLOB = "https://github.com/tiny-llm/tiny_llm/blob/main/"
WARNING = "<!-- Made from nbs/index.ipynb by nbs/_tools/make_readme.py: edit the notebook, not this file. -->"


def from_top(target):
    "A link as seen from the top: 01_basics.ipynb -> nbs/01_basics.ipynb, GitHub's address of LICENSE -> LICENSE; others stay."
    if target.startswith(BLOB): return target.removeprefix(BLOB)
    if re.match(r"\w+:|#|/", target): return target
    parts = []
    for part in PurePosixPath("nbs", target).parts:
        if part == "..": parts.pop()
        else: parts.append(part)
    return "/".join(parts)


def relink(markdown):
    "Markdown and HTML links outside code."
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", markdown, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(pieces), 2):
        s = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + from_top(m[2]), pieces[i])
        pieces[i] = re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1] + from_top(m[2]), s)
    return "".join(pieces)


def quarto_option(source, name):
    m = re.search(rf"^\s*#\|\s*{name}:\s*(.*?)\s*$", source, re.MULTILINE)
    return m[1].strip("\"'") if m else ""


def cells(path):
    "The notebook after nbdev's processors: hidden and exported cells gone, ANSI codes stripped, front matter back to a title."
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language, rm_export, rm_header_dash, strip_ansi
    procs = [populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_]
    return NBProcessor(path, procs=procs, process=True).nb


def make(path=ROOT/"nbs"/"index.ipynb"):
    "{path: bytes} of README.md and its figures."
    import nbformat
    from execnb.nbio import nb2str
    from nbconvert import MarkdownExporter
    nb, figures = nbformat.reads(nb2str(cells(path)), 4), {}
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        label, caption, alt = (quarto_option(cell.source, n) for n in ("label", "fig-cap", "fig-alt"))
        echo = quarto_option(cell.source, "echo") != "false"
        kept = []
        for out in cell.outputs:
            if "image/png" in out.get("data", {}):
                name = (label.removeprefix("fig-") or f"index-{len(figures)+1}") + ".png"
                figures[path.parent/"images"/name] = b64decode(out.data["image/png"])
                out.data = {"text/markdown": f"![{alt or caption}](images/{name})" + (f"\n\n*{caption}*" if caption else "")}
            if out.output_type == "stream" and out.name == "stderr": continue
            kept.append(out)
        cell.outputs = kept
        cell.source = re.sub(r"^\s*#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n") if echo else ""
    nb.metadata["language_info"] = {"name": "python"}
    body = MarkdownExporter().from_notebook_node(nb)[0]
    body = re.sub(r"^```python\s*```\n", "", body, flags=re.MULTILINE)
    body = re.sub(r"[ \t]+$", "", re.sub(r"\n{3,}", "\n\n", body).strip(), flags=re.MULTILINE)
    title, _, rest = relink(body).partition("\n")
    return {path.parent.parent/"README.md": f"{title}\n\n{WARNING}\n{rest}\n".encode(), **figures}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    check, changed = p.parse_args().check, False
    for path, new in make().items():
        if path.exists() and path.read_bytes() == new: continue
        changed = True
        print(path.relative_to(ROOT), "is out of date" if check else "written")
        if check: continue
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(path.name + ".part")
        beside.write_bytes(new)
        os.replace(beside, path)
    sys.exit(check and changed)


if __name__ == "__main__": main()
