"""The course as its notebooks describe it: numbers, titles, what to read before, times, exports.

README's tables, the site's sidebar and its llms.txt are made from it.

    python nbs/_tools/course.py           # write the sidebar into _quarto.yml
    python nbs/_tools/course.py --check   # write nothing; exit code 1 if it would change
    python nbs/_tools/course.py --llms FILE   # write the site's llms.txt: what programs that read for a language model look for

The opening of a notebook is the source: `# Title`, `> blurb`, the line
`**Before this:** [1.02 attention](02_attention.ipynb). **Time:** 25 minutes to read, 20 s to run.`
and for a deep dive the sentence `A deep dive: what follows does not need it.`
"""
import argparse, json, os, re, sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent
PARTS = {"1_transformer": "Transformer", "2_text": "Text", "3_training": "Training", "4_assistant": "Assistant",
         "5_deployment": "Deployment"}
WORDS_PER_MINUTE = 150   # of reading, for a notebook that does not say how long it takes

# Three ways through the course: a letter, what for, and the notebooks, by the modules that they export; None: all of them.
ROUTES = [
    ("A", "understand a transformer",
     "first_model basics transformer.math transformer.attention transformer.rope transformer.blocks transformer.model "
     "assistant.generate"),
    ("B", "train on my own text",
     "first_model basics text.tokenizer text.sources text.corpus text.batches training.optim training.config "
     "training.run training.train training.evaluate assistant.generate assistant.finetune assistant.chat deployment.cli"),
    ("C", "build everything", None),
]


@dataclass
class Notebook:
    "What a notebook says of itself."
    path: str      # from nbs/: 3_training/05_train.ipynb
    number: str    # 3.05; at the top 01
    module: str    # training.train
    title: str
    blurb: str
    before: list   # the numbers of the notebooks to read before, with their paths from nbs/
    minutes: int   # to read, as stated; None if the notebook does not say
    seconds: str   # to run, as stated: "20 s", "< 60 s"; "" if the notebook does not say
    deep: bool     # a deep dive: what follows does not need it
    words: int     # of its Markdown cells

    @property
    def reading(self):
        "Minutes to read: as stated, else from the number of words."
        return self.minutes or max(5, 5 * round(self.words / WORDS_PER_MINUTE / 5))

    @property
    def routes(self): return [letter for letter, _, names in ROUTES if names and self.module in names.split()]


def seconds_of(text):
    "What an opening says of the time to run: '15 s', '< 30 s'; '' if nothing."
    spoken = r"(well under|under|about)? ?(half a minute|a minute|ten seconds|(\d+) s(?:econds)?\b)"
    m = re.search(rf"(?:\bin|run:?\*\*:?|to read,) {spoken}", text)
    if not m: return ""
    n = m[3] or {"half a minute": 30, "a minute": 60, "ten seconds": 10}[m[2]]
    return f"{'< ' if 'under' in (m[1] or '') else ''}{n} s"


def number_of(at):
    "3_training/05_train.ipynb -> 3.05; 01_basics.ipynb -> 01"
    part, _, file = at.rpartition("/")
    return f"{part[:1]}.{file.split('_')[0]}".removeprefix(".")


def links_of(text, folder):
    "Notebooks that a text links to: [1.02 attention](02_attention.ipynb) -> ('1.02', '1_transformer/02_attention.ipynb')"
    targets = re.findall(r"\]\(([\w/.]+\.ipynb)\)", text)
    paths = [Path(os.path.normpath(os.path.join(folder, target))).as_posix() for target in targets]
    return [(number_of(path), path) for path in paths]


def notebook(path):
    "Read one notebook."
    at = path.relative_to(NBS).as_posix()
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    title, blurb = re.match(r"# (.+)\n+> (.+)", text[0]).groups()
    opening = " ".join(" ".join(text[:3]).split())
    before = re.search(r"\*\*Before this:\*\*(.*?)(?=\*\*Time:\*\*|$)", opening)
    minutes = re.search(r"\*\*Time:\*\* (\d+) minutes? to read", opening)
    part, name = os.path.dirname(at).partition("_")[2], path.stem.split("_", 1)[1]
    return Notebook(
        path=at, number=number_of(at), module=f"{part}.{name}".removeprefix("."),
        title=title, blurb=blurb, before=links_of(before[1], os.path.dirname(at)) if before else [],
        minutes=int(minutes[1]) if minutes else None, seconds=seconds_of(opening), deep="A deep dive:" in opening,
        words=sum(len(t.split()) for t in text))


def course():
    "All numbered notebooks in order: those at the top, then part by part."
    paths = [*sorted(NBS.glob("[0-9]*_*.ipynb")), *sorted(NBS.glob("[0-9]_*/[0-9]*_*.ipynb"))]
    return [notebook(p) for p in paths]


def hours(notebooks):
    "Reading time of some notebooks, to half an hour: '2.5 h'"
    return f"{round(sum(n.reading for n in notebooks) / 30) / 2:g} h"


def public_names(n):
    "Names that `tiny_llm` offers from this notebook's module."
    import tiny_llm
    return [name for name, home in tiny_llm._home.items() if home == n.module]


def row(n):
    "A notebook as a row of its part's table."
    before = ", ".join(f"[{number}]({path})" for number, path in n.before)
    time = ", ".join(filter(None, [n.minutes and f"{n.minutes} min", n.seconds]))
    exports = ", ".join(f"`{name}`" for name in public_names(n))
    name = f"[{n.number} {n.title}]({n.path})" + " ☆" * n.deep
    return f"| {name} | {n.blurb} | {before} | {time} | {' '.join(n.routes)} | {exports} |"


def table(part=""):
    "The notebooks of one part ('3_training'; '' for those at the top) as a Markdown table."
    rows = [row(n) for n in course() if (n.path.split("/")[0] if "/" in n.path else "") == part]
    head = ["| notebook | what it teaches | before | time | route | exports |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def routes():
    "The three ways through the course, with their hours of reading, as a Markdown table."
    all_of, rows = course(), []
    for letter, aim, names in ROUTES:
        chosen = [n for n in all_of if names is None or n.module in names.split()]
        time, spine = hours(chosen), hours([n for n in chosen if not n.deep])
        if spine != time: time += f" ({spine} without the deep dives)"
        way = "all notebooks in order" if names is None else ", ".join(f"[{n.number}]({n.path})" for n in chosen)
        rows.append(f"| {letter} | *{aim}* | {way} | {len(chosen)} | {time} |")
    return "\n".join(["| route | what for | notebooks | number | reading |", "|---|---|---|---|---|", *rows])


def sidebar():
    "The lines of _quarto.yml between its two marks: every notebook with its number and title, deep dives with a star."
    def entry(n, indent):
        name = json.dumps(f"{n.number} {n.title}" + " ☆" * n.deep, ensure_ascii=False)
        return [f"{indent}- text: {name}", f"{indent}  href: {n.path}"]

    all_of, lines = course(), ["      - text: What it is", "        href: index.ipynb"]
    for n in all_of:
        if "/" not in n.path: lines += entry(n, " " * 6)
    for folder, name in PARTS.items():
        lines += [f"      - section: {folder[0]} {name}", "        contents:"]
        for n in all_of:
            if n.path.startswith(folder + "/"): lines += entry(n, " " * 10)
    if any(n.deep for n in all_of): lines += ['      - text: "☆ a deep dive: what follows does not need it"']
    return "\n".join(lines) + "\n"


def page_of(n):
    "1_transformer/06_model.ipynb -> 1_transformer/model.html"
    folder, _, file = n.path.rpartition("/")
    return f"{folder}/{file.removesuffix('.ipynb').split('_', 1)[1]}.html".removeprefix("/")


def llms():
    "The site's llms.txt (llmstxt.org): a title, what it is, and a link for each notebook; deep dives stand under Optional."
    c = ConfigParser(delimiters=["="])
    c.read(NBS.parent/"settings.ini", encoding="utf-8")
    c = c["DEFAULT"]
    site, all_of = f"{c['doc_host']}{c['doc_baseurl']}", course()

    def entry(n):
        names = ", ".join(f"`{name}`" for name in public_names(n))
        module = "" if n.module == "first_model" else f" Module `tiny_llm.{n.module}`{names and ': ' + names}."
        return f"- [{n.number} {n.title}]({site}/{page_of(n)}): {n.blurb}{module}"

    lines = [f"# {c['title']}", "", f"> {c['description']}.", "",
             "Each notebook derives its formulas, checks them in cells, and exports one module of the Python package `tiny_llm`. "
             "A notebook uses nothing from one with a higher number.", "",
             "## Start", "", f"- [What it is]({site}/index.html): the promise, the commands, the course",
             f"- [Talk to it]({site}/talk/index.html): a model that answers in the browser", f"- [Source]({c['git_url']}): the notebooks and the package"]
    lines += [entry(n) for n in all_of if "/" not in n.path]
    for folder, name in PARTS.items():
        lines += ["", f"## {name}", "", *(entry(n) for n in all_of if n.path.startswith(folder + "/") and not n.deep)]
    lines += ["", "## Optional", "", *(entry(n) for n in all_of if n.deep)]
    return "\n".join(lines) + "\n"


def quarto_yml(old):
    "_quarto.yml with its sidebar made anew."
    between = r"(?<=# sidebar: made by nbs/_tools/course.py\n).*?(?=^ *# end of sidebar)"
    return re.sub(between, lambda m: sidebar(), old, flags=re.DOTALL | re.MULTILINE)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 if it would change")
    p.add_argument("--llms", metavar="FILE", help="write the site's llms.txt there, and nothing else")
    a = p.parse_args()
    if a.llms: return Path(a.llms).write_text(llms(), encoding="utf-8", newline="\n")
    check, path = a.check, NBS.parent/"_quarto.yml"
    old = path.read_text(encoding="utf-8")
    new = quarto_yml(old)
    if new != old:
        print(path.name, "is out of date" if check else "written")
        if not check: path.write_text(new, encoding="utf-8", newline="\n")
    sys.exit(check and new != old)


if __name__ == "__main__": main()
