# The MLflow server: SQLite and artifacts in one volume, no job execution (saves 2 GB), no telemetry, an unprivileged user.
ARG BASE_IMAGE=ubuntu:noble-20260410
FROM ${BASE_IMAGE}
ENV LANG=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

ENV UV_CACHE_DIR=/root/.cache/uv \
    UV_LINK_MODE=copy
COPY docker/requirements/mlflow.txt docker/requirements/installer.txt /app/docker/requirements/
COPY docker/venv.sh /app/docker/venv.sh
RUN --mount=type=cache,target=/root/.cache \
    /app/docker/venv.sh create /opt/venv \
 && /app/docker/venv.sh install /opt/venv mlflow.txt

RUN useradd --uid 10002 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mlflow \
 && install -d -o mlflow -g mlflow /mlflow
USER 10002:10002
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    GIT_PYTHON_REFRESH=quiet
VOLUME /mlflow
EXPOSE 5000
LABEL org.opencontainers.image.title="utgrec-bench MLflow server" \
      org.opencontainers.image.licenses="Apache-2.0"
HEALTHCHECK --interval=5s --timeout=10s --start-period=120s --retries=24 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=8)"]
# The host names that requests may carry: the service's name inside, the published port outside. Others get 403.
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1", \
     "--backend-store-uri", "sqlite:////mlflow/mlflow.db", "--artifacts-destination", "/mlflow/artifacts", "--serve-artifacts", \
     "--allowed-hosts", "mlflow:5000,localhost:*,127.0.0.1:*"]
