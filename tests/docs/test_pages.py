"""The pages are all in the list of pages, their links lead somewhere, and their Python runs."""

import re
from pathlib import Path

import pytest
from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def prose(page: Path) -> str:
    """The text of a page without its blocks of code, in which neither links nor headings are meant."""
    return re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_every_page_is_in_the_list_once() -> None:
    entries = re.findall(r"^- \[.+?\]\((.+?\.md)\): ", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(DOCS / entry for entry in entries) == [page for page in PAGES if page != DOCS / "index.md"]


@pytest.mark.parametrize("page", [*OUTSIDE, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_recipes_exist(page: Path) -> None:
    assert broken_links(page) == []
    for recipe in re.findall(r"(?<!tests/)\brecipes/[a-z_0-9]+\.py", page.read_text()):
        assert (ROOT / recipe).exists(), recipe


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```sh\n# no heading [x](no.md)\n```\n[a](#a-page) [b](#no-heading) [c](no.md)\n")
    assert broken_links(page) == ["#no-heading", "no.md"]


def test_a_tokenizer_view_and_task_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), flags=re.DOTALL)
    scope: dict = {}
    exec("\n".join(blocks), scope)
    assert scope["losses"][-1] < scope["losses"][0] / 5
    assert "mean squared error" in capsys.readouterr().out
