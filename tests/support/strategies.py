"""Hypothesis strategies for every event."""

from datetime import UTC

from hypothesis import strategies as st

from protocols.events import (
    Candidate,
    ErrorInfo,
    ImageIndexed,
    ImageNew,
    Query,
    RerankRequest,
    RerankResponse,
    Result,
    WarningInfo,
    WordSimilarities,
)

ids = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)
texts = st.text(max_size=60)
query_texts = st.text(min_size=1, max_size=60)
digests = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128)
finite = st.floats(allow_nan=False, allow_infinity=False)
timings = st.dictionaries(st.text(min_size=1, max_size=20), finite, max_size=4)
instants = st.none() | st.datetimes(timezones=st.just(UTC))
topics = st.none() | st.from_regex(r"[a-zA-Z0-9._-]{1,40}", fullmatch=True)


def _candidate(**fields):
    # A key whose value is None is left out on the wire, so it is left out here.
    return st.fixed_dictionaries(fields, optional={"score": finite}).map(lambda keys: Candidate(**keys))


metadata = st.none() | st.dictionaries(ids, texts, max_size=3)
images_new = st.builds(ImageNew, image_id=ids, uri=ids, metadata=metadata)
images_new |= st.builds(ImageNew, image_id=ids, data=st.binary(min_size=1, max_size=200))
images_indexed = st.builds(
    ImageIndexed,
    image_id=ids,
    model=digests,
    num_tokens=st.integers(1, 65_536),
    dtype=st.sampled_from(["fp16", "bf16", "int8", "int4"]),
    num_bytes=st.integers(1, 2**40),
    content_sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    timings_ms=timings,
    skipped=st.booleans(),
    embedding=st.none() | st.lists(finite, max_size=4),
    metadata=metadata,
)


def _requests(query, candidates):
    return st.builds(
        RerankRequest,
        request_id=ids,
        query=query,
        candidates=st.lists(candidates, max_size=4),
        top_n=st.none() | st.integers(1, 100_000),
        deadline=instants,
        priority=st.integers(0, 9),
        reply_topic=topics,
        reply_partition=st.none() | st.integers(0, 2**31 - 1),
        explain=st.booleans(),
        model=st.none() | digests,
    )


rerank_requests = _requests(st.builds(Query, text=query_texts), _candidate(image_id=ids))
rerank_requests |= _requests(st.builds(Query, image_id=ids), _candidate(text=texts, id=ids) | _candidate(text=texts))

codes = st.from_regex(r"[a-z0-9_]{1,64}", fullmatch=True)
explanations = st.lists(st.builds(WordSimilarities, word=texts, similarities=st.lists(st.floats(-1, 1))), max_size=3)
results = st.builds(
    Result,
    index=st.integers(0, 2**31),
    id=st.none() | ids,
    relevance_score=st.floats(0, 1),
    logit=finite,
    explanation=st.none() | explanations,
)
warnings = st.lists(st.builds(WarningInfo, code=codes, message=texts), max_size=3)
_answers = {"request_id": ids, "model": digests, "engine": digests, "timings_ms": timings, "warnings": warnings}
rerank_responses = st.builds(
    RerankResponse,
    status=st.sampled_from(["ok", "partial", "expired"]),
    results=st.lists(results, max_size=4),
    missing=st.lists(ids, max_size=3),
    **_answers,
) | st.builds(
    RerankResponse,
    status=st.just("error"),
    error=st.builds(ErrorInfo, code=codes, message=texts),
    **_answers,
)

events = images_new | images_indexed | rerank_requests | rerank_responses
