"""The documentation names only what exists: files, sections, nodes, students, policies, templates, Python names."""

import importlib
import re
from pathlib import Path

import pytest

from context_forcing.memory.config import MEMORY_PRESETS, POLICIES
from context_forcing.memory.memory import CHANGES
from context_forcing.model.checkpoints.published import PUBLISHED

ROOT = Path(__file__).parents[2]
README_BYTES = 10_240
ROOMS = ("benchmark", "cli", "memory", "model", "nodes", "train", "video", "workers")
HELP = ROOT / "web" / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *HELP.rglob("*.md")])
SOURCES = sorted(
    path
    for folder in (
        "benchmark",
        "cli",
        "memory",
        "model",
        "nodes",
        "train",
        "video",
        "workers",
        "tests",
        "scripts",
        ".github",
        ".ci",
    )
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".mjs", ".yml", "") and path.is_file() and path != Path(__file__)
) + [ROOT / "__init__.py", ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml"]
NOT_HERE = {f"{name}.md" for name in ("architecture", "comfyui", "demo_world", "method", "style", "users")}
"""Names of notes outside the repository; its own documents are named as docs/NAME.md."""
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)


def text_of(path):
    return path.read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(ROOT).with_suffix(""))


def base_of(page):
    """The folder that links of a page begin at. ComfyUI's page takes the same one for help pages in every language."""
    return HELP if HELP in page.parents else page.parent


def headings(path):
    return HEADING.findall(FENCE.sub("", text_of(path)))


def anchor(heading):
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    text = FENCE.sub("", text_of(page))
    for target, section in LINK.findall(text):
        path = (base_of(page) / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {target} does not exist"
        assert path.is_relative_to(ROOT), f"{page.name}: {target} is outside the repository"
        if section:
            assert section in map(anchor, headings(path)), f"{page.name}: {target}#{section} does not exist"


def test_readme_repeats_figures_of_the_results():
    figures = re.findall(r"[+-]?\d\.\d\d \[[^]]*\]", text_of(ROOT / "README.md"))
    assert figures and all(figure in text_of(ROOT / "docs" / "results.md") for figure in figures)


def test_every_page_is_linked_from_readme():
    linked = {target for target, _ in LINK.findall(text_of(ROOT / "README.md"))}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_every_picture_is_used():
    text = "".join(text_of(page) for page in PAGES)
    unused = [path.name for path in (ROOT / "docs").iterdir() if path.suffix != ".md" and path.name not in text]
    assert not unused


def references(source):
    """What is wrong with the documents that a file of code names."""
    text = re.sub(r"\s*\n\s*(?:# ?)?", " ", text_of(source))
    for name in re.findall(r"[\w./-]*\b[\w-]+\.md\b", text):
        if name in NOT_HERE or (name.startswith("docs/") and not (ROOT / name).is_file()):
            yield f"{name} is not a document of this repository, written from its root"
    for name, section in re.findall(r"(docs/\w+\.md), ([A-Z][\w -]*)", text):
        if (ROOT / name).is_file() and not any(section.startswith(known) for known in headings(ROOT / name)):
            yield f"{name} has no section {section!r}"
    yield from (f"{number}: sections have names" for number in re.findall(r"\.md,? (?:sec\. )?\d[\d.]*", text))


def test_code_refers_to_sections_that_exist():
    """`docs/method.md, Policies` names a section; no document outside the repository is named."""
    wrong = [f"{source.relative_to(ROOT)}: {problem}" for source in SOURCES for problem in references(source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_names_exist(page):
    for name in re.findall(r"`(context_forcing(?:\.\w+)+)", text_of(page)):
        if name == "context_forcing.train" or (ROOT / Path(*name.split(".")[1:])).is_dir():
            continue
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"], ids=lambda p: p.stem)
def test_paths_exist(page):
    rooms = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0].isalpha())
    for name in re.findall(rf"`((?:{rooms})/[^`\s]*)`", text_of(page)):
        if "<" not in name:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def nodes():
    """Id and display name of every node."""
    source = "".join(text_of(path) for path in (ROOT / "nodes").glob("*.py"))
    return dict(re.findall(r'node_id="(\w+)",\s*display_name="([^"]+)"', source))


def test_every_node_has_a_help_page():
    assert nodes() and set(nodes()) == {path.stem for path in HELP.glob("*.md")}
    for node, name in nodes().items():
        assert headings(HELP / f"{node}.md")[0] == name
        assert name in text_of(ROOT / "README.md") and f"`{node}`" in text_of(ROOT / "docs" / "comfyui.md")


def test_tables_name_what_there_is():
    students, memory, comfyui = (text_of(ROOT / "docs" / f"{name}.md") for name in ("students", "memory", "comfyui"))
    assert all(f"| `{name}` |" in students for name in PUBLISHED)
    assert all(f"| `{name}`" in memory for name in (*POLICIES, *CHANGES, *MEMORY_PRESETS))
    graphs = [path for folder in ("workflows", "subgraphs") for path in (ROOT / folder).glob("*.json")]
    assert graphs and all(f"| *{path.stem}* |" in comfyui for path in graphs)
