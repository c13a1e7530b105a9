"""Judged candidate lists: one JSON object per line, faults reported with their line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.data import candidate_lists
from edje.data.candidate_lists import read_candidate_lists
from edje.data.dataset import DataError, Problems

DOG = {"query": "a dog", "candidates": [{"image": "1.jpg", "score": 0.31, "label": 1}, {"image": "2.jpg"}]}
BEACH = {"query": {"image": "1.jpg"}, "candidates": [{"text": "a dog", "score": 12, "label": 0.5}]}


def write(folder, *lines):
    path = folder / "lists.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_a_text_searches_images_and_an_image_searches_texts(tmp_path):
    first, second = read_candidate_lists(write(tmp_path, DOG, b"", BEACH))

    assert (first.direction, first.query, first.line) == ("text-to-image", "a dog", 1)
    assert [(each.content, each.score, each.label) for each in first.candidates] == [
        ("1.jpg", 0.31, 1.0),
        ("2.jpg", None, None),
    ]
    assert (second.direction, second.query, second.line) == ("image-to-text", "1.jpg", 3)
    assert [(each.content, each.score, each.label) for each in second.candidates] == [("a dog", 12.0, 0.5)]


def test_a_score_beyond_all_numbers_is_a_missing_one(tmp_path):
    [only] = read_candidate_lists(write(tmp_path, b'{"query": "a", "candidates": [{"image": "x", "score": 1e999}]}'))

    assert only.candidates[0].score is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[]", "the object: Input should be an object"),
        (b'{"query": "a", "candidates": []}', "candidates: List should have at least 1 item"),
        (b'{"query": "", "candidates": [{"image": "x"}]}', "query.*: String should have at least 1 character"),
        (b'{"query": {}, "candidates": [{"image": "x"}]}', "query: give a text or an image"),
        (b'{"query": "a", "candidates": [{"text": "x"}]}', "candidates.0: .* the field 'image' alone"),
        (b'{"query": "a", "candidates": [{"image": "x", "text": "y"}]}', "candidates.0: .* the field 'image' alone"),
        (b'{"query": "a", "candidates": [{"image": "x", "score": "0.3"}]}', "candidates.0.score: .* valid number"),
        (b'{"query": "a", "candidates": [{"image": "x", "label": -1}]}', "candidates.0.label.*: .* greater than"),
        (b'{"query": "a", "candidates": [{"image": 7}]}', "candidates.0.image: .* valid string"),
    ],
)
def test_a_faulty_line_is_reported_with_its_number(line, words, tmp_path):
    path = write(tmp_path, DOG, line)

    with pytest.raises(DataError, match=f"lists.jsonl, line 2: .*{words}"):
        list(read_candidate_lists(path))


def test_with_a_count_of_problems_faulty_lines_are_left_out(tmp_path):
    problems = Problems()

    lists = list(read_candidate_lists(write(tmp_path, b"{", DOG, b"[]"), problems=problems))

    assert [each.line for each in lists] == [2]
    assert problems.counts["bad_row"] == 2
    assert "line 3" in problems.report()


def test_a_line_that_is_too_long_is_a_fault_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(candidate_lists, "MAX_LINE_BYTES", 200)
    problems = Problems()

    lists = list(read_candidate_lists(write(tmp_path, b"x" * 1000, DOG), problems=problems))

    assert [each.query for each in lists] == ["a dog"]
    with pytest.raises(DataError, match="line 1: longer than 200 bytes"):
        list(read_candidate_lists(tmp_path / "lists.jsonl"))


def test_a_file_that_cannot_be_read_is_an_error_even_with_a_count_of_problems(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_candidate_lists(tmp_path / "absent.jsonl", problems=Problems()))


@given(st.binary(max_size=200))
def test_any_bytes_give_lists_or_a_counted_fault(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "lists.jsonl"
    path.write_bytes(content)

    for each in read_candidate_lists(path, problems=Problems()):
        assert each.candidates
