"""Fast operations behind plain functions. They take tensors, and know nothing of models or configurations.

C++ sources are compiled at first use and kept (build.py). Where there is no compiler, PyTorch does the work.

    roi_align.py   multi-level RoIAlign, below
    winograd.py    3x3 convolution with a quarter of the products, CPU; torch_winograd.py without a compiler
    onednn_conv.py convolution, sum and ReLU in one pass, CPU, inference
    nms.py         non-maximum suppression, CPU
    linear.py      fully connected layers through oneDNN, CPU

:func:`pyramid_roi_align` pools each RoI from its own level of a pyramid. Implementations:

    "compiled"     C++, CPU; built at first use where there is a compiler, then cached (compiled_roi_align.py)
    "torch"        pure torch, any device; as exact, slower than compiled (torch_roi_align.py)
    "triton"       GPU; one launch for all levels, no host synchronisation (triton_roi_align.py)
    "torchvision"  one ``torchvision.ops.roi_align`` per level, as in Detectron2; what can be traced and exported
    "auto"         the default. GPU: triton, or torchvision where Triton is missing. CPU: compiled, or torch where it
                   cannot be built. Other devices, and while a model is traced: torchvision.

The argument ``implementation`` chooses; where it is "auto", the environment variable ``FPN_D2_ROI_ALIGN`` may name one.
All of them give the same numbers within float32's rounding, forward and backward, and are tested against one slow
reference (tests/fast/roi_align/reference.py).
"""

from .roi_align import IMPLEMENTATIONS, pyramid_roi_align

__all__ = ["IMPLEMENTATIONS", "pyramid_roi_align"]
