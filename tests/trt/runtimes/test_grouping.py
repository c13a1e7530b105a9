"""Which pairs of a call are scored together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trt.runtimes.grouping import MAX_PADDING, MIN_GROUP_PAIRS, groups_by_length


@given(lengths=st.lists(st.integers(2, 63), max_size=60), max_pairs=st.integers(1, 20))
def test_each_pair_is_in_one_group_with_little_padding(lengths, max_pairs):
    lengths = np.array(lengths, np.int64)

    groups = list(groups_by_length(lengths, max_pairs))

    assert sorted(np.concatenate([*groups, np.empty(0, np.int64)])) == list(range(len(lengths)))
    for group in groups:
        spread = np.ptp(lengths[group])
        assert 1 <= len(group) <= max_pairs
        assert spread == 0 or (len(group) <= MIN_GROUP_PAIRS and spread <= MAX_PADDING)


def test_one_request_is_never_padded():
    groups = list(groups_by_length(np.full(100, 17), max_pairs=32))

    assert [len(group) for group in groups] == [32, 32, 32, 4]
