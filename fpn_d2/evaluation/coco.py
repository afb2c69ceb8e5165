"""COCO's figures by faster-coco-eval where it is installed: the same numbers, sooner."""

import importlib.util
import itertools
import json
import os

import numpy as np
from detectron2.evaluation import COCOEvaluator


def fast_evaluation_is_there() -> bool:
    """Whether the package faster-coco-eval is installed."""
    return importlib.util.find_spec("faster_coco_eval") is not None


class FastCOCOEvaluator(COCOEvaluator):
    """``COCOEvaluator`` whose matching and precision-recall curves are computed by faster-coco-eval, in C++.

    Collecting predictions and the tables of results stay Detectron2's. Needs ``pip install faster-coco-eval``.
    """

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        results = list(itertools.chain.from_iterable(image["instances"] for image in predictions))
        # The official evaluation writes no report of its own that would be missed here; what it cannot do without
        # annotations, or with another limit of detections, is left to Detectron2.
        if not (results and self._do_evaluation and self._max_dets_per_image in (None, [1, 10, 100])):
            super()._eval_predictions(predictions, img_ids)
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

    def _curves(self, results: list[dict], task: str, img_ids: list[int] | None):
        from faster_coco_eval import COCO, COCOeval_faster

        if task == "segm":
            # With a box in it the area of a result would be the box's, and so its size class.
            results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
        truth = COCO(self._coco_api.dataset, use_deepcopy=True)
        found = COCOeval_faster(truth, truth.loadRes(results), task, print_function=self._logger.info)
        if img_ids is not None:
            found.params.imgIds = img_ids
        if task == "keypoints":
            self._check_keypoints(results, found)
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
            raise ValueError(
                f"predictions have {predicted} keypoints, the annotations {labelled}, and TEST.KEYPOINT_OKS_SIGMAS "
                f"{sigmas} values; expected the same number of each"
            )
