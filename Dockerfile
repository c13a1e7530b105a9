# The images of the service: ingest, rerank, index, gateway, ingest-gpu, rerank-gpu, rerank-tensorrt, engine-build, and model, which
# contains a checkpoint.
#
#   docker build --target rerank -t edje-rerank:0.1.0 .
#   docker build --target model  -t edje-model:DIGEST --build-context checkpoint=build/scenes/checkpoint .
#
# Packages are those of requirements/service.txt (engine.txt for the last two workers), checked against their hashes,
# with the exceptions named below.

# --- installation
# ------------------------------------------------------------------------------------------------------

FROM python:3.12.11-slim-bookworm AS sources
WORKDIR /build
COPY requirements/uv.txt requirements/service.txt requirements/engine.txt requirements/
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements/uv.txt
COPY pyproject.toml README.md ./
COPY protocols protocols
COPY edje edje
COPY trt trt
COPY workers workers

# Without a GPU, torch's CUDA libraries are gigabytes that are never loaded, so these images take the CPU build of the
# same version from PyTorch's own index. That package is not checked against a hash, because the lock contains the CUDA
# build only.
FROM sources AS cpu-app
ENV VIRTUAL_ENV=/app UV_LINK_MODE=copy UV_NO_CACHE=1
RUN uv venv /app \
 && awk '/^[a-z]/ {drop = /^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/} !drop' requirements/service.txt > cpu.txt \
 && uv pip install --require-hashes --compile-bytecode -r cpu.txt \
 && uv pip install --torch-backend cpu --compile-bytecode "$(grep -o '^torch==[^ ;]*' requirements/service.txt)"
RUN uv pip install --no-deps --no-build-isolation --compile-bytecode .

# Uses Ubuntu's Python.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 && rm -rf /var/lib/apt/lists/*

FROM cuda AS gpu-app
COPY --from=sources /usr/local/bin/uv /usr/local/bin/uv
COPY --from=sources /build /build
WORKDIR /build
ENV VIRTUAL_ENV=/app UV_LINK_MODE=copy UV_NO_CACHE=1
RUN uv venv --python /usr/bin/python3.12 /app \
 && uv pip install --require-hashes --compile-bytecode -r requirements/service.txt
RUN uv pip install --no-deps --no-build-isolation --compile-bytecode .

# TensorRT's libraries come from the vendor through its installer, and pycuda is compiled against CUDA's headers: both
# are pinned and not checked against hashes. The compiler stays in this stage.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS tensorrt-app
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3.12-dev && rm -rf /var/lib/apt/lists/*
COPY --from=sources /usr/local/bin/uv /usr/local/bin/uv
COPY --from=gpu-app /app /app
COPY --from=sources /build/requirements/engine.txt /build/requirements/engine.txt
WORKDIR /build
ENV VIRTUAL_ENV=/app UV_LINK_MODE=copy UV_NO_CACHE=1 CUDA_ROOT=/usr/local/cuda
RUN uv pip install --require-hashes --compile-bytecode -r requirements/engine.txt \
 && uv pip install --compile-bytecode pip tensorrt==11.4.0.106 pycuda==2026.1 \
 && uv pip uninstall pip

# --- images that run: no compiler, no installer, only /tmp is writable
# -------------------------------------------------

FROM python:3.12.11-slim-bookworm AS cpu-worker
RUN pip uninstall --yes --quiet --root-user-action ignore pip
COPY --from=cpu-app /app /app
ENV PATH=/app/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
WORKDIR /
# A number, because `runAsNonRoot` cannot look up a name.
USER 65532:65532

FROM cuda AS gpu-worker
COPY --from=gpu-app /app /app
ENV PATH=/app/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
WORKDIR /
USER 65532:65532

FROM cuda AS tensorrt-worker
COPY --from=tensorrt-app /app /app
ENV PATH=/app/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
WORKDIR /
USER 65532:65532

FROM cpu-worker AS ingest
CMD ["python", "-m", "workers.ingest"]

FROM cpu-worker AS rerank
CMD ["python", "-m", "workers.rerank"]

FROM cpu-worker AS index
CMD ["python", "-m", "workers.index"]

FROM cpu-worker AS gateway
CMD ["python", "-m", "workers.gateway"]

FROM gpu-worker AS ingest-gpu
CMD ["python", "-m", "workers.ingest"]

FROM gpu-worker AS rerank-gpu
CMD ["python", "-m", "workers.rerank"]

FROM tensorrt-worker AS rerank-tensorrt
CMD ["python", "-m", "workers.rerank"]

# Builds an engine on the GPU that will run it: deploy/kubernetes/overlays/tensorrt.
FROM tensorrt-worker AS engine-build
CMD ["python", "-m", "trt.build", "--help"]

# --- the model: a checkpoint, copied into a pod's volume
# ---------------------------------------------------------------

# The demo's model by default; --build-context checkpoint=FOLDER names another.
FROM scratch AS checkpoint
COPY deploy/models/scenes /

FROM busybox:1.37.0 AS model
# Owned by the user that fills it when it is a named volume.
RUN mkdir /checkpoint && chown 65532:65532 /checkpoint
COPY --from=checkpoint / /model
USER 65532:65532
CMD ["cp", "-r", "/model/.", "/checkpoint/"]
