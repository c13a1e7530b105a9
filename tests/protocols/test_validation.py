"""Sentences made of pydantic's errors: the field, the problem, and never the value."""

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from protocols.validation import first_problem, problems_in


class Inner(BaseModel):
    size: int


class Outer(BaseModel):
    name: int = 0
    inner: Inner | None = None
    by_key: dict[str, int] = {}

    @model_validator(mode="after")
    def _has_an_even_name(self):
        if self.name % 2:
            raise ValueError("the name is odd")
        return self


def error_of(**fields):
    with pytest.raises(ValidationError) as caught:
        Outer(**fields)
    return caught.value


def test_a_problem_names_the_path_of_its_field():
    assert first_problem(error_of(inner={"size": "x"})).startswith("inner.size: Input should be a valid integer")


def test_a_problem_of_no_field_is_named_after_the_whole_value():
    assert first_problem(error_of(name=1), root="event") == "event: the name is odd"
    assert first_problem(error_of(name=1)) == "the name is odd"


def test_every_problem_is_listed_up_to_a_limit():
    error = error_of(name="x", inner={})

    assert [problem.partition(":")[0] for problem in problems_in(error)] == ["name", "inner.size"]
    assert len(problems_in(error, limit=1)) == 1


def test_a_field_may_have_another_name_for_people():
    assert first_problem(error_of(name="x")).startswith("name: ")
    assert problems_in(error_of(name="x"), names={"name": "RERANK_NAME"})[0].startswith("RERANK_NAME: ")


def test_a_problem_repeats_no_value_and_cuts_long_keys():
    error = error_of(name="secret", by_key={"k" * 1000: "secret"})

    assert "secret" not in "; ".join(problems_in(error))
    assert len(problems_in(error)[1]) < 200
