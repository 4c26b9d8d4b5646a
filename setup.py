"The package's metadata, all of it read from settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
c = config["DEFAULT"]
extras = {name.removesuffix("_requirements"): c[name].split() for name in c if name.endswith("_requirements")}

# README.md links to files of the repository; on PyPI they need a whole address.
readme = (here/"README.md").read_text(encoding="utf-8")
raw, blob = f"https://raw.githubusercontent.com/{c['user']}/{c['repo']}/{c['branch']}/", f"{c['git_url']}/blob/{c['branch']}/"
readme = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{raw}", readme)
readme = re.sub(r"((?<!!)\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{blob}", readme)

setup(
    name=c["lib_name"], version=c["version"], description=c["description"], keywords=c["keywords"],
    author=c["author"], author_email=c["author_email"], url=c["git_url"], license="Apache-2.0",
    project_urls={"Documentation": f"{c['doc_host']}{c['doc_baseurl']}", "Changelog": f"{blob}CHANGELOG.md"},
    long_description=readme, long_description_content_type="text/markdown",
    packages=find_packages(include=["tiny_llm", "tiny_llm.*"]), include_package_data=True,
    python_requires=f">={c['min_python']}", install_requires=c["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": c["console_scripts"].split(), "nbdev": [f"{c['lib_name']}={c['lib_name']}._modidx:d"]},
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Education", "Framework :: Jupyter",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
