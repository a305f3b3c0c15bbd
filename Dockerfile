# One image for every role: Ray head, Ray workers (GPU or CPU), job drivers and the MLflow server.
#
#   CUDA   docker build -t arvideo-dist:0.1.0 .
#   CPU    docker build -t arvideo-dist:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# BASE         any Debian with Python 3.11, venv and Python's headers, for linux/amd64 (decord has no other
#              wheels). The CUDA libraries come with torch's wheels and the driver from the node, so one base
#              serves both and no CUDA toolkit (nvcc) is needed: training uses torch's own fused AdamW.
# TORCH_INDEX  where torch's wheel comes from. PyPI's is the CUDA build; the indexes under
#              https://download.pytorch.org/whl/ hold builds for other CUDA versions and for the CPU.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# The dependencies' names alone, so that no other change of pyproject.toml rebuilds the large layer.
FROM ${BASE} AS requirements
WORKDIR /src
COPY pyproject.toml .
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /requirements.txt

FROM ${BASE} AS dependencies
ARG TORCH_INDEX=https://pypi.org/simple
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
COPY constraints.txt /
# torch first and alone: the next step finds the wanted build installed and takes the rest from PyPI.
RUN pip install --no-cache-dir --no-deps --constraint /constraints.txt --index-url "${TORCH_INDEX}" torch
COPY --from=requirements /requirements.txt /
RUN pip install --no-cache-dir --constraint /constraints.txt --requirement /requirements.txt \
    && pip check

FROM dependencies AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY arvideo_dist arvideo_dist
COPY data_prep data_prep
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS runtime
# bash: KubeRay starts Ray through it. g++: torch.compile (inductor, Triton) builds its kernels at run time.
# The user needs a name as well as a number: torch asks for it to place its cache.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 arvideo \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash arvideo
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
WORKDIR /opt/arvideo
COPY jobs jobs
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="arvideo-dist" \
      org.opencontainers.image.description="ARVideo pretraining on Ray Train and DeepSpeed" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
# A number, not a name: Kubernetes' runAsNonRoot can only check numbers.
USER 1000:1000
CMD ["python", "-m", "arvideo_dist.pretrain", "--help"]
