# Two commands do everything: `make demo` and `make test`. Both install what they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# What machines are made with (demo), and what the tests compare with and serve images from (test).
DEMO_PACKAGES := python3-venv qemu-system-x86 skopeo squashfs-tools zstd lz4 mmdebstrap uidmap util-linux
KERNEL_PACKAGES := make gcc libc6-dev flex bison bc libelf-dev libssl-dev xz-utils lz4
QEMU_PACKAGES := gcc g++ make meson ninja-build pkgconf flex bison dpkg-dev binutils libglib2.0-dev libpixman-1-dev \
	libseccomp-dev libfdt-dev zlib1g-dev libpcre2-dev
TOOLS_PACKAGES := make musl-tools dpkg-dev xz-utils $(if $(shell command -v go),,golang-go)
TEST_PACKAGES := $(DEMO_PACKAGES) $(KERNEL_PACKAGES) $(QEMU_PACKAGES) docker-registry podman runc iproute2 attr busybox-static \
	nftables slirp4netns

.PHONY: demo test test-firecracker test-images setup-demo setup-test lint docs bench soak agent kernel qemu tools fuzz clean

demo: setup-demo ## a pytest suite against clones of a real nginx
	$(BIN)/python examples/demo.py

test-firecracker: setup-test kernel ## the VM tier on a real Firecracker, named by FCVM_TEST_FIRECRACKER, in an emulated host of KVM
	$(BIN)/python -m pytest --fcvm-kernel stock --fcvm-pool 0 tests/firecracker

test-images: setup-test kernel ## public images, each configured as its page says, on our own kernel and on the stock one
	@$(MAKE) --no-print-directory packages PACKAGES="maven"
	FCVM_TEST_ALL_IMAGES=1 $(BIN)/python -m pytest tests/vm/test_services.py
	FCVM_TEST_ALL_IMAGES=1 $(BIN)/python -m pytest --fcvm-kernel stock tests/vm/test_services.py

test: setup-test ## every tier that this machine can run, then a summary; the VM tier on our own kernel, a part of it on the stock one
	$(BIN)/python tests/tiers.py

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: ## the generated reference pages
	$(BIN)/python docs/generate.py

soak: ## a thousand clones in a row: each answers, no two are alike, nothing grows; then 500 short runs, none bad
	$(BIN)/python benchmarks/endurance.py
	$(BIN)/python benchmarks/short_runs.py

bench: ## figures for the README, beside podman where it is installed
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/peers.py

kernel: $(VENV)/.test ## the guest kernel of our own and its wheel: ten minutes, then kept in the user's cache
	$(BIN)/python guest_image/kernel/build
	$(BIN)/pip install --quiet --force-reinstall --no-deps ./guest_image/kernel

qemu: $(VENV)/.test ## the QEMU of our own and its wheel: ten minutes, then kept in the user's cache
	$(BIN)/python guest_image/vmm/build
	$(BIN)/pip install --quiet --force-reinstall --no-deps ./guest_image/vmm

tools: $(VENV)/.test ## static skopeo and mksquashfs of our own and their wheel: ten minutes, then kept in the user's cache
	@$(MAKE) --no-print-directory packages PACKAGES="$(TOOLS_PACKAGES)"
	$(BIN)/python guest_image/tools/build
	$(BIN)/pip install --quiet --force-reinstall --no-deps ./guest_image/tools

agent: ## the guest agent, with the compiler that the build pins
	$(BIN)/python guest_image/build

fuzz: ## the agent's input for ten minutes
	FCVM_FUZZ_SECONDS=600 $(BIN)/python -m pytest tests/agent -k fuzz

setup-demo: $(VENV)/.demo
setup-test: $(VENV)/.test

$(VENV)/.demo: pyproject.toml
	@$(MAKE) --no-print-directory packages PACKAGES="$(DEMO_PACKAGES)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[xdist]'
	touch $@

$(VENV)/.test: pyproject.toml
	@$(MAKE) --no-print-directory packages PACKAGES="$(TEST_PACKAGES)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[xdist,dev]'
	touch $@ $(VENV)/.demo

.PHONY: packages
packages:
	@missing=""; for name in $(PACKAGES); do \
	  [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$name 2>/dev/null)" = installed ] || missing="$$missing $$name"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	elif [ -z "$$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ]; then $(SUDO) apt-get update -qq; fi

clean:
	rm -rf $(VENV) .venv-oldest build dist .demo
