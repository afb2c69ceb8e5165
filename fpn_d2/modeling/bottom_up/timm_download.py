"""Whether timm can have the weights that it is asked for, found out before its libraries try for a minute."""

import os
import ssl
import urllib.error
import urllib.request
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import torch

from fpn_d2.errors import UserError

_SECONDS = 5  # to connect in
_FILES = ("model.safetensors", "pytorch_model.bin")  # in which timm's repositories have their weights


def find_pretrained(name: str, described) -> str:
    """Look for the weights that timm would download.

    Args:
        name: of the timm model.
        described: timm's ``PretrainedCfg`` of it.

    Returns:
        The file, where an earlier download has left it, in the cache of Hugging Face or of torch hub, which timm and
        torchvision use; "" where timm is to download it.

    Raises:
        UserError: neither is there a file, nor an answer from where it comes from; says what to set instead.
    """
    found = find_cached(described)
    if found:
        return found
    address = described.url or ""
    if described.hf_hub_id:
        try:
            import huggingface_hub
        except ImportError:
            return ""  # timm says what to install
        repository, _, revision = described.hf_hub_id.partition("@")
        file = described.hf_hub_filename or _FILES[0]
        address = huggingface_hub.hf_hub_url(repository, file, revision=revision or None)
    problem = _unreachable(address) if address else ""
    if problem:
        raise cannot_download(name, problem, address, described)
    return ""


def find_cached(described) -> str:
    """The file with the weights that ``described`` is about, if it is on this machine already; else ""."""
    if described.hf_hub_id:
        try:
            import huggingface_hub
        except ImportError:
            pass
        else:
            repository, _, revision = described.hf_hub_id.partition("@")
            for file_name in (described.hf_hub_filename,) if described.hf_hub_filename else _FILES:
                found = huggingface_hub.try_to_load_from_cache(repository, file_name, revision=revision or None)
                if isinstance(found, str):
                    return found
    path = _place_in_torch_hub(described)
    return path if os.path.isfile(path) else ""


def _place_in_torch_hub(described) -> str:
    """Where torch hub has, or would have, what is at ``described.url``; "" without one."""
    file_name = PurePosixPath(urlsplit(described.url or "").path).name
    return os.path.join(torch.hub.get_dir(), "checkpoints", file_name) if file_name else ""


def cannot_download(name: str, problem: object, address: str = "", described=None) -> UserError:
    """The error for weights that did not come."""
    where = f" from {address}" if address else ""
    place = _place_in_torch_hub(described) if described else ""
    there = f" (or bring {described.url} to {place})" if place else ""
    others = _cached_tags(name)
    use = f"; on this machine already, for MODEL.TIMM.NAME: {', '.join(others)}" if others else ""
    return UserError(
        f"MODEL.TIMM.PRETRAINED is True, but timm cannot download the weights of {name}{where} ({problem}): download "
        f"the file yourself, name its path in MODEL.TIMM.WEIGHTS and set MODEL.TIMM.PRETRAINED to False{there}{use}"
    )


def _cached_tags(name: str) -> list[str]:
    """Names with other tags of the same model whose weights have been downloaded before."""
    from timm.models import get_pretrained_cfg, list_pretrained

    tagged = list_pretrained(f"{name.partition('.')[0]}.*")
    return [other for other in tagged if (described := get_pretrained_cfg(other)) and find_cached(described)]


def _unreachable(address: str) -> str:
    """Why the server of an address does not answer, or ""; any answer at all, a refusal too, will do."""
    if urlsplit(address).scheme not in ("http", "https"):
        return ""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        pass
    except OSError as error:
        reason = getattr(error, "reason", error)
        return "" if isinstance(reason, ssl.SSLError) else str(getattr(reason, "strerror", None) or reason)
    return ""
