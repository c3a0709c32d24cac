# The image of all services but mlflow: conductor, worker, data, tests.
#   docker compose build benchmark                            CPU
#   COMPOSE_FILE=docker-compose.yml:docker/compose.gpu.yml    GPU, in .env: see .env.example
# Any Debian 12+ or Ubuntu 24.04+ with Python 3.11 or 3.12 works as base on a CPU; flash-attn needs the CUDA toolkit of the default.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
ARG FLASH_ATTN=0

# ---- system packages: g++, headers and ninja compile DeepSpeed's CPU op, torch.compile's kernels and flash-attn
FROM ${BASE_IMAGE} AS system
ENV LANG=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
        ca-certificates git g++ libgomp1 make ninja-build python3 python3-dev python3-venv util-linux \
 && rm -rf /var/lib/apt/lists/*

# ---- requirements: made again only when the pins change
FROM system AS requirements
ARG DEVICE=cpu
ENV UV_CACHE_DIR=/root/.cache/uv \
    UV_LINK_MODE=copy
COPY docker/requirements/*.txt /app/docker/requirements/
COPY docker/venv.sh /app/docker/venv.sh
RUN --mount=type=cache,target=/root/.cache \
    /app/docker/venv.sh create /opt/venv \
 && /app/docker/venv.sh torch /opt/venv "$DEVICE" \
 && /app/docker/venv.sh requirements /opt/venv "$DEVICE" \
 && /app/docker/venv.sh check /opt/venv

# ---- flash-attn, compiled against that torch; off (an empty folder) unless FLASH_ATTN=1. Not proven on a GPU yet.
FROM requirements AS flash-attn-0
RUN mkdir /wheels

FROM requirements AS flash-attn-1
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=type=cache,target=/root/.cache \
    PATH=/opt/venv/bin:$PATH FLASH_ATTENTION_FORCE_BUILD=TRUE MAX_JOBS=$MAX_JOBS FLASH_ATTN_CUDA_ARCHS=$FLASH_ATTN_CUDA_ARCHS \
    pip wheel --no-deps --no-build-isolation --require-hashes -r /app/docker/requirements/flash-attn.txt -w /wheels

# hadolint ignore=DL3006
FROM flash-attn-${FLASH_ATTN} AS flash-attn

# ---- environments of the baselines that bring a requirements.txt: made here because the worker has no network.
# Only these files come in, so that a change to a baseline's code installs nothing.
FROM system AS own-requirements
COPY baselines /baselines
RUN find /baselines -type f ! -name requirements.txt -delete && find /baselines -type d -empty -delete && mkdir -p /baselines

FROM requirements AS environments
COPY harness/__init__.py harness/environments.py harness/method.py harness/paths.py harness/values.py /app/harness/
COPY docker/environments.py /app/docker/environments.py
COPY --from=own-requirements /baselines /app/baselines
RUN --mount=type=cache,target=/root/.cache \
    PYTHONPATH=/app HARNESS_ENVIRONMENTS=/opt/environments /opt/venv/bin/python /app/docker/environments.py

# ---- the image
FROM requirements AS benchmark
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    HF_HUB_DISABLE_TELEMETRY=1 \
    GIT_PYTHON_REFRESH=quiet \
    HARNESS_DATA=/app/data/domains \
    HARNESS_RESULTS=/app/results/local \
    HARNESS_ENVIRONMENTS=/opt/environments \
    HARNESS_JOBS=/jobs \
    HARNESS_PUBLIC=/public

RUN --mount=type=bind,from=flash-attn,source=/wheels,target=/wheels \
    if ls /wheels/flash_attn-*.whl >/dev/null 2>&1; then pip install --no-cache-dir --no-index --no-deps --no-warn-script-location /wheels/*.whl; fi

# The worker's user. The jobs volume is the one place where conductor (any user, in this group) and worker both write.
RUN groupadd --gid 10001 worker \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin worker \
 && install -d -o worker -g worker -m 2770 /jobs \
 && install -d -o worker -g worker -m 2775 /public \
 && install -d /app/data /app/results

COPY --from=environments /opt/environments /opt/environments
WORKDIR /app
COPY . /app
RUN /app/docker/venv.sh project /opt/venv

# What the records name as the code's version: the build argument, else what .git says (HEAD and refs only: no history comes in).
ARG GIT_SHA=""
RUN docker/git-sha.sh "$GIT_SHA" > /app/.git-sha && rm -rf /app/.git

LABEL org.opencontainers.image.title="utgrec-bench" \
      org.opencontainers.image.description="Blind benchmark of UTGRec, TIGER-style and RecBole sequential recommenders" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_SHA}"
ENV HARNESS_GIT_SHA=${GIT_SHA}

ENTRYPOINT ["/app/docker/entrypoint.sh"]
CMD ["harness", "--help"]
