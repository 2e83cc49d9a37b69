# Tidegate's images. Targets: cpu (gateway, scheduler, CPU workers, edge nodes; no torch), gpu (workers on NVIDIA GPUs),
# export (builds model files with torch; runs once), loadgen (with images to send). The source stays a checkout at
# /app: see pyproject.toml. The base is pinned by exact version; why not by digest, too: docs/decisions/0001.
FROM python:3.11.13-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/venv/bin:$PATH
WORKDIR /app
# A fixed id, so that volumes keep their owner from image to image; both volume folders exist with this owner.
RUN groupadd --gid 10001 tidegate \
 && useradd --uid 10001 --gid tidegate --no-create-home --home-dir /tmp tidegate \
 && mkdir /models /engines \
 && chown tidegate:tidegate /models /engines

FROM base AS build
# For models/resize_passes.c; the final images take over what it built, not the compiler.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && python -m venv /venv
COPY pyproject.toml setup.py README.md LICENSE ./
COPY protocol protocol
COPY models models
COPY policies policies
COPY workers workers
COPY scheduler scheduler
COPY gateway gateway
COPY loadgen loadgen
COPY tidegate tidegate
COPY deploy deploy

FROM build AS build-cpu
# For edge nodes: clips, trackers and their one cv2, without displays. trackers asks for another cv2, so it comes alone.
RUN pip install --editable ".[cpu,edge]" \
 && pip install --no-deps trackers==2.6.1

FROM build AS build-gpu
RUN pip install --editable ".[gpu]" "onnxruntime-gpu[cuda,cudnn]==1.31.1" "nvidia-nvimgcodec-cu13[nvjpeg]==0.9.0.20"
# For device = "tensorrt", gigabytes: --build-arg TENSORRT_VERSION=10.16.1.11 (onnxruntime 1.31 is linked to 10).
ARG TENSORRT_VERSION=""
RUN test -z "$TENSORRT_VERSION" || pip install "tensorrt-cu13==$TENSORRT_VERSION"

FROM build AS build-loadgen
RUN pip install --editable ".[demo]"

FROM build AS build-export
# For torch's CPU build, gigabytes smaller than the default: --build-arg PIP_EXTRA_INDEX_URL=AN-INDEX-THAT-HAS-IT
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install torch==2.13.0 \
 && pip install --editable ".[cpu,train]" \
 && pip install --no-deps torchvision==0.28.0 timm==1.0.31 \
 && pip install huggingface_hub==2.4.0 pyyaml==6.0.3

FROM base AS export
COPY --from=build-export /venv /venv
COPY --from=build-export /app /app
USER 10001:10001
CMD ["tidegate", "models", "--help"]

FROM base AS loadgen
COPY --from=build-loadgen /venv /venv
COPY --from=build-loadgen /app /app
USER 10001:10001
CMD ["python", "-m", "loadgen", "--help"]

FROM base AS gpu
# What NVIDIA's container runtime should bring in: the driver's compute libraries, nothing else.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TIDEGATE_ENGINE_CACHE=/engines
COPY --from=build-gpu /venv /venv
COPY --from=build-gpu /app /app
USER 10001:10001
EXPOSE 7001
CMD ["python", "-m", "workers", "--help"]

FROM base AS cpu
COPY --from=build-cpu /venv /venv
COPY --from=build-cpu /app /app
USER 10001:10001
EXPOSE 8700
CMD ["python", "-m", "gateway", "--help"]
