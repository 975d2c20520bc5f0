# Three images from one file:
#
#   docker build --target gateway -t trimtab-gateway:0.1.0 .
#   docker build --target engine  -t trimtab-engine:0.1.0  [--build-arg VARIANT=cuda] .
#   docker build --target trainer -t trimtab-trainer:0.1.0 [--build-arg VARIANT=cuda] .
#
# The gateway holds no torch, the trainer no vLLM. All run as uid 10001 with a read-only root file system: what they
# write goes to /data and /tmp. tini is process 1, passes signals on and reaps what vLLM leaves behind.
# The CUDA builds bring their own CUDA libraries; the host needs the driver and the NVIDIA container toolkit.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VARIANT=cpu
ARG VERSION=0.1.0

# What all images run on.
FROM ${PYTHON_IMAGE} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin trimtab \
    && mkdir -p /data/adapters /training /models \
    && chown -R trimtab:trimtab /data /training
COPY deploy/healthcheck.py /usr/local/lib/trimtab/healthcheck.py
ENV PATH=/opt/trimtab/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    HF_HOME=/data/cache/huggingface
ARG VERSION
LABEL org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.vendor=Trimtab
WORKDIR /data
VOLUME /data
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "--", "trimtab"]

# The product as a wheel; its dependencies are installed before it, in layers that a change of the source leaves alone.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY requirements requirements
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir -c requirements/cpu.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY adapters adapters
COPY training training
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS environment
RUN python -m venv /opt/trimtab
ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY requirements requirements
COPY pyproject.toml ./
COPY clients/python/pyproject.toml clients/python/

# pip resolves here, but every version it may take is fixed by the pins.
FROM environment AS gateway-environment
RUN python requirements/compile.py list server postgres > /tmp/wanted.txt \
    && /opt/trimtab/bin/pip install -c requirements/cpu.txt -r /tmp/wanted.txt
COPY --from=wheel /wheels /wheels
RUN /opt/trimtab/bin/pip install --no-deps /wheels/*.whl

FROM environment AS trainer-environment
ARG VARIANT
RUN if [ "$VARIANT" = cpu ]; then requirements/install.sh /opt/trimtab/bin/python torch-cpu; fi
RUN python requirements/compile.py list train > /tmp/wanted.txt \
    && /opt/trimtab/bin/pip install -c requirements/${VARIANT}.txt -r /tmp/wanted.txt
COPY --from=wheel /wheels /wheels
RUN /opt/trimtab/bin/pip install --no-deps /wheels/*.whl

FROM environment AS engine-environment
ARG VARIANT
RUN requirements/install.sh /opt/trimtab/bin/python ${VARIANT}
COPY --from=wheel /wheels /wheels
RUN /opt/trimtab/bin/pip install --no-deps /wheels/*.whl

FROM base AS gateway
LABEL org.opencontainers.image.title="Trimtab gateway" \
      org.opencontainers.image.description="OpenAI-compatible API with steering, best-of-N and a rollout log"
COPY --from=gateway-environment /opt/trimtab /opt/trimtab
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "/usr/local/lib/trimtab/healthcheck.py", "http://127.0.0.1:8000/health"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--data-dir", "/data", "--engine-url", "http://engine:8100"]

FROM base AS trainer
LABEL org.opencontainers.image.title="Trimtab trainer" \
      org.opencontainers.image.description="Trains adapter LMs from logged rollouts and publishes versions"
COPY --from=trainer-environment /opt/trimtab /opt/trimtab
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=5 \
    CMD ["python", "/usr/local/lib/trimtab/healthcheck.py", "--process", "trainer", "http://gateway:8000/health"]
CMD ["trainer", "--url", "http://gateway:8000", "--output-dir", "/training"]

FROM base AS engine
LABEL org.opencontainers.image.title="Trimtab engine" \
      org.opencontainers.image.description="Stock vLLM server with Trimtab's steering plug-ins"
# g++: torch.compile and Triton build kernels at run time. libnuma1: vLLM's CPU kernels are linked against it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=engine-environment /opt/trimtab /opt/trimtab
ENV VLLM_NO_USAGE_STATS=1 \
    VLLM_CACHE_ROOT=/data/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor \
    TRITON_CACHE_DIR=/data/cache/triton
USER 10001:10001
EXPOSE 8100
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "/usr/local/lib/trimtab/healthcheck.py", "http://127.0.0.1:8100/health"]
CMD ["engine", "--host", "0.0.0.0", "--port", "8100", "--model", "/models/base"]
