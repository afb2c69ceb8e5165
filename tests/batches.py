"""Small random batches in Detectron2's format, for every meta-architecture, made without any data set."""

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks


def random_boxes(n: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """(n, 4) boxes inside the image, each at least 8 pixels wide and high."""
    start = torch.rand(n, 2, generator=generator) * torch.tensor([width - 12.0, height - 12.0])
    room = torch.tensor([float(width), float(height)]) - start
    return torch.cat([start, start + 8 + torch.rand(n, 2, generator=generator) * (room - 8)], dim=1)


def random_batch(cfg, sizes=((96, 128), (80, 112)), boxes_per_image=3, seed=0) -> list[dict]:
    """A batch for training (and, without its labels, inference) of the model that ``cfg`` describes.

    Every field that any of Detectron2's heads asks for is there: boxes, classes, masks, keypoints, sem_seg,
    precomputed proposals.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = cfg.MODEL.RETINANET.NUM_CLASSES if "Retina" in cfg.MODEL.META_ARCHITECTURE else 0
    classes = classes or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    batch = []
    for height, width in sizes:
        boxes = random_boxes(boxes_per_image, height, width, generator)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(classes, (boxes_per_image,), generator=generator)
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
        if cfg.INPUT.MASK_FORMAT == "polygon":
            instances.gt_masks = PolygonMasks([[polygon] for polygon in corners])
        else:
            masks = torch.zeros(boxes_per_image, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(masks)
        points = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        inside = torch.rand(boxes_per_image, points, 2, generator=generator)
        keypoints = torch.full((boxes_per_image, points, 3), 2.0)
        keypoints[..., :2] = boxes[:, None, :2] + inside * (boxes[:, None, 2:] - boxes[:, None, :2])
        instances.gt_keypoints = Keypoints(keypoints)
        proposals = Instances((height, width))
        proposals.proposal_boxes = Boxes(torch.cat([boxes, random_boxes(20, height, width, generator)]))
        proposals.objectness_logits = torch.linspace(1, -1, boxes_per_image + 20)
        stuff = torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (height, width), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append(
            {"image": image, "height": height, "width": width, "instances": instances, "proposals": proposals}
            | {"sem_seg": stuff}
        )
    return batch


def seed_everything(seed: int = 0) -> None:
    """Seed what Detectron2's sampling of anchors and RoIs draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
