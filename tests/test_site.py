"""The site: nbdev's processing runs on a copy, and Pandoc, which Quarto is built on, turns each page into HTML as Quarto would.

Links, cross-references, images, formulas and front matter of what comes out are checked. With Quarto on the machine the site is rendered too.
"""
import json, os, re, shutil, subprocess

import pytest, yaml

from house import NBS, ROOT, code_cells, copy_tree, notebooks, number, page as place, python, read, run, source
from run_notebook import directives, settings

pages = [place(p) for p in notebooks()]   # 1_transformer/06_model.ipynb
every = pytest.mark.parametrize("page", pages, ids=lambda n: n.removesuffix(".ipynb"))
config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))


def page_file(name):
    "1_transformer/06_model.ipynb -> 1_transformer/model.html"
    folder, _, file = name.rpartition("/")
    return os.path.join(folder, re.sub(r"^\d+[a-z]?_", "", file.removesuffix(".ipynb")) + ".html").replace(os.sep, "/")


def pandoc(*args, stdin=None):
    import pypandoc
    p = subprocess.run([pypandoc.get_pandoc_path(), *map(str, args)], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert p.returncode == 0, p.stderr
    return p


def nodes(tree, kind):
    "All nodes of one type in Pandoc's JSON."
    if isinstance(tree, dict):
        if tree.get("t") == kind: yield tree["c"]
        for v in tree.values(): yield from nodes(v, kind)
    elif isinstance(tree, list):
        for v in tree: yield from nodes(v, kind)


def option(cell, name):
    m = re.search(rf"^\s*#\|\s*{name}:\s*(.*?)\s*$", "".join(cell["source"]), re.M)
    return m[1].strip("\"'") if m else ""


class Site:
    "What nbdev's processing makes of the notebooks, each page as notebook, Markdown, Pandoc tree and HTML."
    def __init__(self, top):
        python("from nbdev.serve import proc_nbs\nif __name__ == '__main__': print(proc_nbs(n_workers=0, force=True))", top, 300, PYTHONPATH=str(top))
        self.top = top/"_proc"
        self.nb = {n: json.loads((self.top/n).read_text(encoding="utf-8")) for n in pages}
        self.markdown = {n: self.as_markdown(self.nb[n]) for n in pages}
        self.tree = {n: json.loads(pandoc("-f", "markdown", "-t", "json", stdin=s).stdout) for n, s in self.markdown.items()}
        made = {n: pandoc("-f", "markdown", "-t", "html", "--mathml", "--wrap=none", "--lua-filter", NBS/"equations.lua", stdin=s) for n, s in self.markdown.items()}
        self.html, self.warnings = {n: p.stdout for n, p in made.items()}, {n: p.stderr for n, p in made.items()}

    @staticmethod
    def as_markdown(nb):
        "The page as Quarto hands it to Pandoc: text, code blocks, Markdown and HTML outputs, figures as labelled images."
        parts = []
        for c in nb["cells"]:
            s = "".join(c["source"])
            if c["cell_type"] == "raw" and s.lstrip().startswith("---"): continue
            if c["cell_type"] != "code":
                parts.append(s)
                continue
            shown = re.sub(r"^\s*#\|.*\n?", "", s, flags=re.M)
            if option(c, "echo") != "false": parts.append(f"````` python\n{shown}\n`````")
            for o in c["outputs"]:
                data = o.get("data", {})
                if "text/markdown" in data: parts.append("".join(data["text/markdown"]))
                elif "image/png" in data: parts.append(f"![{option(c, 'fig-cap')}](output.png){{#{option(c, 'label')}}}")
        return "\n\n".join(parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory): return Site(copy_tree(tmp_path_factory.mktemp("site")/"tiny_llm"))


# _quarto.yml

def listed(contents):
    for item in contents:
        if "contents" in item: yield from listed(item["contents"])
        else: yield item["href"] if isinstance(item, dict) else item


def test_sidebar_lists_exactly_the_notebooks_in_order():
    assert list(listed(config["website"]["sidebar"]["contents"])) == pages
    sections = [s["section"] for s in config["website"]["sidebar"]["contents"] if "section" in s]
    assert [s.split()[0] for s in sections] == ["1", "2", "3", "4", "5"]


def test_sidebar_numbers_are_those_of_the_files():
    def texts(contents):
        for i in contents:
            if "contents" in i: yield from texts(i["contents"])
            elif number(NBS/i["href"]): yield i["text"].split()[0], number(NBS/i["href"])
    assert all(a == b for a, b in texts(config["website"]["sidebar"]["contents"]))


def test_quarto_settings_agree_with_settings_ini():
    c, site = settings(), config["website"]
    assert site["title"] == c["title"] and site["description"] == c["description"] and site["repo-url"] == c["git_url"]
    assert site["site-url"] == c["doc_host"] + c["doc_baseurl"] and site["repo-branch"] == c["branch"] and site["repo-subdir"] == c["nbs_path"]
    html = config["format"]["html"]
    assert {"light", "dark"} == set(html["theme"]) and html["html-math-method"] == "mathml" and site["search"]
    assert config["execute"] == {"enabled": False} and config["project"]["output-dir"] == c["doc_path"]
    assert all((NBS/f).exists() for f in config["filters"])


@pytest.mark.skipif(os.name == "nt", reason="git on Windows may write links as text")
def test_quarto_yml_is_linked_into_the_notebooks(): assert (NBS/"_quarto.yml").is_symlink() and (NBS/"_quarto.yml").resolve() == (ROOT/"_quarto.yml").resolve()


# Pages

def test_processing_makes_every_page(site):
    assert {p.relative_to(site.top).as_posix() for p in site.top.rglob("*.ipynb")} == set(pages)
    assert not (site.top/"_quarto.yml").is_symlink() and yaml.safe_load((site.top/"_quarto.yml").read_text(encoding="utf-8")) == config
    assert all((site.top/f).exists() for f in config["filters"])
    assert len({page_file(n) for n in pages}) == len(pages), "two pages of one name"


@every
def test_front_matter(site, page):
    first = "".join(site.nb[page]["cells"][0]["source"]).strip()
    assert site.nb[page]["cells"][0]["cell_type"] == "raw"
    front = yaml.safe_load(first.strip("-\n"))
    assert front["title"] and front["output-file"] == page_file(page).rpartition("/")[2]
    assert front["description"].endswith("."), "the blurb is a sentence and becomes the page's description"
    assert not any("default_exp" in "".join(c["source"]) for c in site.nb[page]["cells"] if c["cell_type"] == "code"), "directives are gone"


@every
def test_exported_code_is_shown(site, page):
    "`#| export` takes a cell off the page and leaves its signature; `#| exports` shows the source, which is what readers came for."
    hidden = [s for c in code_cells(read(NBS/page)) if "export" in directives(s := source(c)) and re.search(r"^(?:def|class) [a-zA-Z]", s, re.M)]
    assert not hidden, f"{len(hidden)} cells say #| export instead of #| exports, first: {hidden[0][:80]!r}"


@every
def test_links(site, page):
    "Links go to a page that exists, and to a heading that is there; images exist."
    bad, here = [], page.rpartition("/")[0]
    images = [c[2][0] for c in nodes(site.tree[page], "Image") if c[2][0] != "output.png"]
    for target in [c[2][0] for c in nodes(site.tree[page], "Link")] + images:
        home = config["website"]["site-url"] + "/"
        if target.startswith(home): path, _, anchor = target.removeprefix(home).partition("#")
        elif re.match(r"https?://[\w.-]+\.\w+(?:[/?#]\S*)?$|mailto:", target): continue
        else: path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join("" if target.startswith(home) else here, path)).replace(os.sep, "/") if path else ""
        name = {page_file(n): n for n in pages}.get(path, path) if path else page
        if name in pages: bad += [target] if anchor and f'id="{anchor}"' not in site.html[name] and not target.startswith(home) else []
        elif not (site.top/name).is_file(): bad.append(target)
    assert not bad


@every
def test_cross_references(site, page):
    "`@fig-x` is a figure of this page; figures have captions; no two share a label."
    cells = [c for c in site.nb[page]["cells"] if c["cell_type"] == "code" and option(c, "label")]
    labels = [option(c, "label") for c in cells]
    text = "\n".join("".join(c["source"]) for c in site.nb[page]["cells"] if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    used = set(re.findall(r"(?<![\w.])@((?:fig|tbl|eq|sec|lst)-[\w-]*\w)", text))
    defined = set(labels) | set(re.findall(r"\{#((?:fig|tbl|eq|sec|lst)-[\w-]+)", text))
    assert used <= defined, f"not on this page: {used - defined}"
    assert len(labels) == len(set(labels))
    assert all(re.fullmatch(r"(fig|tbl)-[\w-]+", l) for l in labels)
    assert all(option(c, "fig-cap") and any("image/png" in o.get("data", {}) for o in c["outputs"]) for c in cells if option(c, "label").startswith("fig-"))


def test_figure_labels_are_unique(site):
    labels = [option(c, "label") for n in pages for c in site.nb[n]["cells"] if c["cell_type"] == "code" and option(c, "label")]
    assert len(labels) == len(set(labels))


@every
def test_formulas(site, page):
    "Pandoc reads every formula and turns it into MathML; none is left as source; no dollar sign is left over (an amount: write USD)."
    assert not site.warnings[page], site.warnings[page]
    left = [s for s in nodes(site.tree[page], "Str") if "$" in s]
    assert not left, f"unbalanced dollar signs near {left}"
    lost = [c[1] for kind in ("RawInline", "RawBlock") for c in nodes(site.tree[page], kind) if c[0] in ("tex", "latex")]
    assert not lost, f"TeX outside of $…$ vanishes: {lost}"
    formulas = list(nodes(site.tree[page], "Math"))
    assert site.html[page].count("<math") == len(formulas) and "math inline" not in site.html[page]
    commands = re.findall(r"<mi[^>]*>\\\w+|<mtext[^>]*>\\\w+", site.html[page])
    assert not commands, f"not MathML: {commands}"


def all_tags(site): return {t for s in site.markdown.values() for t in re.findall(r"\\tag\{(.*?)\}", s)}


@every
def test_equation_numbers(site, page):
    "Each number is given once, in this page's series and in order, outside of inline formulas; references to it exist; it is shown."
    formulas = [(c[0]["t"], c[1]) for c in nodes(site.tree[page], "Math")]
    tags = [n for kind, tex in formulas if kind == "DisplayMath" for n in re.findall(r"\\tag\{(.*?)\}", tex)]
    assert not any("\\tag" in tex for kind, tex in formulas if kind == "InlineMath")
    at = number(NBS/page) or "00"
    series = at if "." in at else f"0.{at}"
    assert all(re.fullmatch(rf"{series}\.\d+[a-z]?", t) for t in tags), tags
    assert len(tags) == len(set(tags))
    counted = [int(re.match(r"\d+", t.rpartition(".")[2])[0]) for t in tags]
    assert counted == sorted(counted)
    assert all(f"({t})</mtext>" in site.html[page] for t in tags)
    referred = set(re.findall(r"(?<!\w)\((\d\.\d\d[a-z]?\.\d+[a-z]?)\)", re.sub(r"`[^`\n]*`|\$.*?\$", "", site.markdown[page])))
    assert referred <= all_tags(site), f"no such equation: {referred - all_tags(site)}"


@every
def test_tables_are_tables(site, page):
    "A row of dashes and bars that Pandoc did not take for a table shows as text."
    text = [s for kind in ("Str",) for s in nodes(site.tree[page], kind)]
    assert not [s for s in text if re.fullmatch(r"\|?:?-{3,}:?\|?", s)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed here; the workflow site.yml renders with it")
def test_quarto_renders(site):
    run(["quarto", "render"], site.top, 900)
    made = site.top/config["project"]["output-dir"]
    assert {p.name for p in made.glob("*.html")} >= {page_file(n) for n in pages}
    assert all("<math" in (made/page_file(n)).read_text(encoding="utf-8") for n in pages if list(nodes(site.tree[n], "Math")))
