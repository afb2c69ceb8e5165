"""From the bytes that somebody sent to detections as JSON: the only part that looks into an upload."""

import base64
import io
import time
import warnings

import cv2
from PIL import Image

from fpn_d2.analysis.level_rule import Rule
from fpn_d2.analysis.levels.pictures import detect_with_maps
from fpn_d2.data.image_loading import EIGHT_BIT_MODES, eight_bits
from fpn_d2.errors import UserError, one_line
from fpn_d2.inference import Predictor
from fpn_d2.inference.json_lines import detections_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # whose decoders are asked; all others stay closed to uploads
_FLATTEST = 100  # ratio of the sides of an image that is still looked at


class BadUpload(ValueError):
    """What was sent is no image that is looked at; ``status`` says so in HTTP."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Answerer:
    """Answers uploads with what a detector finds in them.

    Attributes:
        predictor: the detector.
        rule: which level a box is pooled from; None for a model without a pyramid.
        max_pixels: of an image; more are refused by its header, before anything is decoded.
    """

    def __init__(self, predictor: Predictor, max_pixels: int):
        self.predictor = predictor
        self.max_pixels = max_pixels
        try:
            self.rule: Rule | None = Rule.of(predictor.cfg)
        except UserError:
            self.rule = None

    def about(self) -> dict:
        """What clients want to know of the model."""
        model = self.predictor.cfg.MODEL
        return {
            "model": f"{model.META_ARCHITECTURE}, {model.BACKBONE.NAME}",
            "classes": list(self.predictor.class_names),
            "levels": list(self.rule.levels) if self.rule else [],
            "max_pixels": self.max_pixels,
            "formats": list(FORMATS),
        }

    def __call__(self, data: bytes, min_score: float = 0.0, maps: bool = False) -> dict:
        """Detect objects in an image file; meant for one thread.

        Args:
            data: the file.
            min_score: detections with a lower score are left out.
            maps: whether to add the maps of the pyramid.

        Returns:
            "width" and "height" of the upright image; "seconds" that decoding and detecting took; "detections" as in
            the lines of `fpn_d2.inference.json_lines`, each with its "level" (None without a pyramid); with ``maps``
            "maps", each with "name", "height", "width" and "png" in base64.

        Raises:
            BadUpload: it is no image of a known kind, broken, or too large.
        """
        start = time.monotonic()
        try:
            prepared = self.predictor.prepare(decode(data, self.max_pixels))
        except UserError as error:
            raise BadUpload(422, one_line(error)) from error
        if maps:
            instances, found = detect_with_maps(self.predictor, prepared)
        else:
            (instances,), found = self.predictor.detect([prepared]), []
        instances = instances[instances.scores >= min_score]
        detections = detections_of(instances, self.predictor.class_names, self.predictor.category_ids)
        levels = [None] * len(detections)
        if self.rule is not None and detections:
            boxes = instances.pred_boxes.tensor.double().numpy()
            levels = self.rule.assign_in(boxes, prepared.size).tolist()
        height, width = prepared.size
        answer = {
            "width": width,
            "height": height,
            "seconds": round(time.monotonic() - start, 4),
            "detections": [{**one, "level": level} for one, level in zip(detections, levels, strict=True)],
        }
        if maps:
            answer["maps"] = [
                {"name": one.name, "height": one.size[0], "width": one.size[1], "png": _png(one.picture)}
                for one in found
            ]
        return answer


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an upload, after a look at its header.

    Raises:
        BadUpload: it is no image of a known kind, broken, or too large.
    """
    if not data:
        raise BadUpload(400, "the body is empty; expected the bytes of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images: the size is looked at here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                text = f"the image has {width} x {height} pixels; at most {max_pixels} are looked at"
                raise BadUpload(413, text)
            if max(width, height) > _FLATTEST * min(width, height):
                raise BadUpload(422, f"the image has {width} x {height} pixels, which is too flat to be looked at")
            image.load()
            return image if image.mode in EIGHT_BIT_MODES else eight_bits(image)
    except BadUpload:
        raise
    except Image.UnidentifiedImageError:
        raise BadUpload(415, f"this is no image of a known kind; expected {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadUpload(413, f"the image is too large; at most {max_pixels} pixels are looked at") from None
    except Exception as error:  # on a broken file the decoders raise almost anything
        said = one_line(error)[:200] or type(error).__name__
        raise BadUpload(422, f"the image cannot be decoded ({said})") from error


def _png(picture) -> str:
    return base64.b64encode(cv2.imencode(".png", picture)[1].tobytes()).decode("ascii")
