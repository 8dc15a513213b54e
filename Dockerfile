# The command `syncbn` as an image. docs/guide/docker.md has the commands to build and run it.
# CUDA: no argument, as torch's wheel for Linux brings CUDA. CPU: --build-arg TORCH_INDEX=URL, an index with torch for the CPU.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base
# The layer's compiled passes for the CPU need libgomp.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The environment of .devcontainer/devcontainer.json: what `make test` and `make lint` need besides Python.
FROM base AS dev
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium g++ git make shellcheck \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash syncbn
USER syncbn

FROM base AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/syncbn
ENV PATH=/opt/syncbn/bin:${PATH}
WORKDIR /src
# Torch comes first, in a layer of its own, which a change of the code leaves as it is.
COPY constraints.txt ./
ARG TORCH_INDEX=
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch torchvision
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY conf conf
COPY hydra_plugins hydra_plugins
COPY syncbn syncbn
ARG EXTRAS=vision,export
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM base AS image
COPY --from=build /opt/syncbn /opt/syncbn
# USER and HOME: torch asks for the name of the user and caches in the home directory, also under `docker run --user`.
ENV PATH=/opt/syncbn/bin:${PATH} HOME=/home/syncbn USER=syncbn NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 syncbn \
    && mkdir /runs \
    && chown syncbn:syncbn /runs \
    && chmod 1777 /runs /home/syncbn
USER syncbn
# outputs/, multirun/ and studies/ are made in the current directory.
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["syncbn"]
CMD ["--help"]
