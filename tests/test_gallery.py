"""The gallery of pains is whole, and its page says what its tests say."""

from __future__ import annotations

import ast

import pytest

from gallery import PAGE, PAINS, TESTS, entries, entry_of, page


def test_every_pain_has_a_test_named_after_one_of_its_threads() -> None:
    found = entries()
    assert {entry.number for entry in found} == set(PAINS)
    assert [entry.test for entry in found if not entry.is_named_after_a_thread()] == []


def test_the_page_is_the_one_that_the_tests_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/gallery.py`"


def test_a_test_that_does_not_say_what_it_answers_is_named() -> None:
    (function,) = ast.parse('def test_peft_1_nothing() -> None:\n    """A pain without a number."""').body
    assert isinstance(function, ast.FunctionDef)
    with pytest.raises(ValueError, match="test_peft_1_nothing does not name its pain, the answer and the threads"):
        entry_of(TESTS / "test_gallery.py", function)
