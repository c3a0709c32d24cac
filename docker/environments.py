"""Makes the environments of the baselines that bring a requirements.txt, while the image is built (docker/benchmark.Dockerfile).

In: ``baselines/*/requirements.txt``. Out: the folders that ``harness run`` will look for, below HARNESS_ENVIRONMENTS.
"""

from types import SimpleNamespace
from typing import Any

from harness import environments
from harness.paths import Paths

paths = Paths.default()
paths.environments.mkdir(parents=True, exist_ok=True)
for file in sorted((paths.project / "baselines").glob("*/requirements.txt")):
    method: Any = SimpleNamespace(name=file.parent.name, requirements=file)
    folder = environments.folder_of(method, paths)
    assert folder is not None
    print(f"making the environment of {method.name}: {folder}", flush=True)
    environments.make(method, folder)
