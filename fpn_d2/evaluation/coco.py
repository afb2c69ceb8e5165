"""COCO's figures, of images that could be read; by faster-coco-eval where it is installed: the same numbers, sooner."""

import importlib.util
import itertools
import json
import os
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator

from fpn_d2.errors import UserError

_MANY = 20_000  # objects; from here on pycocotools takes minutes
COCOS_LIMIT = 100  # detections of an image that count, the best ones
_PLAIN_IDS = 1 << 53  # the C++ evaluation takes image ids below for what they are


def fast_evaluation_is_there() -> bool:
    """Whether the package faster-coco-eval is installed."""
    return importlib.util.find_spec("faster_coco_eval") is not None


class ReadableCOCOEvaluator(COCOEvaluator):
    """``COCOEvaluator`` that leaves images out whose files could not be read (``unreadable`` in the model's input)."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            if "unreadable" in record and "instances" in output:
                self._predictions.append({"image_id": record["image_id"], "instances": [], "unreadable": True})
            else:
                super().process([record], [output])

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        unreadable = {image["image_id"] for image in predictions if "unreadable" in image}
        if unreadable:
            every = self._coco_api.getImgIds() if img_ids is None else img_ids
            img_ids = [own for own in every if own not in unreadable]
            self._logger.warning(
                "%d images could not be read: the figures are of the other %d", len(unreadable), len(img_ids)
            )
        self._evaluate_on(predictions, img_ids)

    def _evaluate_on(self, predictions: list[dict], img_ids: list | None) -> None:
        objects = len(self._coco_api.dataset.get("annotations", ()))
        if objects > _MANY and not fast_evaluation_is_there():
            self._logger.warning(
                "%d objects take long to evaluate: pip install faster-coco-eval gives the same figures sooner", objects
            )
        super()._eval_predictions(predictions, img_ids)


class FastCOCOEvaluator(ReadableCOCOEvaluator):
    """``COCOEvaluator`` whose matching and precision-recall curves are computed by faster-coco-eval, in C++.

    Collecting predictions and the tables of results stay Detectron2's. Needs ``pip install faster-coco-eval``.
    """

    def _evaluate_on(self, predictions: list[dict], img_ids: list | None) -> None:
        results = list(itertools.chain.from_iterable(image["instances"] for image in predictions))
        # The official evaluation writes no report of its own that would be missed here; what it cannot do without
        # annotations is left to Detectron2.
        if not (results and self._do_evaluation):
            super()._evaluate_on(predictions, img_ids)
            return
        tasks = self._tasks or self._tasks_from_predictions(results)
        ids = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", None)
        if ids is not None:
            original = {contiguous: own for own, contiguous in ids.items()}
            results = [{**result, "category_id": original[result["category_id"]]} for result in results]
        if self._output_dir:
            with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
                json.dump(results, file)
        self._logger.info("Evaluating predictions with faster-coco-eval ...")
        names = self._metadata.get("thing_classes")
        for task in sorted(tasks):
            self._results[task] = self._derive_coco_results(self._curves(results, task, img_ids), task, names)

    def _curves(self, results: list[dict], task: str, img_ids: list | None):
        from faster_coco_eval import COCO, COCOeval_faster

        if task == "segm":
            # With a box in it the area of a result would be the box's, and so its size class.
            results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
        dataset, results, img_ids = _with_plain_ids(self._coco_api.dataset, results, img_ids)
        truth = COCO(dataset, use_deepcopy=True)
        found = COCOeval_faster(truth, truth.loadRes(results), task, print_function=self._logger.info)
        if img_ids is not None:
            found.params.imgIds = img_ids
        if task == "keypoints":
            self._check_keypoints(results, found)
        elif self._max_dets_per_image is not None:
            found.params.maxDets = self._max_dets_per_image
        found.evaluate()
        found.accumulate()
        found.summarize()
        return found

    def _check_keypoints(self, results: list[dict], found) -> None:
        if self._kpt_oks_sigmas:
            found.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        annotations = self._coco_api.dataset["annotations"]
        predicted, labelled = (len(one[0]["keypoints"]) // 3 for one in (results, annotations))
        sigmas = len(found.params.kpt_oks_sigmas)
        if not predicted == labelled == sigmas:
            raise UserError(
                f"predictions have {predicted} keypoints, the annotations {labelled}, and TEST.KEYPOINT_OKS_SIGMAS "
                f"{sigmas} values; expected the same number of each"
            )


def _with_plain_ids(dataset: dict, results: list[dict], img_ids: list | None) -> tuple[dict, list[dict], list | None]:
    """The same with images numbered from 1, if their ids are text or beyond what the C++ evaluation counts with."""
    if all(type(image["id"]) is int and abs(image["id"]) < _PLAIN_IDS for image in dataset["images"]):
        return dataset, results, img_ids
    numbers: dict[Any, int] = {image["id"]: number for number, image in enumerate(dataset["images"], start=1)}
    dataset = {
        **dataset,
        "images": [{**image, "id": numbers[image["id"]]} for image in dataset["images"]],
        "annotations": [
            {**annotation, "image_id": numbers[annotation["image_id"]]} for annotation in dataset["annotations"]
        ],
    }
    results = [{**result, "image_id": numbers[result["image_id"]]} for result in results]
    return dataset, results, None if img_ids is None else [numbers[own] for own in img_ids]
