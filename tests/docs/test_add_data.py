"""Follows ``docs/add-data-or-a-task.md`` in a copy of the project."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from helpers.pages import Page, copy_project, run

PAGE = Page("add-data-or-a-task.md")
FILES = PAGE.blocks("python") + PAGE.blocks("yaml")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what the page adds, and a database."""
    root = copy_project(tmp_path_factory.mktemp("project"))
    assert [name for name, _ in FILES] == ["src/evomoe/data/text/sqlite.py", "configs/data/sqlite.yaml"]
    for name, code in FILES:
        (root / name).write_text(code, encoding="utf-8")
    database = sqlite3.connect(root / "notes.db")
    database.execute("CREATE TABLE documents (text TEXT)")
    rows = [(f"Note {number}: the square of {number} is {number * number}.",) for number in range(2000)]
    database.executemany("INSERT INTO documents VALUES (?)", rows)
    database.commit()
    database.close()
    return root


def test_the_code_of_the_page_is_clean(project):
    run(["-m", "ruff", "check", "--no-cache", "src/evomoe/data/text/sqlite.py"], project)
    run(["-m", "ruff", "format", "--check", "--no-cache", "src/evomoe/data/text/sqlite.py"], project)


def test_a_run_on_the_database_of_the_page_trains_and_tests(project):
    (lines,) = (code.splitlines() for _, code in PAGE.blocks("bash"))
    train, compare = (line.partition(" ")[2] for line in lines)
    (given,) = re.findall(r'overrides="(.*)"$', compare)
    assert set(given.split()) == {word for word in train.split() if word.startswith("data")}
    small = ["model=gpt_tiny", "data.context=32", "data.vocab_size=300", "trainer.max_steps=4", "callbacks=minimal"]
    places = ["paths.cache_dir=cache", "paths.log_dir=logs", "trainer.accelerator=cpu", "trainer.limit_test_batches=2"]
    run([*train.split(), *small, *places, "trainer.val_check_interval=2"], project)
    (log,) = (project / "logs").rglob("train.log")
    found = re.findall(r"(train|val|test) [\d.]+ MB in ([\d,]+) documents", log.read_text())
    documents = {split: int(number.replace(",", "")) for split, number in found}
    assert sum(documents.values()) == 2000
    assert all(60 < documents[split] < 140 for split in ("val", "test"))


def test_a_query_that_cannot_be_is_one_line(project):
    script = """
from rich.progress import Progress
from evomoe.data.text.sqlite import SqliteCorpus
from evomoe.errors import ConfigError
for query in ("SELECT body FROM documents", "SELECT rowid FROM documents"):
    try:
        list(SqliteCorpus("notes.db", query).pieces("train", Progress(disable=True)))
    except ConfigError as error:
        print(error)
"""
    assert run(["-c", script], project).splitlines() == [
        "data.path=notes.db, data.query='SELECT body FROM documents': no such column: body",
        "data.query='SELECT rowid FROM documents' yields (1,): expected one column of text",
    ]
