"""Examples of each event for the published contract. Tests check them against the models and the schemas."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from protocols.events import (
    Candidate,
    ErrorInfo,
    Event,
    ImageIndexed,
    ImageNew,
    Query,
    RerankRequest,
    RerankResponse,
    Result,
    WarningInfo,
    WordSimilarities,
)

_MODEL = hashlib.sha256(b"model").hexdigest()
_ENGINE = hashlib.sha256(b"engine").hexdigest()


def examples() -> dict[type[Event], dict[str, Event]]:
    """Return the examples of each event by name."""
    return {
        ImageNew: {
            "byAddress": ImageNew(image_id="img-7", uri="https://images.example/7.jpg"),
            "inline": ImageNew(image_id="img-8", data=b"GIF89a", metadata={"source": "upload"}),
        },
        ImageIndexed: {
            "indexed": ImageIndexed(
                image_id="img-7",
                model=_MODEL,
                num_tokens=64,
                dtype="int8",
                num_bytes=25_018,
                content_sha256=hashlib.sha256(b"image").hexdigest(),
                timings_ms={"fetch": 31.5, "decode": 4.1, "encode": 22.8, "store": 0.6},
                metadata={"source": "upload"},
            ),
        },
        RerankRequest: {
            "textToImage": RerankRequest(
                request_id="r-1",
                query=Query(text="a dog runs on a beach"),
                candidates=[Candidate(image_id="img-7", score=0.31), Candidate(image_id="img-2", score=0.29)],
                top_n=10,
                deadline=datetime(2026, 11, 23, 12, 0, 0, 250_000, tzinfo=UTC),
            ),
            "imageToText": RerankRequest(
                request_id="r-2",
                query=Query(image_id="img-7"),
                candidates=[Candidate(text="a dog on a beach", id="caption-1"), Candidate(text="a red bus")],
            ),
        },
        RerankResponse: {
            "ok": RerankResponse(
                request_id="r-1",
                status="ok",
                results=[
                    Result(index=1, id="img-2", relevance_score=0.93, logit=2.6),
                    Result(index=0, id="img-7", relevance_score=0.08, logit=-2.4),
                ],
                model=_MODEL,
                engine=_ENGINE,
                timings_ms={"queue": 1.2, "fetch": 0.8, "score": 3.1},
            ),
            "explained": RerankResponse(
                request_id="r-4",
                status="ok",
                results=[
                    Result(
                        index=0,
                        id="img-2",
                        relevance_score=0.93,
                        logit=2.6,
                        explanation=[
                            WordSimilarities(word="red", similarities=[0.12, 0.81, 0.3, -0.05]),
                            WordSimilarities(word="bus", similarities=[0.07, 0.77, 0.69, 0.11]),
                        ],
                    ),
                ],
                model=_MODEL,
                engine=_ENGINE,
                warnings=[
                    WarningInfo(
                        code="first_stage_scores_missing",
                        message="this model reads the candidates' first-stage scores; 1 of 1 candidates has none",
                    )
                ],
            ),
            "error": RerankResponse(
                request_id="r-3",
                status="error",
                model=_MODEL,
                engine=_ENGINE,
                error=ErrorInfo(code="too_many_candidates", message="1200 candidates; at most 1000 are ranked"),
            ),
        },
    }
