from __future__ import annotations

from tools.render import documents, render


def test_every_table_in_prose_is_the_one_its_file_gives() -> None:
    for path in documents():
        assert path.read_text() == render(path), f"{path.name}: run python -m tools.render"
