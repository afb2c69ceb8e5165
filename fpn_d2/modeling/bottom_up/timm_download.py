"""Whether timm can have the weights that it is asked for, found out before its libraries try for a minute."""

import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from fpn_d2.errors import UserError

_SECONDS = 5  # to connect in
_FILES = ("model.safetensors", "pytorch_model.bin")  # in which timm's repositories have their weights


def find_pretrained(name: str, described) -> str:
    """Look for the weights that timm would download.

    Args:
        name: of the timm model.
        described: timm's ``PretrainedCfg`` of it.

    Returns:
        The file, where an earlier download has left it; "" where timm is to download it.

    Raises:
        UserError: neither is there a file, nor an answer from where it comes from; says what to set instead.
    """
    address, file = described.url or "", ""
    if described.hf_hub_id:
        try:
            import huggingface_hub
        except ImportError:
            return ""  # timm says what to install
        repository, _, revision = described.hf_hub_id.partition("@")
        for file_name in (described.hf_hub_filename,) if described.hf_hub_filename else _FILES:
            found = huggingface_hub.try_to_load_from_cache(repository, file_name, revision=revision or None)
            if isinstance(found, str):
                return found
            file = file or file_name
        address = huggingface_hub.hf_hub_url(repository, file, revision=revision or None)
    problem = _unreachable(address) if address else ""
    if problem:
        raise cannot_download(name, problem, address)
    return ""


def cannot_download(name: str, problem: object, address: str = "") -> UserError:
    """The error for weights that did not come."""
    where = f" from {address}" if address else ""
    return UserError(
        f"MODEL.TIMM.PRETRAINED is True, but timm cannot download the weights of {name}{where} ({problem}): download "
        "the file yourself, name its path in MODEL.TIMM.WEIGHTS and set MODEL.TIMM.PRETRAINED to False"
    )


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
