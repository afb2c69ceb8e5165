"""The JSON API in OpenAPI's words."""

_NUMBER, _WHOLE, _TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}


def _object(properties: dict, *optional: str) -> dict:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_DETECTION = _object(
    {
        "bbox": {
            "description": "x, y, width, height in pixels of the upright image",
            "type": "array",
            "items": _NUMBER,
            "minItems": 4,
            "maxItems": 4,
        },
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "category_id": _WHOLE,
        "category": _TEXT,
        "level": {"description": "k of the pyramid level pk that the box is pooled from", "type": ["integer", "null"]},
        "segmentation": _object({"size": {"type": "array", "items": _WHOLE}, "counts": _TEXT}),
        "keypoints": {"description": "x, y, score of each", "type": "array", "items": _NUMBER},
    },
    "segmentation",
    "keypoints",
)
_MAP = _object(
    {
        "name": {"description": "as p2", "type": "string"},
        "height": {"description": "rows of the map", "type": "integer"},
        "width": {"description": "columns of the map", "type": "integer"},
        "png": {"description": "the part that shows the image, in colours; base64", "type": "string"},
    }
)
ANSWER = _object(
    {
        "width": {"description": "of the upright image, in pixels", "type": "integer"},
        "height": _WHOLE,
        "seconds": {"description": "for decoding and detecting, without waiting", "type": "number"},
        "detections": {"type": "array", "items": _DETECTION},
        "maps": {"type": "array", "items": _MAP},
    },
    "maps",
)
ERROR = _object({"error": _TEXT})
_SAID = {
    400: "a parameter or an empty body",
    408: "the upload took too long",
    413: "too many bytes, or pixels",
    415: "no image of a known kind",
    422: "a broken image, or one too flat",
    429: "all places are taken: Retry-After says for how many seconds",
    503: "no answer in time",
}


def schema(upload: int) -> dict:
    """OpenAPI 3.1.

    Args:
        upload: bytes that an upload may have.
    """
    errors = {
        str(status): {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in _SAID.items()
    }
    answer = {"description": "the detections", "content": {"application/json": {"schema": ANSWER}}}
    predict = {
        "summary": "Detect objects in an image",
        "parameters": [
            {"name": "min_score", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 1}},
            {"name": "maps", "in": "query", "schema": {"type": "boolean"}},
        ],
        "requestBody": {
            "required": True,
            "description": f"an image file (JPEG, PNG, WebP or BMP) of at most {upload} bytes",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        "responses": {"200": answer, **errors},
    }
    plain = {"200": {"description": "JSON", "content": {"application/json": {"schema": {"type": "object"}}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fpn-d2 serve", "version": "1"},
        "paths": {
            "/api/predict": {"post": predict},
            "/api/model": {"get": {"summary": "Classes, levels and limits", "responses": plain}},
            "/health": {"get": {"summary": "State of the server", "responses": plain}},
        },
    }
