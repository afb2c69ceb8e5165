"""Multi-level RoIAlign.

:func:`pyramid_roi_align` pools each RoI from its own level of a pyramid. Implementations:

    "compiled"     C++, CPU; built at first use where there is a compiler, then cached (compiled_roi_align.py)
    "torch"        pure torch, any device; as exact, slower than compiled (torch_roi_align.py)
    "triton"       GPU; one launch for all levels, no host synchronisation (triton_roi_align.py). It has been tried in
                   Triton's interpreter alone and not yet been measured on a GPU: it runs only where it is asked for.
    "torchvision"  one ``torchvision.ops.roi_align`` per level, as in Detectron2; what can be traced and exported
    "auto"         the default. CPU: compiled, or torch where it cannot be built. Other devices, and while a model is
                   traced: torchvision.

The argument ``implementation`` chooses; where it is "auto", the environment variable ``FPN_D2_ROI_ALIGN`` may name one.
All of them give the same numbers within float32's rounding, forward and backward, and are tested against one slow
reference (tests/fast/roi_align/reference.py).
"""

from .roi_align import IMPLEMENTATIONS, pyramid_roi_align

__all__ = ["IMPLEMENTATIONS", "pyramid_roi_align"]
