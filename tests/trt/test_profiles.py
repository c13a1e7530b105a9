"""The profiles of an engine, and the choice of a profile for a call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trt.contract import LimitExceeded
from trt.profiles import Profile, Range, narrowest_profile, profiles_of

PAPER = profiles_of(max_text_tokens=63, length_buckets=(16, 32, 64), max_pairs=256, max_queries=256, max_images=16)

limits = st.fixed_dictionaries(
    {
        "max_text_tokens": st.integers(2, 100),
        "length_buckets": st.lists(st.integers(1, 120), max_size=4),
        "max_pairs": st.integers(1, 500),
        "max_queries": st.integers(1, 500),
        "max_images": st.integers(1, 40),
    }
)


@given(limits=limits, data=st.data())
def test_every_call_within_the_limits_fits_exactly_one_profile(limits, data):
    profiles = profiles_of(**limits)
    sizes = {
        "images": data.draw(st.integers(1, limits["max_images"])),
        "queries": data.draw(st.integers(1, limits["max_queries"])),
        "text_tokens": data.draw(st.integers(1, limits["max_text_tokens"])),
        "pairs": data.draw(st.integers(1, limits["max_pairs"])),
    }

    for ours in profiles.values():
        assert sum(profile.takes(sizes) for profile in ours) == 1
        assert ours[narrowest_profile(ours, sizes)].takes(sizes)


def test_the_paper_gets_three_lengths_times_three_numbers_of_pairs():
    assert [profile.name for profile in PAPER["pair"][:4]] == [
        "text 1-16, pairs 1-16",
        "text 1-16, pairs 17-64",
        "text 1-16, pairs 65-256",
        "text 17-32, pairs 1-16",
    ]
    assert len(PAPER["pair"]) == 9
    assert PAPER["pair"][-1].sizes("opt") == {"queries": 8, "text_tokens": 63, "pairs": 256}


def test_the_last_bucket_ends_with_the_longest_text_of_the_model():
    given_short = profiles_of(max_text_tokens=63, length_buckets=(16,), max_pairs=4, max_queries=4, max_images=1)

    assert [profile.ranges["text_tokens"].max for profile in given_short["query"]][-1] == 63
    assert PAPER["query"][-1].ranges["text_tokens"].max == 63


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 1, "text_tokens": 64, "pairs": 1},
        {"queries": 1, "text_tokens": 16, "pairs": 257},
        {"queries": 0, "text_tokens": 16, "pairs": 1},
    ],
    ids=["long", "many", "none"],
)
def test_the_error_for_a_call_that_fits_no_profile_lists_the_limits(sizes):
    with pytest.raises(LimitExceeded, match="63 text tokens, 256 pairs"):
        narrowest_profile(PAPER["pair"], sizes)


def test_of_profiles_that_fit_the_narrowest_is_taken():
    wide, narrow = (Profile(name=f"to {end}", ranges={"pairs": Range(min=1, opt=end, max=end)}) for end in (64, 16))

    assert narrowest_profile([wide, narrow], {"pairs": 16}) == 1
    assert narrowest_profile([wide, narrow], {"pairs": 17}) == 0


@pytest.mark.parametrize("numbers", [(2, 1, 3), (1, 4, 3), (0, 1, 1)])
def test_a_range_out_of_order_is_refused(numbers):
    with pytest.raises(ValidationError):
        Range(min=numbers[0], opt=numbers[1], max=numbers[2])
