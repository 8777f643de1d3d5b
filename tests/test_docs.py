"""README and docs: their size, their links, their commands, and the frame of the results pages."""
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPO

import runs

# every page that a reader meets, paths relative to the repository
PAGES = sorted(
    str(path.relative_to(REPO))
    for pattern in ("*.md", "docs/*.md", "*/README.md")
    for path in REPO.glob(pattern)
    if path.relative_to(REPO).parts[0] not in ("runs", "datasets")
)
RESULTS = [page for page in PAGES if page.startswith("docs/results-")]
# the table of old commands is history
WITH_COMMANDS = [page for page in PAGES if page != "CHANGELOG.md"]

# Parses commands with the scripts' own parsers, in a process of its own: importing every script is heavy, and some set
# threads. Words in capitals are placeholders, made as folders because some parsers look for them.
PARSE = """
import contextlib, importlib, io, json, os, re, sys

failures = []
for page, module, words in json.load(sys.stdin):
    for word in words:
        if re.fullmatch("[A-Z][A-Z0-9_]*", word):
            os.makedirs(word, exist_ok=True)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            importlib.import_module(module).parse_args(words)
    except (SystemExit, Exception) as error:
        # --help
        if getattr(error, "code", None) == 0:
            continue
        reason = ' '.join(output.getvalue().strip().splitlines()[-2:]) or repr(error)
        failures.append(f"{page}: {module} {' '.join(words)}: {reason}")
print(json.dumps(failures))
"""


def read(page):
    return (REPO / page).read_text()


def code_blocks(text):
    """[(language, content)] of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)


def without_code(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text):
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """Commands of a page as lists of words: of code blocks without a language, and of inline code."""
    lines = [line for language, block in code_blocks(text) if language in ("", "sh", "bash")
             for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += re.findall(r"`((?:python|torchrun|make) [^`\n]*)`", prose)
    page_commands = []
    for line in lines:
        # layouts and other text stand in blocks, too
        if not re.search(r"(?:^|&& )(?:[A-Z_]+=\S+ )*(?:python3?|torchrun|make) ", line):
            continue
        words = shlex.split(line, comments=True)
        ends = [i for i, word in enumerate(words) if word == "&&"]
        for start, end in zip([0, *[i + 1 for i in ends]], [*ends, len(words)]):
            command = words[start:end]
            # environment variables before a command
            while command and re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            if command:
                page_commands.append(command)
    return page_commands


def script_of(words):
    """(module, its arguments) of a command that starts a script of this repository, else None."""
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[at:]]
    if words[0] not in ("python", "python3"):
        return None
    if words[1] == "-m":
        return (words[2], words[3:]) if words[2] not in ("venv", "pip", "pytest") else None
    return words[1].removesuffix(".py"), words[2:]


@pytest.mark.fast
def test_readme_is_one_page():
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 12_000
    # runs.py imports resource and handles SIGUSR1
    assert "Linux and macOS" in text


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_of_the_repository(page):
    text = read(page)
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, heading = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.resolve().is_relative_to(REPO), f"{page}: {link} leads out of the repository"
        assert target.exists(), f"{page}: {link} does not exist"
        assert not heading or heading in anchors(target.read_text()), f"{page}: {link}: no such heading"


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_nothing_needs_a_folder_outside_the_repository(page):
    assert "../shared" not in read(page)


def test_commands_parse(tmp_path):
    targets = set(" ".join(re.findall(r"^[\w ]+(?=:)", read("Makefile"), re.M)).split())
    scripts, failures = [], []
    for page in WITH_COMMANDS:
        for words in commands(read(page)):
            if words[0] == "make":
                missing = [word for word in words[1:] if "=" not in word and word not in targets]
                failures += [f"{page}: make {word}: no such target" for word in missing]
            elif script := script_of(words):
                module, arguments = script
                path = REPO / module.replace(".", "/")
                if not path.with_suffix(".py").is_file():
                    module, path = f"{module}.__main__", path / "__main__"
                if not path.with_suffix(".py").is_file():
                    failures.append(f"{page}: {' '.join(words)}: no such script")
                # not a script that is only named, or whose arguments are left out
                elif arguments and "..." not in arguments:
                    scripts.append((page, module, arguments))
    assert len(scripts) > 50
    result = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps(scripts), capture_output=True, text=True,
                            cwd=tmp_path, env=runs.python_path())
    assert result.returncode == 0, result.stderr[-2000:]
    failures += json.loads(result.stdout.splitlines()[-1])
    assert not failures, "\n".join(failures)


@pytest.mark.fast
@pytest.mark.parametrize("page", RESULTS)
def test_results_pages_have_one_frame(page):
    text = read(page)
    parts = ["\n**Question.** ", "\n**Answer.** ", "\n![", "\n|", "\n## How to repeat\n", "\n## What it does not say\n"]
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), f"{page}: {dict(zip(parts, places))}"
    answer = re.search(r"\*\*Answer\.\*\* (.*)", text)[1]
    assert len(re.findall(r"[.!?](?=\s|$)", answer)) == 1, f"{page}: the answer is one sentence"


@pytest.mark.fast
@pytest.mark.parametrize("page", RESULTS)
def test_tables_of_results_pages_are_small(page):
    for table in re.findall(r"(?:^\|.*\n)+", read(page), re.M):
        rows = table.splitlines()
        assert rows[0].replace("\\|", "").count("|") - 1 <= 7, f"{page}: more than seven columns: {rows[0]}"
        assert len(rows) - 2 <= 10, f"{page}: {len(rows) - 2} rows: {rows[0]}"


@pytest.mark.fast
@pytest.mark.parametrize("page", [page for page in PAGES if page == "README.md" or page.startswith("docs/")])
def test_numbers_have_a_leading_zero(page):
    text = re.sub(r"\]\([^)]*\)", "]", without_code(read(page)))
    assert not re.findall(r"(?<![\w.)\]])\.\d+", text)


@pytest.mark.fast
def test_readme_says_what_the_demo_prints():
    from evaluate import demo_sentence
    result = {"mean": {f"compact-small-{sampler}": {"ranker": k} for k, sampler in enumerate(("orig", "amo"))},
              "images": 8, "files": {}}
    assert demo_sentence(result).partition(". ")[2] in read("README.md")
