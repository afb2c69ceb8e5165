"""A checkpointer that says how much of the model a weight file filled, and refuses what does not belong."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import parse_qsl

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from fpn_d2.errors import UserError, not_found
from fpn_d2.files import write_atomically

from .contents import KEY, check_classes, classes_in
from .folder import LAST, newest_good, prune, remove_unfinished, write_checkpoint
from .reading import read_checkpoint
from .report import judge, log_report, report_of
from .torchvision import convert_torchvision, is_torchvision

logger = logging.getLogger(__name__)

BEST_MODEL = "model_best"


class ReportingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with a report and a decision, and with files read by `read_checkpoint`.

    After each load it logs how many tensors of each part of the model were filled. What does not fit is judged by
    ``partial_weights`` (MODEL.PARTIAL_WEIGHTS). Its files are written and found as `folder` says.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        partial_weights: str = "auto",
        whole: bool = False,
        about: dict | None = None,
        keep: int = 0,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: As in `DetectionCheckpointer`.
            partial_weights: "auto", "allow" or "refuse"; see MODEL.PARTIAL_WEIGHTS.
            whole: Whether "auto" accepts only files that fill the whole model, as an evaluation needs.
            about: `contents` of the configuration: goes into every file that is saved, and its classes are compared
                with those of a file that has to fill the whole model.
            keep: Number of periodic checkpoints to keep; 0: all.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._partial_weights = partial_weights
        self._whole = whole
        self._about = about or {}
        self._keep = keep
        self._heuristic_names = False
        self._file = ""
        # The checkpoint from which --resume would go on with this run; "" as long as there is none.
        self.latest = ""
        self.saved_at = time.monotonic()
        # Whether the training has lost itself: then nothing is saved that --resume could go on from.
        self.diverged: Callable[[], bool] = lambda: False
        # Within it, the model has the weights that are to be saved, which may be others than the training's.
        self.weights_to_save: Callable[[], AbstractContextManager] = nullcontext

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest good checkpoint of the folder with all states, or else the weights in ``path`` alone.

        A checkpoint to resume from must fill the whole model. Afterwards `latest` names it.

        Raises:
            UserError: The file does not exist, cannot be read or does not fit.
        """
        if self.save_dir and self.save_to_disk:
            remove_unfinished(self.save_dir)
        found = self.get_checkpoint_file() if resume and comm.is_main_process() else ""
        if comm.get_world_size() > 1:
            found = comm.all_gather(found)[0]
            if found and not os.path.isfile(found) and "://" not in found:
                raise UserError(
                    f"process {comm.get_rank()} cannot see {found}: OUTPUT_DIR must be a folder that all machines share"
                )
        if not found:
            if resume:
                logger.warning("There is no checkpoint in %s to resume from: starting anew", self.save_dir)
            return self.load(path, checkpointables=[])
        whole, self._whole = self._whole, True
        try:
            rest = self.load(found)
            self.latest = found
            return rest
        finally:
            self._whole = whole

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The newest good checkpoint in the folder, or ""."""
        return super().get_checkpoint_file() if "://" in self.save_dir else newest_good(self.save_dir)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not path:
            if self._whole and self._partial_weights != "allow":
                raise UserError("there are no weights to evaluate: name a file in MODEL.WEIGHTS, or give --resume")
            logger.info("MODEL.WEIGHTS is empty: the model starts from random weights")
            return {}
        return super().load(self._local(path), *args, **kwargs)

    def _local(self, path: str) -> str:
        """Fetch ``path`` if it is an address, and check that it is a file; the options after a ``?`` stay."""
        address, mark, options = path.partition("?")
        try:
            local = self.path_manager.get_local_path(os.path.expanduser(address))
        except Exception as error:  # whatever the handler of that kind of address raises
            raise UserError(
                f"could not fetch the weights {address} ({error}): download the file yourself and name its path in "
                "MODEL.WEIGHTS"
            ) from error
        if not os.path.isfile(local):
            raise UserError(f"no weight file {address}: {not_found(local)}")
        if mark and not hasattr(self, "_parsed_url_during_load"):
            raise UserError(
                f"{path}: only Detectron2's main branch reads options behind a weight file; leave {mark}{options} out"
            )
        return local + mark + options

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_checkpoint(filename)
        # On Detectron2's main branch.
        options = dict(parse_qsl(getattr(getattr(self, "_parsed_url_during_load", None), "query", "")))
        if options.pop("matching_heuristics", "") == "True":
            loaded["matching_heuristics"] = True
        if options:
            raise UserError(f"{filename} has the option {next(iter(options))}; expected matching_heuristics=True")
        if is_torchvision(loaded["model"]):
            try:
                weights, known = convert_torchvision(loaded["model"])
            except UserError as error:
                raise UserError(f"{os.path.abspath(filename)}: {error}") from None
            logger.info("%s holds torchvision's %s: converted; its config is %s", filename, known.name, known.config)
            loaded = {"model": weights}
        if self._whole and self._partial_weights != "allow":
            check_classes(classes_in(loaded), self._about.get("classes", {}), os.path.abspath(filename))
        self._heuristic_names = bool(loaded.get("matching_heuristics", False))
        self._file = filename
        return loaded

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Called by the inherited `load` with what did not fit: report it, then decide."""
        report = report_of(self.model, incompatible, self._heuristic_names)
        log_report(report, self._file)
        problem = judge(report, self._partial_weights, self._whole)
        if problem:
            raise UserError(f"{self._file}: {problem}. MODEL.PARTIAL_WEIGHTS allow loads what fits all the same")

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the states and ``kwargs`` as ``name``.pth, of which --resume goes on unless it is the best.

        Raises:
            UserError: It cannot be written.

        Nothing is saved of weights that are not finite, and of a training that has lost itself; that is said.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        with self.weights_to_save():
            self._save(name, **kwargs)

    def _save(self, name: str, **kwargs: Any) -> None:
        broken = [key for key, value in self.model.state_dict().items() if not _is_finite(value)]
        if broken or (self.diverged() and name != BEST_MODEL):
            why = f"{broken[0]} is not finite" if broken else "its last steps were not finite"
            logger.warning("%s.pth is not saved: %s", name, why)
            return
        if self._about:
            kwargs[KEY] = self._about
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            self.latest = super().get_checkpoint_file()
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        write_checkpoint({"model": self.model.state_dict(), **states, **kwargs}, path, self.latest)
        logger.info("Saved %s", path)
        self.tag_last_checkpoint(f"{name}.pth")
        if name != BEST_MODEL:
            self.latest, self.saved_at = path, time.monotonic()
            prune(self.save_dir, self._keep, path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if last_filename_basename == f"{BEST_MODEL}.pth":
            return  # the best is not the latest
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
        else:
            write_atomically(os.path.join(self.save_dir, LAST), last_filename_basename)


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
