from __future__ import annotations

from tools.render import rendered


def test_everything_rendered_is_what_its_results_give() -> None:
    for path, text in rendered().items():
        assert path.read_text() == text, f"{path.name}: run python -m tools.render"
