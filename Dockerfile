# What the flows and `dvc repro` need, without the code: mount a clone at /workspace (docs/operations.md).
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
# torch for the CPU; for CUDA the index of its build, such as https://download.pytorch.org/whl/cu130.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /workspace
WORKDIR /workspace
COPY Makefile pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY blockpruner blockpruner
RUN PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 make VENV=/opt/venv /opt/venv/.ready
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp DVC_NO_ANALYTICS=1 DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
