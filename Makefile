# Everything a person does with this repository. Each target does its own set-up (Debian 12 with Rust), says what it installs
# and why, and can be run again at once.
SHELL := /bin/bash
FILTER ?=
CMD ?=

.PHONY: help setup build lint fmt test test-full test-unit test-kernel test-cluster test-chart test-dns test-node test-arm64 demo bench bench-dns bench-cluster vm-up vm-run vm-shell vm-down clean

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## what building and testing need, from Debian and PyPI (nothing the second time)
	@tests/vm/setup.sh

build: setup ## the meshlb binary
	cargo build --release --locked

lint: setup ## formatting, clippy, scripts, dependencies (these if cargo-deny is installed)
	@.ci/run lint

fmt: ## formats the sources
	cargo fmt --all

test: setup ## all tests that take minutes: units here, kernel tests here or in a VM, some on a real control plane, which is built the first time
	@.ci/run unit kernel api

test-full: setup ## the same with both flavours of iptables everywhere, on arm64, with a newer kernel, DNS, two control planes, the chart and a real node: hours
	@MESHLB_KERNEL_FULL=1 MESHLB_KERNEL_SECONDS=7200 MESHLB_KERNEL_CI_SECONDS=7500 .ci/run unit arm64 kernel newer dns cluster oldest packets together chart node

test-unit: setup ## the tests that need no kernel
	@.ci/run unit

test-kernel: ## the kernel tests whose name contains FILTER: make test-kernel FILTER=vip::hairpin
	@tests/kernel/run.sh $(FILTER)

test-cluster: ## CRD, source and controller on a real control plane, built from Go modules the first time (ten minutes); part of test-full
	@tests/cluster/run.sh $(FILTER)
	@tests/cluster/packets.sh

test-chart: ## the chart and deploy/: lint, schema, rights, installed on a real control plane; builds helm the first time
	@tests/chart/run.sh --server $(FILTER)

test-dns: ## the DNS server with other people's resolvers and a real CoreDNS, built the first time (docs/testing.md)
	@tests/dns/run.sh

test-node: ## a real node in a VM: the image built, the chart installed with helm, upgraded under load, uninstalled (docs/testing.md)
	@tests/cluster/node.sh

test-arm64: setup ## units for arm64 under QEMU, and the image for it, built from the Dockerfile (docs/testing.md)
	@.ci/run arm64

demo: setup ## shows what meshlb does, in network namespaces
	@tests/demo.sh

bench: setup ## measures it
	@tests/bench/run.sh

bench-dns: ## measures the DNS server beside CoreDNS
	@tests/dns/bench.sh

bench-cluster: ## measures the way from the API server to the kernel, and memory beside kube-proxy
	@tests/cluster/bench.sh

vm-up: ## boots the VM and leaves it up: test-kernel then takes seconds
	@tests/vm/up.sh

vm-run: ## a command in the VM: make vm-run CMD='ip netns'
	@tests/vm/run.sh bash -c '$(CMD)'

vm-shell: ## commands in the VM, one line after another
	@tests/vm/shell.sh

vm-down: ## ends the VM
	@tests/vm/down.sh

clean: ## removes what was built (the kernel in ~/.cache/meshlb stays)
	cargo clean
