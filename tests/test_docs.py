"""README and docs/: each Python example runs, each command parses, each excerpt and each file named is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import convdit
from convdit import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
API = {
    name: set(module.__all__)
    for name, module in vars(convdit).items()
    if name in ("ops", "nn", "models", "sparse", "diffusion", "checkpoints")
}


def ids(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """(line of the page, title, text) of its fenced blocks in this language."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start(3)), found[2], found[3])
        for found in FENCED.finditer(text)
        if found[1] == language
    ]


def commands(page):
    """The ``convdit`` commands of a page: indented lines (joined at a backslash), and whole spans in backticks."""
    text = FENCED.sub("", page.read_text()).replace("\\\n", " ")
    indented = re.findall(r"^    (convdit .*)$", text, re.MULTILINE)
    spans = re.findall(r"`(convdit [^`\n]+)`", text)
    return [shlex.split(line, comments=True)[1:] for line in indented + spans]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=ids)
def test_python_examples_run_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, _, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=ids)
def test_commands_parse(page, capsys):
    for arguments in commands(page):
        try:  # a command that is only mentioned need not be complete
            cli._parser().parse_args(arguments if len(arguments) > 1 else [*arguments, "--help"])
        except SystemExit as stop:
            assert stop.code == 0, f"convdit {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_targets_of_make_exist():
    known = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^    |`)make ([a-z][a-z0-9-]*)", page.read_text(), re.MULTILINE))
        assert named <= known, f"{ids(page)}: {sorted(named - known)}"


def test_excerpts_are_what_the_files_hold():
    for page in PAGES:
        for _, title, text in blocks(page, "cpp"):
            source = (ROOT / title).read_text()
            for piece in text.split("...\n"):
                assert piece in source, f"{ids(page)}: not in {title}:\n{piece}"


def test_files_named_exist():
    named = re.compile(r"`((?:csrc|convdit|tests|benchmarks|docs|examples)/[\w./]+)`")
    for page in PAGES:
        for path in named.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{ids(page)}: {path}"


def test_pages_build_without_a_warning(tmp_path):
    """Every link, and every name of the API pages, leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shift, scale" in (tmp_path / "site" / "api" / "ops" / "index.html").read_text()


@pytest.mark.parametrize("module", sorted(API))
def test_api_page_has_every_public_name(module):
    page = (ROOT / "docs" / "api" / f"{module}.md").read_text()
    named = set(re.findall(rf"^::: convdit\.{module}\.(\w+)$", page, re.MULTILINE))
    assert named <= API[module] <= named | set(re.findall(r"\| `(\w+)`", page))


@pytest.mark.parametrize("name", convdit.ops.__all__)
def test_operators_document_shapes_errors_and_source(name):
    text = getattr(convdit.ops, name).__doc__
    other = re.search(r":func:`(\w+)`", text)
    if other and re.search(r"errors (are those of|as)", text, re.IGNORECASE):
        return test_operators_document_shapes_errors_and_source(other[1])
    for part in ("Args:\n", "Returns:\n        (", "Raises:\n", "Source: "):
        assert part in text, f"{name}: no {part.strip()}"
