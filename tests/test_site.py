"""The site: nbdev's processing runs on a copy, and Pandoc, which Quarto is built on, turns each page into HTML as Quarto would.

Links, cross-references, images, formulas and front matter of what comes out are checked, and Chromium looks at the pages on a narrow screen.
With Quarto on the machine the site is rendered too, and those pages are looked at.
"""
import html, json, os, re, shutil, subprocess

import pytest, yaml

import course
from house import NBS, ROOT, code_cells, copy_tree, notebooks, number, page as place, python, read, run, source
from run_notebook import directives, settings

BUILT = {"talk/index.html"}               # pages that are no notebooks: nbs/_tools/talk.py writes them; test_site_talk.py
pages = [place(p) for p in notebooks()]   # 1_transformer/06_model.ipynb
every = pytest.mark.parametrize("page", pages, ids=lambda n: n.removesuffix(".ipynb"))
config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))


def page_file(name):
    "1_transformer/06_model.ipynb -> 1_transformer/model.html"
    folder, _, file = name.rpartition("/")
    return os.path.join(folder, re.sub(r"^\d+[a-z]?_", "", file.removesuffix(".ipynb")) + ".html").replace(os.sep, "/")


def pandoc(*args, stdin=None, **extra):
    import pypandoc
    p = subprocess.run([pypandoc.get_pandoc_path(), *map(str, args)], input=stdin, capture_output=True, text=True, encoding="utf-8",
                       timeout=60, env={**os.environ, **extra})
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


def visible(page): return html.unescape(re.sub(r"<[^>]+>", "", page))


class Site:
    "What nbdev's processing makes of the notebooks, each page as notebook, Markdown, Pandoc tree and HTML."
    def __init__(self, top):
        python("from nbdev.serve import proc_nbs\nif __name__ == '__main__': print(proc_nbs(n_workers=0, force=True))", top, 300, PYTHONPATH=str(top))
        self.top = top/"_proc"
        self.nb = {n: json.loads((self.top/n).read_text(encoding="utf-8")) for n in pages}
        self.markdown = {n: self.as_markdown(self.nb[n]) for n in pages}
        trees = {n: pandoc("-f", "markdown", "-t", "json", stdin=s) for n, s in self.markdown.items()}
        self.tree = {n: json.loads(p.stdout) for n, p in trees.items()}
        (self.top/"notebooks.json").write_text(json.dumps({"notebooks": config["notebooks"]}), encoding="utf-8")
        # from the trees and without colours: a fifth of the time, and nothing here asks for colours
        to_html = ["-f", "json", "-t", "html", "--mathml", "--wrap=none", "--no-highlight", "--lua-filter", NBS/"page.lua", "--metadata-file", self.top/"notebooks.json"]
        made = {n: pandoc(*to_html, "-M", f"notebook={n}", stdin=p.stdout) for n, p in trees.items()}
        self.html, self.warnings = {n: p.stdout for n, p in made.items()}, {n: trees[n].stderr + p.stderr for n, p in made.items()}

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
            summary = f' code-summary="{option(c, "code-summary")}"' if option(c, "code-summary") else ""
            if option(c, "echo") != "false": parts.append(f"````` {{.python{summary}}}\n{shown}\n`````")
            for o in c["outputs"]:
                data = o.get("data", {})
                if "text/markdown" in data: parts.append("".join(data["text/markdown"]))
                elif "image/png" in data: parts.append(f"![{option(c, 'fig-cap')}](output.png){{#{option(c, 'label')}}}")
                elif "text/html" in data: parts.append("::: {.cell-output-display}\n```{=html}\n" + "".join(data["text/html"]) + "\n```\n:::")
                elif "text" in o or "text/plain" in data: parts.append("`````\n" + "".join(o.get("text") or data["text/plain"]) + "\n`````")
        return "\n\n".join(parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory): return Site(copy_tree(tmp_path_factory.mktemp("site")/"tiny_llm"))


# _quarto.yml

def listed(contents):
    for item in contents:
        if "contents" in item: yield from listed(item["contents"])
        elif "href" in item: yield item["href"]


def test_sidebar_lists_exactly_the_notebooks_in_order():
    assert list(listed(config["website"]["sidebar"]["contents"])) == pages
    sections = [s["section"] for s in config["website"]["sidebar"]["contents"] if "section" in s]
    assert [s.split()[0] for s in sections] == ["1", "2", "3", "4", "5"]


def test_sidebar_numbers_are_those_of_the_files():
    def texts(contents):
        for i in contents:
            if "contents" in i: yield from texts(i["contents"])
            elif "href" in i and number(NBS/i["href"]): yield i["text"].split()[0], number(NBS/i["href"])
    assert all(a == b for a, b in texts(config["website"]["sidebar"]["contents"]))


def test_sidebar_is_made_from_the_notebooks():
    "Numbers, full titles, a star at deep dives."
    old = (ROOT/"_quarto.yml").read_text(encoding="utf-8")
    assert "# sidebar: made by" in old and course.quarto_yml(old) == old, "run `python nbs/_tools/course.py`"
    links = [i["href"] for side in config["website"]["navbar"].values() for i in side]
    assert all(link.startswith("https://") or (NBS/link).is_file() for link in links if link not in BUILT) and BUILT <= set(links)


def test_quarto_settings_agree_with_settings_ini():
    c, site = settings(), config["website"]
    assert site["title"] == c["title"] and site["description"] == c["description"] and site["repo-url"] == c["git_url"]
    assert site["site-url"] == c["doc_host"] + c["doc_baseurl"] and site["repo-branch"] == c["branch"] and site["repo-subdir"] == c["nbs_path"]
    assert config["notebooks"]["repo"] == f"{c['user']}/{c['repo']}" and config["notebooks"]["site"] == site["site-url"]
    assert config["notebooks"]["version"] in (c["branch"], "v" + c["version"]), "the branch until a release is tagged, then the tag of this version"
    html = config["format"]["html"]
    assert "code-links" not in html, "Quarto asks git for the address, and stops where there is none"
    assert {"light", "dark"} == set(html["theme"]) and html["html-math-method"] == "mathml" and site["search"]
    assert config["execute"] == {"enabled": False} and config["project"]["output-dir"] == c["doc_path"]
    styles = [f for theme in html["theme"].values() for f in theme if f.endswith(".scss")]
    assert all((NBS/f).exists() for f in [*config["filters"], *config["project"]["post-render"], *styles])


@pytest.mark.skipif(os.name == "nt", reason="git on Windows may write links as text")
def test_quarto_yml_is_linked_into_the_notebooks(): assert (NBS/"_quarto.yml").is_symlink() and (NBS/"_quarto.yml").resolve() == (ROOT/"_quarto.yml").resolve()


# Pages

def test_processing_makes_every_page(site):
    assert {p.relative_to(site.top).as_posix() for p in site.top.rglob("*.ipynb")} == set(pages)
    assert not (site.top/"_quarto.yml").is_symlink() and yaml.safe_load((site.top/"_quarto.yml").read_text(encoding="utf-8")) == config
    assert all((site.top/f).exists() for f in [*config["filters"], *config["project"]["post-render"]])
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
def test_exported_code_is_shown_once_and_can_be_linked_to(site, page):
    "No second signature beside the source, which nbdev's show_doc would add; the module's name above it; a place at each definition."
    said = "\n".join("".join(c["source"]) for c in site.nb[page]["cells"])
    assert "show_doc(" not in said and "NoneType" not in re.sub(r"```.*?```|`[^`\n]*`", "", site.markdown[page], flags=re.S)
    assert "widgets" not in site.nb[page]["metadata"], "the state of widgets brings scripts from another host"
    exported = [s for c in code_cells(read(NBS/page)) if "exports" in directives(s := source(c))]
    names = [n for s in exported for n in re.findall(r"^(?:async )?(?:def|class) (\w+)", s, re.M)]
    assert not [n for n in names if f'id="{n.lower()}"' not in site.html[page]]
    if exported: assert f'code-summary="tiny_llm.{course.notebook(NBS/page).module}"' in html.unescape(site.html[page])


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
        if name in BUILT: continue
        if name in pages: bad += [target] if anchor and f'id="{anchor}"' not in site.html[name] else []
        elif not (site.top/name).is_file(): bad.append(target)
    assert not bad
    assert f'href="{config["website"]["site-url"]}/' not in site.html[page], "links within the site are relative: they work wherever it is served"


@every
def test_a_page_offers_its_notebook(site, page):
    "A download, Colab and Binder, with the version, in one line that page.lua writes."
    found = re.search(r'<div class="launch">.*?</div>', site.html[page], re.S)
    if page == "index.ipynb": return
    links = [html.unescape(x) for x in re.findall(r'href="([^"]+)"', found[0])]
    repo, version, up = config["notebooks"]["repo"], config["notebooks"]["version"], "../" if "/" in page else ""
    assert links == [f"{up}download/{page}", f"https://colab.research.google.com/github/{repo}/blob/{version}/nbs/{page}",
                     f"https://mybinder.org/v2/gh/{repo}/{version}?labpath=nbs/{page}"]
    assert f"Version {version}" in found[0] and f"github.com/{repo}@{version}" in found[0]


@every
def test_a_page_names_its_time_what_comes_before_and_what_it_exports(site, page):
    "The first two in the opening; the third in a line that page.lua writes, with a link to each public function and class."
    if page == "index.ipynb": return
    opening = visible(re.split(r"<h2", site.html[page])[0])
    assert "Time:" in opening and (page in ("00_first_model.ipynb", "01_basics.ipynb") or "Before this:" in opening)
    exported = "\n".join(s for c in code_cells(read(NBS/page)) if {"exports", "export"} & set(directives(s := source(c))))
    names = re.findall(r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", exported, re.M)
    found = re.search(r'<div class="exports">.*?</div>', site.html[page], re.S)
    assert bool(found) == bool(names)
    if not names: return
    assert f"tiny_llm.{course.notebook(NBS/page).module}" in visible(found[0])
    assert re.findall(r'href="#([^"]+)"', found[0]) == [n.lower() for n in names]
    assert [n.rpartition(".")[2] for n in visible(found[0]).partition(": ")[2].split(", ")][-1].strip() == names[-1]


@every
def test_cells_that_draw_fold_on_the_site(site, page):
    "A cell with a figure shows it, and its code on demand; the few lines that a reader should see stay open."
    cells = [c for c in site.nb[page]["cells"] if c["cell_type"] == "code" and any("image/png" in o.get("data", {}) for o in c["outputs"])]
    for c in cells:
        code = [line for line in "".join(c["source"]).splitlines() if line.strip() and not line.startswith("#|")]
        assert option(c, "code-fold") == "true" or option(c, "echo") == "false" or len(code) <= 3, option(c, "label")


def test_llms_txt(site, tmp_path):
    "Every page with its blurb, at an address that exists; the form of llmstxt.org."
    python(f"import sys; sys.path.insert(0, 'nbs/_tools'); sys.argv[1:] = ['--llms', {str(tmp_path/'llms.txt')!r}]; import course; course.main()", ROOT, 60)
    text = (tmp_path/"llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# tiny_llm\n\n> ") and re.findall(r"^## (.*)", text, re.M) == ["Start", *course.PARTS.values(), "Optional"]
    links = re.findall(r"^- \[(.+?)\]\((\S+)\): (.+)", text, re.M)
    home = config["website"]["site-url"] + "/"
    paths = [target.removeprefix(home) for _, target, _ in links if target.startswith(home)]
    assert sorted(paths) == sorted([*map(page_file, pages), *BUILT]) and len(links) == len(paths) + 1
    assert all(n.blurb in text for n in course.course()) and "`tiny_llm.training.train`: " in text


def test_first_screen(site):
    "nbdev makes the front matter out of the first cell, so what a visitor should read first stands in the second: the promise and the two commands."
    text = visible(re.split(r"<h2|<h3|<figure|<img", site.html["index.ipynb"])[0])
    for part in ("On two CPU cores, in minutes, you train, understand and talk to a language model.", "pip install -e . && tiny_llm quickstart",
                 "pip install -e '.[dev]' && pytest"): assert part in text, part


def test_after_rendering(tmp_path):
    "Scripts from other hosts are taken out of a page, and the notebook that it offers is put beside it."
    inside = '<script src="site_libs/quarto.js"></script>'
    far = ('<script src="https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js" integrity="sha384-x" crossorigin="anonymous"></script>\n'
           '<script src="https://cdn.jsdelivr.net/npm/jquery@3.5.1/dist/jquery.min.js" data-relocate-top="true"></script>\n'
           """<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>\n""")
    proc, nbs = tmp_path/"_proc", tmp_path/"nbs"
    for d in (proc/"_docs"/"3_training", nbs/"3_training"): d.mkdir(parents=True)
    (nbs/"3_training"/"05_train.ipynb").write_text("{}")
    talk = "".join(f'<a href="{at}talk/index.html">Talk to it</a>' for at in ("/", "./", "../", ""))
    (proc/"_docs"/"3_training"/"train.html").write_text(f'{inside}\n{far}<a href="../download/3_training/05_train.ipynb">x</a>{talk}')
    (proc/"_docs"/"index.html").write_text(f"<p>nothing</p>{talk}")
    pages_made = os.linesep.join(["_docs/3_training/train.html", "_docs/index.html", "_docs/search.json"])
    args = ["pandoc", "--from", "markdown", "--to", "plain", "--lua-filter", NBS/"after.lua"]
    import pypandoc
    subprocess.run([pypandoc.get_pandoc_path(), *map(str, args[1:])], input="", cwd=proc, text=True, check=True, timeout=60,
                   env={**os.environ, "QUARTO_PROJECT_OUTPUT_FILES": pages_made, "QUARTO_PROJECT_OUTPUT_DIR": str(proc/"_docs")})
    assert (proc/"_docs"/"3_training"/"train.html").read_text() == f'{inside}\n<a href="../download/3_training/05_train.ipynb">x</a>' + 4 * '<a href="../talk/index.html">Talk to it</a>'
    assert (proc/"_docs"/"index.html").read_text() == "<p>nothing</p>" + 4 * '<a href="talk/index.html">Talk to it</a>'
    assert (proc/"_docs"/"download"/"3_training"/"05_train.ipynb").read_text() == "{}"


def test_printed_prose_is_broken_into_lines():
    long, short = "once upon a time " * 10, "a | b"
    made = pandoc("-f", "markdown", "-t", "html", "--lua-filter", NBS/"page.lua", stdin=f"```\n{long}\n```\n\n```\n{short}\n```\n").stdout
    assert made.count('class="prose"') == 1 and made.index("prose") < made.index("a | b")


def test_fonts_are_our_own():
    "The themes would fetch theirs from Google; formulas need a font with a table for them, which is small and free."
    style = (NBS/"styles.scss").read_text(encoding="utf-8")
    assert "$web-font-path: false" in style and not re.search(r"url\(.?https?:|@import", style)
    for file in re.findall(r'url\("([^"]+)"\)', style):
        assert (NBS/file).read_bytes()[:4] == b"wOF2" and (NBS/file).stat().st_size < 500_000
        assert "SIL Open Font License" in " ".join((NBS/file.replace("-Regular.woff2", "-LICENSE.txt")).read_text(encoding="utf-8").split())


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


# What the Pandoc of Quarto 1.8 (3.6) leaves as raw TeX; a newer one may know some of them.
UNKNOWN = r"\\(?:Bigl|[bB]igm|cfrac|textcolor|color|argmax|hphantom|cancel|intertext|DeclareMathOperator)(?![A-Za-z])"


@every
def test_formulas_suit_the_pinned_quarto(site, page):
    bad = [c[1] for c in nodes(site.tree[page], "Math") if re.search(UNKNOWN, c[1])]
    assert not bad, f"Quarto 1.8 shows these as TeX: {bad}"


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
    assert all(f'id="equation-{t}" class="equation-number">({t})</span>' in site.html[page] for t in tags)
    referred = set(re.findall(r"(?<!\w)\((\d\.\d\d[a-z]?\.\d+[a-z]?)\)", re.sub(r"`[^`\n]*`|\$.*?\$", "", site.markdown[page])))
    assert referred <= all_tags(site), f"no such equation: {referred - all_tags(site)}"
    assert set(re.findall(r'<a href="#equation-([\w.]+)"', site.html[page])) <= set(tags)


def test_an_equation_named_in_the_text_is_a_link():
    text = "By (1.02.3), (1.02.9)-(1.02.3): so.\n\n$$ a = b \\tag{1.02.3} $$\n\n## Of (1.02.3)\n\n`(1.02.3)` [see (1.02.3)](x)\n"
    made = pandoc("-f", "markdown", "-t", "html", "--mathml", "--lua-filter", NBS/"page.lua", stdin=text).stdout
    assert made.count('<a href="#equation-1.02.3" class="to-equation">(1.02.3)</a>') == 2 and made.count("<a ") == 3


@every
def test_tables_are_tables(site, page):
    "A row of dashes and bars that Pandoc did not take for a table shows as text."
    text = [s for kind in ("Str",) for s in nodes(site.tree[page], kind)]
    assert not [s for s in text if re.fullmatch(r"\|?:?-{3,}:?\|?", s)]


# In a browser

TOO_WIDE = """() => {
    const screen = document.documentElement.clientWidth, scrolls = e => { for (; (e = e.parentElement) && e !== document.body;) if (getComputedStyle(e).overflowX !== "visible") return true }
    const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > screen + 1 && !scrolls(e))
    return document.documentElement.scrollWidth > screen ? wide.slice(0, 3).map(e => e.tagName + ": " + e.textContent.trim().slice(0, 60)) : []
}"""


def look(files, width=390):
    "Each page in Chromium: what is wider than the screen, what is asked of another host, what was left as TeX."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser: pytest.skip("no Chromium here")
    wrong = {}
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = b.new_context(viewport={"width": width, "height": 900}).new_page()
        asked = []
        tab.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        for file in files:
            asked.clear()
            tab.goto(file.as_uri())
            found = tab.evaluate(TOO_WIDE) + asked + tab.eval_on_selector_all("mtext, .math", "all => all.map(e => e.textContent).filter(t => t.includes('\\\\'))")
            if found: wrong[file.name] = found
        b.close()
    return wrong


@pytest.mark.timeout(300)
def test_no_page_is_wider_than_a_phone(site, tmp_path):
    "A stand-in for Quarto's pages: Pandoc's HTML with the rules of styles.scss."
    css = (NBS/"styles.scss").read_text(encoding="utf-8").partition("/*-- scss:rules --*/")[2]
    shutil.copytree(NBS/"fonts", tmp_path/"fonts")
    made = []
    for n in pages:
        made.append(tmp_path/page_file(n).replace("/", "-"))
        made[-1].write_text(f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><style>{css}</style>"
                            f"<main>{site.html[n]}</main>", encoding="utf-8")
    assert not look(made)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed here; the workflow site.yml renders with it")
def test_quarto_renders(site):
    run(["quarto", "render"], site.top, 1500)
    made = site.top/config["project"]["output-dir"]
    files = {n: made/page_file(n) for n in pages}
    assert all(f.is_file() for f in files.values())
    text = {n: f.read_text(encoding="utf-8") for n, f in files.items()}
    assert all("<math" in text[n] for n in pages if list(nodes(site.tree[n], "Math")))
    assert not [n for n in pages if re.search(r"<(?:script|img|iframe)[^>]+src=.https?:|<link[^>]+stylesheet[^>]+https?:", text[n])]
    assert all((made/"download"/n).read_bytes() == (site.top.parent/"nbs"/n).read_bytes() for n in pages if n != "index.ipynb")
    assert "pip install -e . && tiny_llm quickstart" in visible(text["index.ipynb"].split("<figure")[0])
    assert list(made.rglob("*.woff2"))
    assert not look(files.values()) and not look(files.values(), width=1400)
