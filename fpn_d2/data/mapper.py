"""From a record of a data set to the model's input: Detectron2's mapper with two augmentations more."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from fvcore.transforms.transform import BlendTransform, Transform, TransformList
from PIL import Image

# Weights of red, green and blue in the luma of ITU-R BT.601, as Pillow and Detectron2 take them.
_LUMA = {"R": 0.299, "G": 0.587, "B": 0.114}


class ColorJitter(T.Augmentation):
    """Change brightness, contrast and saturation, each by a factor drawn from [1 - strength, 1 + strength].

    Detectron2's RandomBrightness and RandomContrast do the first two. Its RandomSaturation takes images for RGB, while
    its models are fed with BGR by default; this one knows the order. Images with another number of channels than
    three keep their saturation.

    Args:
        strength: Largest relative change, in [0, 1).
        image_format: ``INPUT.FORMAT``; an image whose format is not "RGB" or "BGR" keeps its saturation.
    """

    def __init__(self, strength: float, image_format: str):
        super().__init__()
        if not 0.0 <= strength < 1.0:
            raise ValueError(f"Expected INPUT.COLOR_JITTER to be at least 0 and less than 1, got {strength}.")
        self.strength = strength
        self.image_format = image_format
        self._first = [
            T.RandomBrightness(1.0 - strength, 1.0 + strength),
            T.RandomContrast(1.0 - strength, 1.0 + strength),
        ]

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for one image of shape (height, width, channels)."""
        transforms = []
        for augmentation in self._first:  # one after the other: contrast is about the mean of the brightened image
            transforms.append(augmentation.get_transform(image))
            image = transforms[-1].apply_image(image)
        if image.ndim == 3 and image.shape[2] == 3 and self.image_format in ("RGB", "BGR"):
            factor = np.random.uniform(1.0 - self.strength, 1.0 + self.strength)
            luma = np.array([_LUMA[channel] for channel in self.image_format], np.float32)
            grey = image.dot(luma)[:, :, None]
            transforms.append(BlendTransform(src_image=grey, src_weight=1.0 - factor, dst_weight=factor))
        return TransformList(transforms)


class TrainingMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` with ``INPUT.VERTICAL_FLIP`` and ``INPUT.COLOR_JITTER``.

    With both keys off it gives just what Detectron2's own gives. An image that is missing, broken or of another size
    than its record says ends in one sentence that names the file.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Arguments of ``DatasetMapper`` from a configuration.

        Raises:
            ValueError: If ``INPUT.COLOR_JITTER`` is out of range, or ``INPUT.VERTICAL_FLIP`` is on with keypoints:
                which of them are left and right would be wrong in the mirrored image.
        """
        arguments = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.VERTICAL_FLIP:
            if cfg.MODEL.KEYPOINT_ON:
                raise ValueError("INPUT.VERTICAL_FLIP does not go with MODEL.KEYPOINT_ON; set one of them to False.")
            arguments["augmentations"].append(T.RandomFlip(horizontal=False, vertical=True))
        if is_train and cfg.INPUT.COLOR_JITTER != 0:
            arguments["augmentations"].append(ColorJitter(cfg.INPUT.COLOR_JITTER, cfg.INPUT.FORMAT))
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one record of Detectron2's standard format to the model's input.

        Raises:
            FileNotFoundError: If the image file does not exist.
            ValueError: If it cannot be read, or is not of the size that the record says.
        """
        try:
            return super().__call__(dataset_dict)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_words(dataset_dict)}: the file does not exist.") from error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises on broken files
            raise ValueError(f"{_words(dataset_dict)}: the file cannot be read as an image ({error}).") from error
        except SizeMismatchError as error:
            raise ValueError(f"{_words(dataset_dict)}: {error}") from error


def _words(dataset_dict: dict) -> str:
    return f"Image {dataset_dict.get('file_name')} (image id {dataset_dict.get('image_id')!r})"
