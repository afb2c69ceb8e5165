"""Annotated images and videos, written as the detections come."""

import os

import cv2
import numpy as np

from fpn_d2.errors import UserError
from fpn_d2.files import UNFINISHED, writable_folder, writing

from .drawing import draw, to_bgr
from .predictor import Predictor
from .sources import CAMERA, Video
from .stream import Result

_KEPT = (".jpg", ".jpeg", ".png")
_FPS = 25.0  # of a video that does not say


class PictureWriter:
    """Writes each annotated image to a file below ``folder``, and the frames of a video to one video.

    The path below the folder is the image's own. Images appear whole; a video that is being written has the ending
    ``.unfinished.mp4``.
    """

    def __init__(self, folder: str, predictor: Predictor, min_score: float = 0.5):
        """
        Args:
            folder: where.
            predictor: whose results they are.
            min_score: detections of at least this score are drawn.
        """
        self.folder = folder
        self.min_score = min_score
        self._format = predictor.cfg.INPUT.FORMAT
        self._class_names = predictor.class_names
        self._video: Video | None = None
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def path_of(self, name: str, ending: str = "") -> str:
        """The file for an image or a video of this name; ``ending`` takes the place of one that is not written."""
        name = f"camera_{name.removeprefix(CAMERA)}" if name.startswith(CAMERA) else name
        drive, rest = os.path.splitdrive(os.path.normpath(name))
        parts = ["up" if part == os.pardir else part for part in rest.split(os.sep) if part]
        kept = rest.lower().endswith(_KEPT) and not ending
        return os.path.join(self.folder, *parts) + ("" if kept else ending or ".jpg")

    def has_video(self, name: str) -> bool:
        """Whether a video of this name is finished."""
        return os.path.isfile(self.path_of(name, ".mp4"))

    def write(self, result: Result) -> None:
        """Draw one result and write the picture.

        Raises:
            UserError: it cannot be written.
        """
        image = to_bgr(result.pixels, self._format)
        picture = draw(image, result.instances, self._class_names, self.min_score)
        if result.item.video is not None:
            self._add_frame(result.item.video, picture)
            return
        self.finish_video()
        path = self.path_of(result.item.name)
        there, data = cv2.imencode(os.path.splitext(path)[1], picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
        if not there:
            raise UserError(f"the picture {path} cannot be written")
        with writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path + UNFINISHED, "wb") as file:
                file.write(data.tobytes())
            os.replace(path + UNFINISHED, path)

    def _add_frame(self, video: Video, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        if self._video != video:
            self.finish_video()
            path = self.path_of(video.name, f"{UNFINISHED}.mp4")
            writable_folder(os.path.dirname(path))
            self._video, self._size = video, (width, height)
            self._writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), video.fps or _FPS, (width, height))
            if not self._writer.isOpened():
                raise UserError(f"the video {path} cannot be written: this OpenCV has no encoder for mp4v")
        if (width, height) != self._size:  # the writer passes over frames of another size without a word
            picture = cv2.resize(picture, self._size)
        self._writer.write(picture)

    def finish_video(self) -> None:
        """End the video that is being written, if there is one: it gets its name."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self.path_of(self._video.name, f"{UNFINISHED}.mp4"), self.path_of(self._video.name, ".mp4"))
            self._video = self._writer = None

    def give_up(self) -> None:
        """Leave the video that is being written unfinished; one of a camera has no other end, and is finished."""
        if self._video is not None and self._video.live:
            self.finish_video()
        elif self._writer is not None:
            self._writer.release()
            self._video = self._writer = None
