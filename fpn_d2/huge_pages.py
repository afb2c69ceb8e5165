"""Large tensors in pages of 2 MB: asked for before PyTorch is imported."""

import os

# The environment variable of PyTorch's that puts large tensors into huge pages.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def ask_for_huge_pages() -> None:
    """Have PyTorch ask Linux for large tensors in pages of 2 MB, also in processes that this one starts.

    Memory that is new is handed out page by page when it is first written, and a model on a CPU writes hundreds of
    megabytes of it in each step. PyTorch looks at the environment variable ``THP_MEM_ALLOC_ENABLE`` with its first
    large tensor: who has set it is left alone, "0" switches it off.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
